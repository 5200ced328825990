"""What serving rests on, without vLLM: decisions, salts, the table. tests/served has the rest."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch
from tiny import BANK, EDITED, FURTHER, GENERATORS, MIXED, QUERIES, UNRELATED, edit, make_editor

from meg_kernels import Router
from meg_kernels.editing.prompting import PromptTemplate
from meg_kernels.integrations.vllm import additional_config
from meg_kernels.integrations.vllm.front_end import KEPT, PREFIX, FrontEnd, conversation
from meg_kernels.integrations.vllm.models import as_by_default
from meg_kernels.integrations.vllm.server import _taken, command, environment
from meg_kernels.integrations.vllm.settings import Settings
from meg_kernels.integrations.vllm.table import NO_ROW, Loaded, NeuronTable
from meg_kernels.ops.dynamic_neuron import dynamic_neuron_reference
from meg_kernels.routing.saving import load_edits

TOKENS = 32


@pytest.fixture(scope="module")
def editor():
    editor = make_editor(BANK)
    edit(editor)
    return editor


@pytest.fixture(scope="module")
def folder(editor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edited")
    editor.save_pretrained(folder)
    return folder


@pytest.fixture
def front_end(folder):
    return FrontEnd(Router.from_pretrained(folder, "cpu"), PromptTemplate())


def table_for(edits, rows=None):
    dtype, device = torch.float32, torch.device("cpu")
    if rows is None:
        return NeuronTable.for_edits(edits, TOKENS, dtype, device)
    return NeuronTable(edits.layout, rows, TOKENS, dtype, device)


def flat(table, name):
    row = table.row(name)
    parts = [table.key[row], *([] if table.bias is None else [table.bias[row : row + 1]])]
    return torch.cat([*parts, table.value[row]])


# ---- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GENERATORS)
def test_neurons_are_told_apart_by_what_makes_them(kind):
    editor = make_editor(dataclasses.replace(BANK, generator=GENERATORS[kind]))
    edit(editor)
    before = editor.edits.neuron_ids
    assert len({*before}) == len(EDITED)
    editor.add(FURTHER)
    assert editor.edits.neuron_ids[: len(before)] == before
    served = editor.edits.served_neurons(torch.arange(len(editor.edits)))
    routing = editor.route([fact.query for fact in editor.facts])
    neurons, index = editor.router.neurons(routing)
    pack = editor.edits.layout.pack
    torch.testing.assert_close(pack(served), pack(neurons)[index], rtol=1e-5, atol=1e-6)
    changed = dataclasses.replace(EDITED[0], answer=EDITED[1].answer)
    editor.add([changed], replace=True)
    assert not {*before} & {editor.edits.neuron_ids[-1]}


@pytest.mark.parametrize("kind", GENERATORS)
def test_neurons_are_the_same_while_vllm_builds_a_model_in_bfloat16(kind, tmp_path):
    editor = make_editor(dataclasses.replace(BANK, generator=GENERATORS[kind]))
    edit(editor)
    editor.save_pretrained(tmp_path / "edited")
    expected = Loaded.of(editor.edits)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"), as_by_default():
            found = Loaded.of(load_edits(tmp_path / "edited", "cpu").edits)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(before)
    assert found.ids == expected.ids and found.flat.dtype == torch.float32
    torch.testing.assert_close(found.flat, expected.flat, rtol=1e-5, atol=1e-6)


# ---- the front end -------------------------------------------------------------------------------


def test_the_front_end_decides_as_the_router_does(front_end, editor):
    routing = editor.route(MIXED)
    ids = editor.edits.neuron_ids
    expected = [
        ids[fact] if accepted else None
        for accepted, fact in zip(routing.accepted.tolist(), routing.fact.tolist(), strict=True)
    ]
    assert any(expected) and not all(expected)
    assert front_end.decide(MIXED) == expected
    assert asyncio.run(front_end.decide_async(MIXED)) == expected
    assert front_end.decide([PromptTemplate().format(text) for text in MIXED]) == expected
    chats = [[{"role": "user", "content": text}] for text in MIXED]
    assert front_end.decide(chats) == expected
    front_end.tokenizer = editor.tokenizer
    ids = [editor.tokenizer(PromptTemplate().format(text)).input_ids for text in MIXED]
    assert front_end.decide(ids) == expected


def test_requests_are_counted_when_the_engine_has_them(front_end, editor):
    front_end.decide(MIXED)
    assert front_end.counted().requests == 0
    one, other = editor.edits.neuron_ids[:2]
    for request, neuron, is_off in (("a", one, False), ("b", None, False), ("c", other, True)):
        front_end.count(request, neuron, is_off)
    counts = front_end.counted()
    assert (counts.requests, counts.edited, counts.opted_out) == (3, 1, 1)
    assert counts.by_fact == {editor.facts[0].id: 1}


def test_neurons_of_requests_on_their_way_are_known_and_others_forgotten(
    front_end, editor, monkeypatch
):
    place = "meg_kernels.integrations.vllm.front_end"
    monkeypatch.setattr(f"{place}.MOST_REQUESTS", 2)
    front_end._room, running = 2, {"a", "d"}
    front_end.running = lambda: running
    ids = editor.edits.neuron_ids
    for request, neuron in zip("abcd", ids, strict=False):
        front_end.count(request, neuron, False)
    assert front_end.on_their_way() == sorted([ids[0], ids[3]])
    assert len(front_end._requests) == 2
    front_end.decide(QUERIES[4:5])  # whose request the engine has not seen yet
    assert front_end.on_their_way() == sorted([ids[0], ids[3], ids[4]])
    monkeypatch.setattr(f"{place}.LATELY", 0.0)
    running.clear()
    assert front_end.on_their_way() == []


@pytest.mark.parametrize("prompt", ["", "  \n", None, [], [-1], [10**6], "half \ud800"])
def test_what_has_no_text_goes_to_the_base_model_and_spoils_no_other(front_end, editor, prompt):
    front_end.tokenizer = editor.tokenizer
    expected = front_end.decide(QUERIES[:1])
    assert expected != [None]
    assert front_end.decide([prompt, QUERIES[0]]) == [None, *expected]


def test_what_waits_is_routed_together_and_the_event_loop_goes_on(front_end):
    started, release, route = threading.Event(), threading.Event(), front_end.router.route

    def slow(prompts):
        started.set()
        assert release.wait(30)
        return route(prompts)

    front_end.router = SimpleNamespace(route=slow)

    async def ask():
        first = asyncio.ensure_future(front_end.decide_async(QUERIES[:1]))
        while not started.is_set():
            await asyncio.sleep(0)
        others = [asyncio.ensure_future(front_end.decide_async([q])) for q in QUERIES * 4]
        others[0].cancel()
        await asyncio.sleep(0)
        assert not first.done()  # and this task runs all the same
        release.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    first, cancelled, *others = asyncio.run(ask())
    assert isinstance(cancelled, asyncio.CancelledError)
    expected = front_end.decide(QUERIES)
    assert first == expected[:1]
    assert [name for [name] in others] == (expected * 4)[1:]
    counts = front_end.counted()
    assert counts.batches == 3  # the first one alone, all that waited, and those of the last line
    assert counts.largest == 4 * len(QUERIES) - 1


def test_a_batch_has_no_more_prompts_and_characters_than_it_may(front_end, monkeypatch):
    place = "meg_kernels.integrations.vllm.front_end.AT_ONCE"
    expected = front_end.decide(QUERIES)
    monkeypatch.setattr(place, (2, 10**6))
    assert front_end.decide(QUERIES) == expected
    assert front_end.counted().batches == 1 + 3
    monkeypatch.setattr(place, (10, 1))  # each alone
    assert front_end.decide(QUERIES) == expected
    assert front_end.counted().batches == 1 + 3 + len(QUERIES)


def test_an_error_of_the_router_reaches_who_asked_and_nobody_later(front_end):
    router = front_end.router
    front_end.router = SimpleNamespace(route=lambda prompts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        front_end.decide(QUERIES)
    front_end.put(router)
    assert None not in front_end.decide(QUERIES)
    assert front_end.counted().reloads == 1


def test_a_salt_stands_for_one_neuron_and_one_salt_of_a_user(front_end):
    one, other = front_end.decide(QUERIES[:2])
    salts = [front_end.salt(name, user) for name in (one, other) for user in (None, "a", "b")]
    assert len({*salts}) == 6
    for salt, (name, user) in zip(
        salts, [(n, u) for n in (one, other) for u in (None, "a", "b")], strict=True
    ):
        assert len(salt) <= 128 and not set("@/\\\0") & {*salt}
        found = front_end.resolve(salt)
        assert (found.neuron, found.salt) == (name, user)
        assert front_end.salt(name, user) == salt  # the same blocks are found again
    for user in (None, "a", "meg-"):
        found = front_end.resolve(front_end.salt(None, user))
        assert (found.neuron, found.salt) == (None, user)


def test_no_user_can_name_a_salt_of_ours(front_end, folder):
    (name,) = front_end.decide(QUERIES[:1])
    ours = front_end.salt(name, None)
    forged = front_end.salt(None, ours)  # as vLLM's renderer gives it, of a request without neuron
    assert forged != ours and front_end.resolve(forged).neuron is None
    for unknown in (None, "", "a user's own", PREFIX + "0" * 64):
        with pytest.raises(ValueError, match="was not looked at"):
            front_end.resolve(unknown)
    another = FrontEnd(Router.from_pretrained(folder, "cpu"), PromptTemplate())
    assert another.salt(name, None) != ours  # nor can who knows the neuron


def test_the_oldest_salts_are_forgotten_and_then_refused(front_end, monkeypatch):
    monkeypatch.setattr("meg_kernels.integrations.vllm.front_end.KEPT", 2)
    assert KEPT > 1000
    first, second, third = (front_end.salt("neuron", user) for user in "abc")
    assert front_end.resolve(second).salt == "b" and front_end.resolve(third).salt == "c"
    with pytest.raises(ValueError, match="was not looked at"):
        front_end.resolve(first)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "Who?"}], ["Who?"]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "image_url"}]}],
            ["A"],
        ),
        (
            [{"role": "system", "content": "Be"}, {"role": "user", "content": "Who?"}],
            ["Be", "Who?"],
        ),
        ([{"role": "developer", "content": "Be"}, {"role": "user", "content": "W"}], ["W"]),
        ([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It"}], None),
        ([{"role": "user", "content": "Who?"}, {"role": "tool", "content": "It"}], None),
        ([{"role": "user", "content": [{"type": "image_url"}]}], [""]),
        ([{"role": "assistant", "content": None}], None),
        ([], None),
    ],
)
def test_messages_become_a_conversation_that_ends_with_the_user(messages, expected):
    found = conversation(messages)
    assert (None if found is None else [message["content"] for message in found]) == expected


# ---- the table -----------------------------------------------------------------------------------


def test_each_token_has_the_neuron_of_its_request(editor):
    edits = editor.edits
    table = table_for(edits)
    ids = edits.neuron_ids
    table.commit(table.load(Loaded.of(edits)))
    assert table.served == {*ids}
    names, counts = [ids[2], None, ids[0], ids[2]], [3, 2, 1, 4]
    table.put([table.row(name) for name in names], counts, 16)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(16, edits.layout.d_in, generator=rng)
    y = torch.randn(16, edits.layout.d_out, generator=rng)
    facts = torch.tensor([2, 2, 2, -1, -1, 0, 2, 2, 2, 2] + [-1] * 6)
    expected = dynamic_neuron_reference(y, x, edits.neurons, facts)
    torch.testing.assert_close(table.add_to(y, x), expected)
    assert torch.equal(table.add_to(y, x)[facts < 0], y[facts < 0])
    batched = table.add_to(y.unsqueeze(0), x.unsqueeze(0))  # as transformers' models have it
    torch.testing.assert_close(batched[0], expected)


def test_a_later_batch_keeps_nothing_of_the_one_before(editor):
    table = table_for(editor.edits)
    table.load(Loaded.of(editor.edits))
    name = editor.edits.neuron_ids[0]
    table.put([table.row(name)], [TOKENS], TOKENS)
    table.put([NO_ROW], [1], 4)
    assert (table.token_rows[:4] == NO_ROW).all()


def test_loading_again_moves_no_neuron_and_keeps_those_that_are_served(editor):
    edits = editor.edits
    table, ids = table_for(edits, rows=len(edits) + 1), edits.neuron_ids
    table.commit(table.load(Loaded.of(edits)))
    rows = {name: table.row(name) for name in ids}
    address = table.key.data_ptr()
    table.commit(table.load(Loaded.of(edits.without({0, 1}))))
    assert table.served == {*ids[2:]}
    gone = flat(table, ids[0])  # still there, for who asked before
    torch.testing.assert_close(gone, edits.layout.pack(edits.neurons)[0])
    assert {name: table.row(name) for name in ids} == rows
    table.commit(table.load(Loaded.of(edits)))
    assert {name: table.row(name) for name in ids} == rows and table.key.data_ptr() == address


def test_rows_are_taken_of_neurons_alone_that_nobody_is_sent_to(editor):
    edits, other = editor.edits, make_editor(BANK)
    edit(other)
    other.add(FURTHER)
    more, ids = other.edits, edits.neuron_ids
    table = table_for(edits, rows=len(edits) + 1)
    table.commit(table.load(Loaded.of(edits)))
    kept = Loaded.of(more.without({0}))
    full = "2 further neurons do not fit into the 1 rows"
    with pytest.raises(ValueError, match=full):
        table.load(kept)  # what is served stays until another state takes its place
    table.commit(table.load(Loaded.of(edits.without({0}))))
    with pytest.raises(ValueError, match=full):
        table.load(kept, keep={ids[0]})
    assert table.row(ids[0]) >= 0
    before = table.served
    loaded = table.load(kept)
    assert table.served == before and loaded == {*kept.ids}
    with pytest.raises(RuntimeError, match="is not in the table"):
        table.row(ids[0])
    for name, fact in zip(kept.ids, kept.flat, strict=True):
        torch.testing.assert_close(flat(table, name), fact)


def test_neurons_of_another_layout_are_refused(editor):
    table = table_for(editor.edits)
    layout = dataclasses.replace(editor.edits.layout, d_in=editor.edits.layout.d_in + 1)
    table.layout = layout
    with pytest.raises(ValueError, match="the neurons are"):
        table.load(Loaded.of(editor.edits))


def test_a_table_moves_with_its_model_and_is_no_part_of_its_checkpoint(editor):
    table = table_for(editor.edits)
    table.load(Loaded.of(editor.edits))
    assert not table.state_dict()
    assert table.to(torch.bfloat16).key.dtype == torch.bfloat16
    assert table.token_rows.dtype == torch.int64


# ---- settings and the command line ---------------------------------------------------------------


def test_settings_come_from_the_folder(folder, editor):
    settings = Settings.of_folder(folder)
    assert settings.layer == editor.layer and settings.d_in == editor.edits.layout.d_in
    assert additional_config(folder) == {"meg": dataclasses.asdict(settings)}
    assert Settings.of(SimpleNamespace(additional_config={})) is None
    assert Settings.of(SimpleNamespace(additional_config={"other": 1})) is None


def test_plugins_without_ours_are_refused_before_the_base_model_is_served(folder, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other,meg")
    assert additional_config(folder)
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(RuntimeError, match="VLLM_PLUGINS is 'other', without meg"):
        additional_config(folder)


@pytest.mark.parametrize("given", [True, {}, {"edited": 3}, []])
def test_settings_that_name_no_folder_are_refused(given):
    with pytest.raises(ValueError, match="names no edited model; make it with"):
        Settings.of(SimpleNamespace(additional_config={"meg": given}))


def test_settings_that_are_not_the_folders_are_refused(folder):
    given = dataclasses.asdict(Settings.of_folder(folder)) | {"layer": 0}
    with pytest.raises(ValueError, match=r"additional_config\['meg'\] is"):
        Settings.of(SimpleNamespace(additional_config={"meg": given}))


def test_neurons_of_each_wording_are_refused(tmp_path):
    editor = make_editor(dataclasses.replace(BANK, snap=False))
    edit(editor)
    editor.save_pretrained(tmp_path / "edited")
    with pytest.raises(ValueError, match="does not snap"):
        additional_config(tmp_path / "edited")


def test_an_option_is_taken_out_in_either_spelling():
    assert _taken(["--a", "1", "--b", "2"], "--a") == ("1", ["--b", "2"])
    assert _taken(["--b", "2", "--a=1"], "--a") == ("1", ["--b", "2"])
    assert _taken(["--b"], "--a") == ("", ["--b"])


def test_our_endpoints_are_named_among_the_plugins_that_were_chosen():
    assert environment({"VLLM_PLUGINS": "one,two"})["VLLM_PLUGINS"] == "one,two,meg"
    assert environment({"VLLM_PLUGINS": ""})["VLLM_PLUGINS"] == "meg"
    assert "meg" in environment({})["VLLM_PLUGINS"].split(",")
    assert environment({"PATH": "x"})["PATH"] == "x"


def test_several_api_servers_are_refused(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="served by one API server"):
        command(folder, ["--api-server-count", "2"])
    with pytest.raises(ValueError, match="--additional-config is no JSON"):
        command(folder, ["--additional-config", "{"])


def test_vllm_that_is_not_installed_is_named(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="vLLM is not installed; run: pip install"):
        command(folder, [])


def test_unrelated_queries_stay_with_the_base_model(front_end):
    assert front_end.decide(UNRELATED) == [None] * len(UNRELATED)
