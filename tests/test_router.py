"""`Router`: the path of a query without a language model, from a folder that an editor saved."""

from __future__ import annotations

import copy
import dataclasses
import re
import sys

import pytest
import torch
from tiny import BANK, EDITED, FURTHER, MIXED, QUERIES, UNRELATED, edit, make_editor

from meg_kernels import Router, RoutingConfig


@pytest.fixture(scope="module")
def editor():
    editor = make_editor(BANK)
    edit(editor)
    editor.add(FURTHER)
    return editor


@pytest.fixture(scope="module")
def router(editor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edited")
    editor.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        # Whoever asks for a language model fails.
        patch.setitem(sys.modules, "meg_kernels.editing", None)
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
        yield Router.from_pretrained(folder, "cpu")


def test_a_router_finds_what_the_editor_finds(editor, router):
    mine, theirs = router.route(MIXED), editor.route(MIXED)
    for name in ("accepted", "fact", "score", "named", "z"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert mine.accepted.any() and not mine.accepted.all()
    edited = int(mine.accepted.sum())
    assert repr(mine) == f"Routing({len(MIXED)} prompts, {edited} edited, 0 with several)"
    (neurons, index), (others, other_index) = router.neurons(mine), editor.router.neurons(theirs)
    pack = router.edits.layout.pack
    assert torch.equal(pack(neurons), pack(others)) and torch.equal(index, other_index)
    assert router.protocol() == editor.router.protocol()


def test_each_accepted_query_has_the_neuron_of_its_fact_and_no_other_has_one(router):
    routing = router.route([*QUERIES, *UNRELATED])
    neurons, index = router.neurons(routing)
    assert (index >= 0).tolist() == routing.accepted.tolist()
    pack, collected = router.edits.layout.pack, router.edits.neurons
    for row, fact in enumerate(routing.fact.tolist()):
        if routing.accepted[row]:
            assert torch.equal(pack(neurons)[index[row]], pack(collected)[fact])
    assert routing.fact[: len(EDITED)].tolist() == list(range(len(EDITED)))


def test_a_query_has_to_exceed_the_threshold(router):
    score = router.route(QUERIES[:1]).score.item()
    for threshold, accepted in ((score, False), (score - 1e-6, True)):
        routing = with_threshold(router, threshold).route(QUERIES[:1])
        assert (routing.score.item(), routing.accepted.item()) == (score, accepted)


def test_without_edits_and_without_queries_nothing_is_accepted(router):
    empty = Router(router.encoder)
    assert (
        not empty.route(QUERIES).accepted.any() and empty.neurons(empty.route(QUERIES))[0] is None
    )
    assert len(router.route([])) == 0 and router.neurons(router.route([]))[0] is None


def test_a_routing_keeps_the_edits_that_it_was_decided_by(router):
    routing, edits = router.route(QUERIES), router.edits
    expected = edits.layout.pack(router.neurons(routing)[0])
    try:
        router.edits = edits.without({0, 1, 2})
        assert torch.equal(edits.layout.pack(router.neurons(routing)[0]), expected)
        assert router.route(QUERIES).fact.max() < len(edits) - 3
    finally:
        router.edits = edits


def test_edits_that_leave_and_come_back_are_the_same(editor):
    edits = editor.edits
    last = len(edits) - 1
    fewer = edits.without({last})
    again = fewer.joined([edits.facts[last]], edits.conditions[[last]], edits.neurons[[last]])
    assert again.facts == edits.facts and again.rows_of(edits.facts) == list(range(len(edits)))
    assert torch.equal(again.conditions, edits.conditions)
    assert fewer.rows_of([edits.facts[last]]) == [-1]
    assert len(edits.identity()) == len(again.identity())


def test_the_subject_is_required_unless_asked_otherwise(router):
    router = Router(router.encoder, router.edits)
    assert router.requires_subject
    named = router.route([*QUERIES, "red blue gold"]).named
    assert named[: len(QUERIES)].all() and not named[-1]
    router.config = RoutingConfig(require_subject=False)
    assert not router.requires_subject and router.route(["red blue gold"]).named.all()
    assert "7 facts" in repr(router)


def with_threshold(router, threshold, **changed):
    gate = copy.deepcopy(router.edits.gate)
    gate.threshold = threshold
    edits = dataclasses.replace(router.edits, gate=gate, **changed)
    return Router(router.encoder, edits)


def test_of_the_nearest_facts_the_one_whose_subject_is_named_is_taken(router):
    """By the definition, one text and one fact at a time."""
    other, facts = with_threshold(router, 0.0), router.edits.facts
    texts = [
        *(f"{fact.subject} {QUERIES[row - 1]}" for row, fact in enumerate(facts[:5])),
        *(f"red blue {fact.subject.upper()}" for fact in facts),
        "red blue gold",
    ]
    routing = other.route(texts)  # none of which is misspelt
    similarity = router.encode(texts) @ router.edits.conditions.T
    for place, text in enumerate(texts):
        able = {
            row: float(similarity[place, row])
            for row, fact in enumerate(facts)
            if re.search(rf"\b{fact.subject}", text, re.IGNORECASE)
        }
        assert routing.named[place] == bool(able)
        best = max(able, key=able.get) if able else int(similarity[place].argmax())
        assert routing.fact[place] == best
        near = float(similarity[place, best])
        assert routing.score[place].item() == pytest.approx(near, abs=1e-5)
        assert routing.accepted[place] == (bool(able) and near > 0)


def test_a_fact_without_a_subject_has_the_score_of_the_gate(router):
    facts = [dataclasses.replace(fact, subject=None) for fact in router.edits.facts]
    other = with_threshold(router, 0.5, facts=tuple(facts))
    routing = other.route(MIXED)
    assert torch.allclose(routing.score, other.edits.gate.score(other.encode(MIXED)))
    assert routing.named.all()


def test_a_misspelt_word_is_read_as_it_is_meant(router):
    query = next(query for query in QUERIES if "color" in query)
    right, wrong = router.route([query]), router.route([query.replace("color", "coler")])
    torch.testing.assert_close(wrong.score, right.score)
    assert wrong.accepted.all()
    assert wrong.spans[0].text == query
    batch = router.route([UNRELATED[0], query.replace("color", "coler")])
    assert batch.spans[1].text == query
    name = router.edits.facts[0].subject  # too short
    assert "X" + name not in {span.text for span in router.route(["X" + name]).spans[1:]}


def test_a_batch_is_decided_with_one_copy_from_the_device(router, monkeypatch):
    """On a GPU every `.cpu()` is a wait."""
    copies, real = [], torch.Tensor.cpu
    routing = router.route(QUERIES)
    _ = router.edits.keys  # once for each `Edits`
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or real(self))
    routing = dataclasses.replace(router.route(QUERIES))
    router.neurons(routing)
    assert copies == [(2, len(QUERIES), len(router.edits))]


def test_a_follow_up_is_compared_with_what_it_follows_as_both_are_meant(router):
    query = next(query for query in QUERIES if query.startswith("Which color has"))
    misspelt = query.replace("Which color has", "Whichh coler hass")
    other = with_threshold(router, 0.95)
    # A word makes the question less like the fact's, but not as little as the misspelt ones do.
    texts = [query, f"{query} pink", misspelt]
    alone, followed, unknown = (router.encode(texts) @ router.encode([query]).T)[:, 0].tolist()
    assert alone > followed > 0.95 > unknown
    turns = [{"role": "assistant", "content": "red"}, {"role": "user", "content": "pink"}]
    for asked in (query, misspelt):
        assert not other.route([{"role": "user", "content": asked}, *turns]).accepted.any()


def test_of_several_misspelt_questions_each_is_asked_as_it_is_meant_and_in_its_place(router):
    first, second = (query for query in QUERIES if query.startswith("Which color has"))
    other = with_threshold(router, 0.95)
    for near in ("Which coler has", "Whichh coler hass"):  # taken for edited as it is, and not
        text = f"{first.replace('Which color has', near)} {second}"
        (found,) = other.route([text]).several.values()
        assert [span.text for span in found.spans] == [first, second]


def test_several_questions_are_sentences_even_where_all_of_them_are_nearer(router):
    _, query = (query for query in QUERIES if query.startswith("Which color has"))
    text = f"Bebo? {query}"
    whole, part = (router.encode([text, "Bebo?"]) @ router.edits.conditions.T).max(1).values
    assert whole > part
    (found,) = with_threshold(router, -1.0).route([text]).several.values()
    assert [span.text for span in found.spans] == ["Bebo?", query]


def test_among_many_sentences_words_are_corrected_to_those_of_the_queries_only(router, monkeypatch):
    read, real = [], type(router.encoder).encode
    monkeypatch.setattr(
        type(router.encoder), "encode", lambda self, texts: read.extend(texts) or real(self, texts)
    )
    for sentences in (2, 12):
        read.clear()
        router.route([" ".join(["The coler is paintde."] * sentences)])
        assert "The color is paintde." in read or sentences == 2
        assert ("The color is painted." in read) == (sentences == 2)


def test_a_subject_is_named_whatever_way_it_is_written(router):
    query = next(query for query in QUERIES if query.startswith("Which color has"))
    name = query.removeprefix("Which color has ").removesuffix("?")
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in name)
    right, other = router.route([query]), router.route([f"Which color has “{wide}”?", query])
    assert right.named.all() and other.named.all() and (other.fact == right.fact).all()


def test_without_edits_the_conditions_are_those_of_whole_prompts(router):
    prompts = ["Good day. Sing a song. How tall is a house?", *QUERIES[:2]]
    routing = Router(router.encoder).route(prompts)
    torch.testing.assert_close(routing.z, router.encode(prompts))
    assert [span.text for span in routing.spans] == prompts


def test_a_fact_without_a_subject_is_taken_only_where_it_is_the_nearest(router):
    facts = list(router.edits.facts)
    facts[-1] = dataclasses.replace(facts[-1], subject=None)
    other = with_threshold(router, -9.0, facts=tuple(facts))
    texts = [f"red blue {word}" for word in ("gold", "gray", "pink", "green", "age", "color")]
    nearest = (router.encode(texts) @ router.edits.conditions.T).argmax(1)
    routing = other.route(texts)
    assert routing.accepted.tolist() == (nearest == len(facts) - 1).tolist()


def test_rows_of_a_routing_are_those_of_their_queries(router):
    routing = router.route(MIXED)
    some = routing.of([3, 0])
    alone = router.route([MIXED[3], MIXED[0]])
    assert torch.equal(some.fact, alone.fact) and torch.equal(some.accepted, alone.accepted)
    assert [span.text for span in some.spans] == [span.text for span in alone.spans]
    answers = routing.answers()
    assert [bool(answer) for answer in answers] == routing.accepted.tolist()
