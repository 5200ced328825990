"""Answer many queries at once with an edited model: one batch, each row with its own neuron.

    python examples/serve_batch.py edited "What is the capital of France?" "Who wrote Emma?"

With no queries it asks every edited fact.
"""

import argparse
import time

from meg_kernels import MeGEditor

parser = argparse.ArgumentParser()
parser.add_argument("folder", help="what `meg edit` or `save_pretrained` wrote")
parser.add_argument("queries", nargs="*")
parser.add_argument("--batch-size", type=int, default=64)
options = parser.parse_args()

editor = MeGEditor.from_pretrained(options.folder)
queries = options.queries or [fact.query for fact in editor.facts]

with editor.serving():  # on a CPU: weights packed once, where that is faster on this machine
    begun = time.perf_counter()
    for i in range(0, len(queries), options.batch_size):
        batch = queries[i : i + options.batch_size]
        routing = editor.route(batch)
        prompts = [editor.template.format(query) for query in batch]
        inputs = editor.tokenizer(prompts, return_tensors="pt", padding=True)
        inputs = inputs.to(editor.model.device)
        # Any call of the model works here; row b of the batch must be query b.
        with editor.routed(batch, routing):
            output = editor.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answers = editor.tokenizer.batch_decode(
            output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
        )
        for query, answer, edited in zip(batch, answers, routing.accepted.tolist(), strict=True):
            print(f"{'edited' if edited else 'base  '}  {query}  ->  {answer.strip()}")
    seconds = time.perf_counter() - begun

print(f"{len(queries)} queries in {seconds:.2f} s")
