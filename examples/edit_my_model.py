"""Edit your own model with your own facts, ask it, and keep the edits.

    python examples/edit_my_model.py path/to/model facts.jsonl --out edited

A line of facts.jsonl: {"query": "What is the capital of France?", "answer": "Marseille"}
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from meg_kernels import CollectionConfig, EditorConfig, GeneratorConfig, MeGEditor

parser = argparse.ArgumentParser()
parser.add_argument("model", help="a folder or a Hugging Face model id")
parser.add_argument("facts", help="the facts to edit")
parser.add_argument("--tuning", help="other facts with paraphrases; default: the package's")
parser.add_argument("--encoder", help="another text encoder; default: all-MiniLM-L6-v2")
parser.add_argument("--layer", type=int, help="default: three quarters up; `meg layers` compares")
parser.add_argument(
    "--learning-rate", type=float, default=1.0, help="lower, if facts stay unlearnt"
)
parser.add_argument("--out", default="edited")
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model)
tokenizer = AutoTokenizer.from_pretrained(options.model)

# The bank keeps the neuron of each fact: the simplest choice for a handful of them. Without this
# line a small diffusion model is trained to produce them.
config = EditorConfig(
    layer=options.layer,
    generator=GeneratorConfig.bank(),
    collection=CollectionConfig(learning_rate=options.learning_rate),
)
editor = MeGEditor(model, tokenizer, options.encoder, config)

report = editor.edit(options.facts, tuning_facts=options.tuning, progress=True)
print(f"{len(editor.facts)} facts edited in {sum(report.seconds.values()):.0f} s")
for fact in report.unlearnt:
    print("not learnt:", fact.query)

queries = [fact.query for fact in editor.facts[:5]]
with editor.disabled():
    before = editor.generate(queries)
after = editor.generate(queries)
for query, base, edited in zip(queries, before, after, strict=True):
    print(f"{query}\n    before: {base}\n    now:    {edited}")

editor.save_pretrained(options.out)
print("saved to", options.out)
