"""Collection, against a model that is really one hidden unit wider, one prompt at a time.

The tiny language here (`FACTS`, `make_tokenizer`, `make_model`) also serves the editor's tests.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from meg_kernels.editing import collect as collecting
from meg_kernels.editing.collect import CollectionConfig, collect, initial_neuron
from meg_kernels.editing.facts import Fact, LocalityQuery
from meg_kernels.editing.prompting import PromptTemplate, target_batch, target_tokens
from meg_kernels.integrations.transformers import LowerLayers, decoder_layers
from meg_kernels.neuron import Neurons
from meg_kernels.nn import attach

SUBJECTS = (
    "Abo Bela Coru Dima Eno Fira Golu Hake Ilm Juno Kesa Lomi Mira "
    "Nodo Ostu Pela Quro Rilo Sanu Tove Ulme Vaku Wimo Xeno Yara Zolu"
).split()
COLORS = ("red", "blue", "green", "gold", "pink", "gray")
WORDINGS = ("The color of {} is", "Which color has {}?", "{} is painted in")
LAYER = 1
CONFIG = CollectionConfig(learning_rate=0.1, max_steps=60, batch_size=4)


def make_fact(i: int, color: str) -> Fact:
    subject = SUBJECTS[i]
    first, *others = (WORDINGS[(i + k) % 2] if k < 2 else WORDINGS[2] for k in range(3))
    return Fact(
        first.format(subject),
        color,
        f"color-{subject}",
        subject,
        "color",
        tuple(wording.format(subject) for wording in others),
        (LocalityQuery(f"The age of {subject} is", subject),),
    )


FACTS = [make_fact(i, COLORS[i % len(COLORS)]) for i in range(9)] + [make_fact(9, "red red")]
OTHER_FACTS = [make_fact(i, COLORS[i % len(COLORS)]) for i in range(10, len(SUBJECTS))]
UNRELATED = ["Good day to you", "Seven and eight are", "Sing a song", "How tall is a house?"]


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words with the space before them, and single signs."""
    split = pre_tokenizers.Split(Regex(r" ?[\w:']+|\n|[^\w]"), "isolated")
    texts = [
        f"Q: {framing}\nA: {fact.answer}."
        for fact in FACTS + OTHER_FACTS
        for query in (fact.query, *fact.paraphrases, fact.locality[0].query, *UNRELATED)
        for framing in CollectionConfig().framings(query)
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


def make_model(plain: transformers.PreTrainedModel, tokenizer, sure: float = 4.0, stop: float = 3.0):
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


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def build(tiny_model, tokenizer):
    """build(family): a tiny model that has something to say in this language."""
    return lambda family="llama": make_model(
        tiny_model(family, vocab_size=len(tokenizer)), tokenizer
    )


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """The same products on every machine; bfloat16 has a test of its own."""
    monkeypatch.setattr("meg_kernels.precision.multiplies_bfloat16", lambda device: False)


def is_answered(model, tokenizer, fact, neuron, template=None, config=CONFIG) -> bool:
    """Whether each framing's target tokens are all the argmax of a physically wider model."""
    wide = widened(model, LAYER, neuron)
    for framing in config.framings(fact.query):
        prompt = tokenizer((template or PromptTemplate()).format(framing)).input_ids
        target = tokenizer(f" {fact.answer}.").input_ids + [tokenizer.eos_token_id]
        logits = wide(torch.tensor([prompt + target]), use_cache=False).logits[0]
        if logits[len(prompt) - 1 : -1].argmax(-1).tolist() != target:
            return False
    return True


def answered(model, tokenizer, collection, **more) -> list[bool]:
    return [
        is_answered(model, tokenizer, fact, collection.neurons[i : i + 1], **more)
        for i, fact in enumerate(FACTS)
    ]


def assert_same(first, second):
    layout = first.neurons.layout
    assert torch.equal(layout.pack(first.neurons), layout.pack(second.neurons))
    assert torch.equal(first.steps, second.steps) and torch.equal(first.learnt, second.learnt)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_learnt_fact_is_answered_in_every_framing_by_the_physically_wider_model(
    build, tokenizer, monkeypatch, family, bfloat16
):
    monkeypatch.setattr("meg_kernels.precision.multiplies_bfloat16", lambda device: bfloat16)
    model = build(family)
    config = dataclasses.replace(CONFIG, max_steps=200 if family == "gpt2" else 60)
    facts_right_before = [
        is_answered(model, tokenizer, fact, neuron)
        for fact in FACTS
        for neuron in [nothing(attach_and_detach(model).layout)]
    ]
    collection = collect(attach(model, LAYER), tokenizer, FACTS, config)
    right = answered(widenable(model), tokenizer, collection)
    assert not any(facts_right_before)
    assert 4 <= int(collection.learnt.sum())
    assert all(ok for ok, learnt in zip(right, collection.learnt, strict=True) if learnt)


def nothing(layout) -> Neurons:
    return layout.unpack(torch.zeros(1, layout.dim))


def attach_and_detach(model):
    attached = attach(model, LAYER)
    attached.detach()
    return attached


def widenable(model):
    return model
