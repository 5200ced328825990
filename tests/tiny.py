"""A tiny language, and tiny random models that have something to say in it.

FACTS, OTHER_FACTS, UNRELATED    what is edited, what the encoder is tuned on, and the rest
make_tokenizer, make_model       a language model of three layers
make_encoder, make_editor        and all that editing needs
widened, greedy                  the definition: one hidden unit more, one token at a time
run, fails                       the command `meg`
"""

from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from typer.testing import CliRunner

from meg_kernels import (
    CollectionConfig,
    DiTConfig,
    EditorConfig,
    EncoderTuningConfig,
    Fact,
    GeneratorConfig,
    LocalityQuery,
    MeGEditor,
    Neurons,
    SamplerConfig,
    TextEncoder,
    cli,
)
from meg_kernels.editing.contexts import TEMPLATE as CONTEXTS
from meg_kernels.nn.families import decoder_layers

FIRST = ("A", "Be", "Co", "Di", "E", "Fi")
SUBJECTS = [first + last for last in ("bo", "na", "ruk", "mi", "lus") for first in FIRST][:26]
COLORS = ("red", "blue", "green", "gold", "pink", "gray")
WORDINGS = ("The color of {} is", "Which color has {}?", "{} is painted in")
LAYER = 1


def make_fact(i: int, color: str) -> Fact:
    subject, other = SUBJECTS[i], SUBJECTS[10 + (i + 5) % 16]
    first, *others = (WORDINGS[(i + k) % 2] if k < 2 else WORDINGS[2] for k in range(3))
    return Fact(
        first.format(subject),
        color,
        f"color-{subject}",
        subject,
        "color",
        tuple(wording.format(subject) for wording in others),
        (LocalityQuery(f"The age of {subject} is", subject), LocalityQuery(first.format(other))),
    )


FACTS = [make_fact(i, COLORS[i % len(COLORS)]) for i in range(9)] + [make_fact(9, "red red")]
OTHER_FACTS = [make_fact(i, COLORS[i % len(COLORS)]) for i in range(10, len(SUBJECTS))]
UNRELATED = ["Good day to you", "Seven and eight are", "Sing a song", "How tall is a house?"]


EDITED, FURTHER = FACTS[:5], FACTS[5:7]
MOST = 5
TRAINING = {"learning_rate": 5e-3, "max_steps": 300, "check_every": 20}
GENERATORS = {
    "dit": GeneratorConfig.dit(
        network=DiTConfig(width=32, depth=2, num_heads=2, patch_size=16),
        sampler=SamplerConfig(num_steps=2),
        **TRAINING,
    ),
    "mlp": GeneratorConfig.mlp(width=64, **TRAINING),
    "bank": GeneratorConfig.bank(),
}
CONFIG = EditorConfig(
    layer=LAYER,
    collection=CollectionConfig(learning_rate=0.1, max_steps=60, contexts=CONTEXTS),
    encoder_tuning=EncoderTuningConfig(
        epochs=20, learning_rate=1e-3, batch_size=8, alike_batches=False
    ),
    generator=GENERATORS["mlp"],
)
BANK = dataclasses.replace(CONFIG, generator=GENERATORS["bank"])


PARAPHRASES = [query for fact in EDITED for query in fact.paraphrases]
QUERIES = [fact.query for fact in EDITED]
ANSWERS = [fact.answer for fact in EDITED]
LOCALITY = [other.query for fact in EDITED for other in fact.locality]
ELSEWHERE = LOCALITY + UNRELATED
MIXED = [query for pair in zip(QUERIES + PARAPHRASES, ELSEWHERE, strict=False) for query in pair]


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words with the space before them, and single signs."""
    split = pre_tokenizers.Split(Regex(r" ?[\w:']+|\n|[^\w]"), "isolated")
    texts = [
        f"Q: {context.wording(query)}\nA: {fact.answer}."
        for fact in FACTS + OTHER_FACTS
        for query in (fact.query, *fact.paraphrases, fact.locality[0].query, *UNRELATED)
        for context in CONTEXTS
    ]
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    plain = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    plain.pre_tokenizer, plain.decoder = split, decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make_model(
    plain: transformers.PreTrainedModel, tokenizer, sure: float = 6.0, stop: float = 3.0
):
    """`plain`, made as `sure` of itself as trained models are, and to stop after a color."""
    directions = torch.randn(32, 2, generator=torch.Generator().manual_seed(5))
    after_color, after_stop = torch.linalg.qr(directions)[0].T
    colors = tokenizer(" " + " ".join(COLORS)).input_ids
    full_stop, end = tokenizer.convert_tokens_to_ids([".", "</s>"])
    head = plain.get_output_embeddings()
    with torch.no_grad():
        head.weight = nn.Parameter(sure * head.weight, requires_grad=False)
        plain.get_input_embeddings().weight[colors] += stop * after_color
        plain.get_input_embeddings().weight[full_stop] += stop * after_stop
        head.weight[full_stop], head.weight[end] = sure * after_color, sure * after_stop
    return plain


class WidenedGatedFFN(nn.Module):
    """A gated FFN with one more hidden unit, a linear one."""

    def __init__(self, ffn: nn.Module, key: torch.Tensor, value: torch.Tensor):
        super().__init__()
        self.ffn, self.key = ffn, key
        self.out = torch.cat([ffn.down_proj.weight, value.unsqueeze(1)], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gated = self.ffn.act_fn(self.ffn.gate_proj(x)) * self.ffn.up_proj(x)
        return torch.cat([gated, (x @ self.key).unsqueeze(-1)], dim=-1) @ self.out.T


def widened(model: transformers.PreTrainedModel, layer: int, neuron: Neurons):
    """A copy of `model` with this one neuron built into its FFN."""
    wide = copy.deepcopy(model)
    mlp = decoder_layers(wide)[layer].mlp
    if neuron.bias is None:
        decoder_layers(wide)[layer].mlp = WidenedGatedFFN(mlp, neuron.key[0], neuron.value[0])
        return wide
    mlp.c_fc.weight = nn.Parameter(torch.cat([mlp.c_fc.weight, neuron.key.T], dim=1))
    mlp.c_fc.bias = nn.Parameter(torch.cat([mlp.c_fc.bias, neuron.bias]))
    mlp.c_fc.nf += 1
    mlp.c_proj.weight = nn.Parameter(torch.cat([mlp.c_proj.weight, neuron.value]))
    return wide


def make_language_model(tokenizer, **shape: int) -> transformers.PreTrainedModel:
    plain = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **plain | shape,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / 32**0.5 if parameter.dim() > 1 else 1 + 0.1 * noise)
    return make_model(model.requires_grad_(False), tokenizer)


def make_encoder() -> TextEncoder:
    queries = [q for f in FACTS + OTHER_FACTS for q in (f.query, *f.paraphrases)]
    queries += [other.query for f in FACTS + OTHER_FACTS for other in f.locality] + UNRELATED
    split = pre_tokenizers.Whitespace()
    words = sorted({word for query in queries for word, _ in split.pre_tokenize_str(query)})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    plain = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    plain.pre_tokenizer = split
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]"
    )
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TextEncoder(transformers.BertModel(config).eval(), tokenizer)


def make_editor(config: EditorConfig = CONFIG) -> MeGEditor:
    tokenizer = make_tokenizer()
    return MeGEditor(make_language_model(tokenizer), tokenizer, make_encoder(), config)


def edit(editor: MeGEditor, facts=EDITED, **more):
    return editor.edit(
        facts, **{"tuning_facts": OTHER_FACTS, "unrelated_queries": UNRELATED} | more
    )


def saved_editor(tmp_path_factory, name, config):
    folder = tmp_path_factory.mktemp(name)
    editor = make_editor(config)
    report = edit(editor)
    assert report.unlearnt == () and report.training.answered == 1.0
    editor.save_pretrained(folder)
    return folder


def load(folder) -> MeGEditor:
    tokenizer = make_tokenizer()
    return MeGEditor.from_pretrained(folder, make_language_model(tokenizer), tokenizer)


def state(editor: MeGEditor):
    """Everything that a user can see of an editor."""
    routing = editor.route(MIXED)
    return (
        editor.facts,
        editor.edits.report,
        editor.generate(MIXED[:12], MOST),
        editor.edits.generator.generate(editor.edits.conditions).value.tolist(),
        editor.edits.generated.tolist(),
        routing.accepted.tolist(),
        routing.fact.tolist(),
        routing.score.tolist(),
    )


def greedy(model, tokenizer, query: str) -> list[int]:
    """Up to MOST tokens, one at a time, all of them anew for each: no batch, padding or cache."""
    tokens, said = tokenizer(f"Q: {query}\nA:").input_ids, []
    line_breaks = tokenizer("\n").input_ids
    while len(said) < MOST and not {tokenizer.eos_token_id, *line_breaks} & set(said):
        logits = model(torch.tensor([tokens + said]), use_cache=False).logits
        said.append(int(logits[0, -1].argmax()))
    return said


def own_neuron(editor: MeGEditor, query: str) -> Neurons:
    """What the generator makes of this query alone, if it was trained on the nearest fact."""
    z = editor.encoder.encode([query])
    asked = editor.encoder.encode([fact.query for fact in editor.facts])
    row = int((asked @ z[0]).argmax())
    if not editor.edits.generated[row]:
        return editor.edits.neurons[[row]]
    return editor.edits.generator.generate(asked[[row]] if editor.router.config.snap else z)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def run(*arguments) -> str:
    """What `meg` prints; raises what it raises."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def fails(monkeypatch, capsys, *arguments) -> str:
    """What the whole program prints to stderr before it exits with 1."""
    monkeypatch.setattr(sys, "argv", ["meg", *(str(a) for a in arguments)])
    monkeypatch.setattr(cli.errors, "width", 400, raising=False)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said[said.index("error: ") :].strip()
