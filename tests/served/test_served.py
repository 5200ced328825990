"""`meg serve`: vLLM's OpenAI server answers each request as transformers does with its neuron."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

import httpx
import tiny
import torch
from oracle import MOST, Oracle

from meg_kernels import Fact, MeGEditor

BASE_PROMPTS = [f"Q: {query}\nA:" for query in tiny.ELSEWHERE]
TEXTS = [f"Q: {query}\nA:" for query in [*tiny.QUERIES, *tiny.PARAPHRASES]] + BASE_PROMPTS
CHATS = [[{"role": "user", "content": query}] for query in [*tiny.QUERIES, *tiny.ELSEWHERE]]
# A long beginning, which fills blocks of the cache, before the same question.
LONG = "Sing a song\n" * 12 + tiny.QUERIES[0]
# Small enough to make requests wait, be cut into chunks, and give way to others.
OPTIONS = [
    *("--enforce-eager", "--enable-prefix-caching", "--block-size", "32"),
    *("--max-model-len", "192", "--max-num-seqs", "8", "--max-num-batched-tokens", "48"),
    *("--num-gpu-blocks-override", "7"),
]
START = 300  # seconds, at most, on a busy machine


class Server:
    """`meg serve` in a process of its own."""

    def __init__(self, folder: Path, log: Path, options=OPTIONS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.url = log, f"http://127.0.0.1:{self.port}"
        arguments = ["serve", folder, "--host", "127.0.0.1", "--port", self.port, *options]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "meg_kernels.cli", *map(str, arguments)],
                stdout=output,
                stderr=output,
                env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )

    def wait(self) -> Server:
        end = time.monotonic() + START
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            except httpx.HTTPError:
                time.sleep(0.5)
        self.stop()
        pytest.fail(f"vLLM did not start:\n{self.log.read_text()[-6000:]}")

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def metric(self, name: str) -> float:
        found = re.findall(
            rf"^{name}(?:_total)?(?:{{.*}})? (\S+)$", self.get("/metrics").text, re.M
        )
        return sum(map(float, found))


@pytest.fixture(scope="module")
def server(edited, tmp_path_factory):
    server = Server(edited, tmp_path_factory.mktemp("log") / "vllm.log").wait()
    yield server
    server.stop()


async def answered(client: httpx.AsyncClient, prompt, **more):
    """What the server says to a text, a list of token ids, or a conversation."""
    is_chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    asked = {"messages": prompt} if is_chat else {"prompt": prompt}
    body = {"model": "edited", "temperature": 0, "max_tokens": MOST, **asked, **more}
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    if more.get("stream"):
        parts = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
        choices = [choice for part in parts for choice in json.loads(part)["choices"]]
        return "".join((c["delta"].get("content") or "") if is_chat else c["text"] for c in choices)
    said = [c["message"]["content"] if is_chat else c["text"] for c in response.json()["choices"]]
    return said[0] if len(said) == 1 else said


def ask(server: Server, *requests):
    """All at once; each a prompt and further fields of its body."""

    async def all_of_them():
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=240, limits=limits) as client:
            return await asyncio.gather(*(answered(client, p, **more) for p, more in requests))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [TEXTS, CHATS], ids=["completions", "chat"])
def test_each_request_is_answered_with_its_own_neuron(server, oracle, prompts, stream):
    expected = [oracle(prompt) for prompt in prompts]
    assert expected[: len(tiny.QUERIES)] != [oracle(p, False) for p in prompts[: len(tiny.QUERIES)]]
    for _ in range(2):  # and again from the cache
        assert ask(server, *((prompt, {"stream": stream}) for prompt in prompts)) == expected
    ours = server.get("/v1/meg").json()
    assert ours["largest"] > 1 and 0 < ours["edited"] < ours["requests"]
    assert server.get("/v1/models").json()["data"][0]["id"] == "edited"


def test_tokens_lists_and_several_answers_have_the_neuron_as_well(server, oracle, editor):
    text = TEXTS[0]
    ids = editor.tokenizer(text).input_ids
    expected, other = oracle(text), oracle(TEXTS[1])
    three = {"n": 3, "temperature": 1, "top_k": 1}  # which is greedy, but vLLM lets it
    found = ask(server, (ids, {}), ([text, TEXTS[1]], {}), (text, three), (CHATS[0], three))
    assert found == [expected, [expected, other], [expected] * 3, [oracle(CHATS[0])] * 3]
    # vLLM's beams have no vllm_xargs, so that who searches so cannot do without the neuron.
    changed = next(text for text in TEXTS if oracle(text) != oracle(text, False))
    [beams] = ask(server, (changed, {"use_beam_search": True, "n": 2}))
    assert beams[0] == oracle(changed)


def test_parts_of_a_message_and_earlier_turns_are_seen_as_the_editor_sees_them(server, oracle):
    parts = [{"role": "user", "content": [{"type": "text", "text": tiny.QUERIES[0]}]}]
    turns = [*CHATS[0], {"role": "assistant", "content": "red"}, *CHATS[1]]
    system = [{"role": "system", "content": "Sing a song"}, *CHATS[0]]
    found = ask(server, (parts, {}), (turns, {}), (system, {}))
    assert found == [oracle(CHATS[0]), oracle(turns), oracle(system)]


def test_a_request_can_do_without_its_neuron_and_choose_nothing_else(server, oracle):
    off, on = {"vllm_xargs": {"meg": "off"}}, {"vllm_xargs": {"meg": "on"}}
    text = next(text for text in TEXTS if oracle(text) != oracle(text, False))
    before = server.get("/v1/meg").json()["opted_out"]
    assert ask(server, (text, off), (text, on)) == [oracle(text, False), oracle(text)]
    assert server.get("/v1/meg").json()["opted_out"] == before + 1
    url, body = f"{server.url}/v1/completions", {"model": "edited", "prompt": text}
    wrong = httpx.post(url, json={**body, "vllm_xargs": {"meg": "maybe"}}, timeout=60)
    assert wrong.status_code == 400 and "must be 'on' or 'off'" in wrong.text


def test_the_cache_serves_no_tokens_of_another_neuron(server, oracle):
    off = {"vllm_xargs": {"meg": "off"}}
    edited, base = oracle(LONG), oracle(LONG, False)
    assert edited != base
    hits = server.metric("vllm:prefix_cache_hits")
    for first, second in ((({}, edited), (off, base)), ((off, base), ({}, edited))):
        for more, expected in (first, second, first, second):
            assert ask(server, (LONG, more)) == [expected]
    assert server.metric("vllm:prefix_cache_hits") > hits


def test_a_users_salt_keeps_its_caches_apart_and_forges_none(server, oracle):
    edited, base = oracle(LONG), oracle(LONG, False)
    off = {"vllm_xargs": {"meg": "off"}}
    for salt in ("mine", "meg-", "meg-" + "0" * 64):
        for more, expected in (({}, edited), (off, base), ({}, edited)):
            assert ask(server, (LONG, {"cache_salt": salt, **more})) == [expected]
    hits = server.metric("vllm:prefix_cache_hits")
    ask(server, (LONG, {"cache_salt": "never seen before"}))
    assert server.metric("vllm:prefix_cache_hits") == hits  # of that salt, nothing is there yet


def test_a_user_cannot_name_a_neuron(server, oracle, editor):
    text = next(text for text in TEXTS if oracle(text) != oracle(text, False))
    name = editor.edits.neuron_ids[TEXTS.index(text) % len(editor.facts)]
    forged = {"vllm_xargs": {"meg_neuron": name, "meg": "off"}}
    assert ask(server, (text, forged)) == [oracle(text, False)]


def test_a_route_on_which_nobody_looks_at_what_is_asked_is_refused(server, editor):
    ids = editor.tokenizer(TEXTS[0]).input_ids
    body = {
        "model": "edited",
        "messages": CHATS[0],
        "kv_transfer_params": {"prompt_token_ids": ids},
    }
    said = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert said.status_code == 400 and "was not looked at" in said.text


def test_the_server_answers_others_while_many_are_routed(server):
    async def load():
        async with httpx.AsyncClient(base_url=server.url, timeout=240) as client:
            asked = [asyncio.ensure_future(answered(client, text)) for text in TEXTS * 3]
            for _ in range(5):
                assert (await client.get("/health")).status_code == 200
            return await asyncio.gather(*asked)

    assert len(asyncio.run(load())) == 3 * len(TEXTS)


def test_a_load_with_aborts_and_preemptions_leaves_every_answer_right(server, oracle):
    draw = random.Random(0)
    prompts = [draw.choice([*TEXTS, *CHATS]) for _ in range(64)]
    expected = [oracle(prompt, most=40) for prompt in prompts]

    async def one(client, number, prompt):
        more = {"stream": draw.random() < 0.5, "max_tokens": 40}
        task = asyncio.ensure_future(answered(client, prompt, **more))
        if number % 5 == 0:  # gone after a while
            await asyncio.sleep(draw.random())
            task.cancel()
            return None
        return await task

    async def load():
        async with httpx.AsyncClient(
            base_url=server.url, timeout=240, limits=httpx.Limits(max_connections=64)
        ) as client:
            return await asyncio.gather(*(one(client, n, p) for n, p in enumerate(prompts)))

    found = asyncio.run(load())
    wrong = [n for n, said in enumerate(found) if said is not None and said != expected[n]]
    assert not wrong
    assert server.metric("vllm:num_preemptions") > 0
    assert ask(server, *((prompt, {}) for prompt in TEXTS)) == [oracle(p) for p in TEXTS]
    assert server.metric("vllm:num_requests_running") == 0


def test_counters_are_in_the_metrics_and_facts_are_counted_if_asked_for(server, editor):
    ask(server, (TEXTS[0], {}))
    assert server.metric("meg_facts") == len(editor.edits)
    counts = server.get("/v1/meg?by_fact=true").json()
    assert counts["by_fact"][editor.facts[0].id] > 0
    assert server.metric("meg_edited_requests") == counts["edited"]
    assert server.metric("meg_routing_seconds_sum") == pytest.approx(counts["seconds"])


def test_facts_that_are_added_are_served_after_a_reload_and_no_request_is_dropped(
    server, edited, editor, oracle
):
    text, new = TEXTS[0], tiny.FURTHER[0]
    question = f"Q: {new.query}\nA:"
    before, first = oracle(text), oracle(question)
    assert ask(server, (question, {})) == [first]
    changed = MeGEditor.from_pretrained(edited, device="cpu")
    changed.add(tiny.FURTHER)
    changed.save_pretrained(edited)
    after = Oracle(changed)(question)
    assert new.answer in after and new.answer not in first

    async def load():
        async with httpx.AsyncClient(base_url=server.url, timeout=240) as client:
            asked = [asyncio.ensure_future(answered(client, text)) for _ in range(24)]
            await asyncio.sleep(0.05)
            said = await client.post("/v1/meg/reload")
            assert said.status_code == 200, said.text
            asked += [asyncio.ensure_future(answered(client, question)) for _ in range(8)]
            return said.json(), await asyncio.gather(*asked)

    reloaded, found = asyncio.run(load())
    assert reloaded["facts"] == len(changed.facts)
    assert found == [before] * 24 + [after] * 8
    changed.remove(tiny.FURTHER)
    changed.save_pretrained(edited)
    assert httpx.post(f"{server.url}/v1/meg/reload", timeout=60).json()["facts"] == len(
        editor.facts
    )
    assert ask(server, (question, {}), (text, {})) == [first, before]


def test_more_facts_than_there_is_room_for_are_refused(server, edited, editor, oracle):
    changed = MeGEditor.from_pretrained(edited, device="cpu")
    edits = changed.edits
    facts = [Fact(f"The color of {n} is", "red", f"more-{n}") for n in range(80)]
    neurons = edits.neurons[torch.arange(80) % len(edits)]
    unlike = dataclasses.replace(neurons, value=neurons.value + torch.arange(80.0).unsqueeze(1))
    conditions = torch.nn.functional.normalize(torch.randn(80, edits.conditions.shape[1]), dim=1)
    changed.router.edits = edits.joined(facts, conditions, unlike)
    changed.save_pretrained(edited)
    try:
        said = httpx.post(f"{server.url}/v1/meg/reload", timeout=60)
        assert said.status_code == 409 and "do not fit into" in said.text
        assert ask(server, (TEXTS[0], {})) == [oracle(TEXTS[0])]
        assert server.get("/v1/meg").json()["facts"] == len(editor.facts)
    finally:
        changed.remove([fact.id for fact in facts])
        changed.save_pretrained(edited)


def test_a_folder_that_cannot_be_read_is_not_served(server, edited, oracle):
    manifest = edited / "meg.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(b"{")
    try:
        said = httpx.post(f"{server.url}/v1/meg/reload", timeout=60)
        assert said.status_code == 409 and "nothing was reloaded" in said.text
    finally:
        manifest.write_bytes(whole)
    assert ask(server, (TEXTS[0], {})) == [oracle(TEXTS[0])]
