"""`FrontEnd`: decides in vLLM's front end which neuron a request has, and keeps caches apart by it.

It routes what waits, a batch at a time, in a thread of its own. What it decides travels with the
request as a salt of vLLM's prefix cache: a request has a neuron if and only if its cached blocks
are those of that neuron, on whatever way it comes. Salts are made with a key that nobody knows, so
that no user can name another's.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from meg_kernels.conversation import ROLES, Message, Prompt
from meg_kernels.editing.prompting import PromptTemplate
from meg_kernels.routing.router import Router
from meg_kernels.texts import is_unicode

PREFIX = "meg-"  # of salts that are made here
KEPT = 1 << 16  # salts
AT_ONCE = 64  # prompts that are routed together


@dataclass(frozen=True)
class Salted:
    """What a salt stands for.

    Args:
        neuron: the id of a neuron; None: the base model answers.
        salt: the user's own, if there was one.
    """

    neuron: str | None
    salt: str | None


@dataclass
class Counts:
    """What a front end was asked, since it started.

    Args:
        requests: how many prompts were routed.
        edited: how many of them have a neuron.
        opted_out: how many requests wanted the base model's answer.
        batches: in how many batches they were routed.
        largest: how many prompts the largest of them had.
        seconds: that routing took.
        reloads: how often what is edited was read again.
        by_fact: how many prompts had the neuron of a fact, by its id.
    """

    requests: int = 0
    edited: int = 0
    opted_out: int = 0
    batches: int = 0
    largest: int = 0
    seconds: float = 0.0
    reloads: int = 0
    by_fact: dict[str, int] = field(default_factory=dict)


class FrontEnd:
    """Routes prompts, and remembers what it decided by the salts that it gives.

    Args:
        router: of the edited model; no language model is needed.
        template: of the prompts in which queries were fitted: of one of those, the query is routed.

    Attributes:
        counts: what it was asked; read it with `counted`.
    """

    def __init__(self, router: Router, template: PromptTemplate):
        self.router, self.template = router, template
        self._key = secrets.token_bytes(32)
        self._salts: OrderedDict[str, Salted] = OrderedDict()
        self._counts, self._lock = Counts(), threading.Lock()
        self._waiting: list[tuple[Prompt, Future[str | None]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="meg-routing")

    def counted(self) -> Counts:
        """What it was asked so far."""
        with self._lock:
            return replace(self._counts, by_fact=dict(self._counts.by_fact))

    def put(self, router: Router) -> None:
        """Route by another router from now on; batches on their way finish with the old one."""
        with self._lock:
            self.router = router
            self._counts.reloads += 1

    # ---- deciding ----------------------------------------------------------------------------

    def decide(self, prompts: Sequence[Prompt | None]) -> list[str | None]:
        """The id of each prompt's neuron; None where the base model answers.

        Args:
            prompts: texts and conversations; None for what has no text.
        """
        futures = self._submitted(prompts)
        return [future.result() for future in futures]

    async def decide_async(self, prompts: Sequence[Prompt | None]) -> list[str | None]:
        """The same, while the event loop goes on."""
        futures = self._submitted(prompts)
        return await asyncio.gather(*map(asyncio.wrap_future, futures))

    def _submitted(self, prompts: Sequence[Prompt | None]) -> list[Future[str | None]]:
        futures: list[Future[str | None]] = [Future() for _ in prompts]
        with self._lock:
            self._waiting += [
                (prompt, future)
                for prompt, future in zip(prompts, futures, strict=True)
                if prompt is not None and _is_text(prompt)
            ]
        for prompt, future in zip(prompts, futures, strict=True):
            if prompt is None or not _is_text(prompt):
                future.set_result(None)
        self._thread.submit(self._route_waiting)
        return futures

    def _route_waiting(self) -> None:
        """Route all that waits: what came while a batch was routed makes the next one."""
        while True:
            with self._lock:
                some, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
                router = self.router
            if not some:
                return
            some = [(p, future) for p, future in some if future.set_running_or_notify_cancel()]
            started = time.perf_counter()
            try:
                found = _decided(router, [self._asked(prompt) for prompt, _ in some])
            except Exception as error:  # which the requests' own tasks raise
                for _, future in some:
                    future.set_exception(error)
                continue
            self._count(found, time.perf_counter() - started)
            for (_, future), (neuron, _) in zip(some, found, strict=True):
                future.set_result(neuron)

    def _asked(self, prompt: Prompt) -> Prompt:
        query = self.template.query(prompt) if isinstance(prompt, str) else None
        return prompt if query is None else query

    def _count(self, found: list[tuple[str | None, str]], seconds: float) -> None:
        with self._lock:
            counts = self._counts
            counts.requests += len(found)
            counts.edited += sum(neuron is not None for neuron, _ in found)
            counts.batches += bool(found)
            counts.largest = max(counts.largest, len(found))
            counts.seconds += seconds
            for neuron, fact in found:
                if neuron is not None:
                    counts.by_fact[fact] = counts.by_fact.get(fact, 0) + 1

    # ---- salts -------------------------------------------------------------------------------

    def salt(self, neuron: str | None, salt: str | None) -> str | None:
        """The salt under which a request's blocks are cached.

        Args:
            neuron: the id of its neuron; None for none.
            salt: the user's own; None for none.

        Returns:
            What `resolve` finds both by; the user's own where there is no neuron and it could not
            be taken for one of these.
        """
        if neuron is None and not (salt or "").startswith(PREFIX):
            return salt
        text = f"{neuron or ''}\0{salt or ''}".encode()
        made = PREFIX + hmac.new(self._key, text, hashlib.sha256).hexdigest()
        with self._lock:
            self._salts[made] = Salted(neuron, salt)
            self._salts.move_to_end(made)
            while len(self._salts) > KEPT:
                self._salts.popitem(last=False)
        return made

    def resolve(self, salt: str | None) -> Salted:
        """What a salt stands for.

        Raises:
            ValueError: it looks like one of these, and is none, or is too old: whoever sends it
                must not get the base model's answer from another's cache.
        """
        if not (salt or "").startswith(PREFIX):
            return Salted(None, salt)
        with self._lock:
            found = self._salts.get(salt or "")
            if found is not None:
                self._salts.move_to_end(salt or "")
        if found is None:
            raise ValueError(
                f"cache_salt begins with {PREFIX!r}, which no user's may; send another"
            )
        return found

    def opted_out(self) -> None:
        """Count a request that wants the base model's answer."""
        with self._lock:
            self._counts.opted_out += 1


def _decided(router: Router, prompts: list[Prompt]) -> list[tuple[str | None, str]]:
    """For each prompt the id of its neuron, if it has one, and of the fact nearest to it."""
    routing = router.route(prompts) if prompts else None
    if routing is None or routing.edits is None:
        return [(None, "")] * len(prompts)
    ids, facts = routing.edits.neuron_ids, routing.edits.facts
    return [
        (ids[fact] if accepted else None, facts[fact].id)
        for accepted, fact in zip(routing.accepted.tolist(), routing.fact.tolist(), strict=True)
    ]


def _is_text(prompt: Prompt) -> bool:
    texts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
    return bool(texts[-1].strip()) and all(map(is_unicode, texts))


def conversation(messages: Sequence[Any]) -> list[Message] | None:
    """OpenAI's messages as a conversation; None if it does not end with what the user says.

    Args:
        messages: of any roles, whose content is text or a list of parts; of these, texts count.
    """
    found = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list | tuple):
            texts = [part if isinstance(part, str) else part.get("text") for part in content]
            content = "\n".join(text for text in texts if isinstance(text, str))
        if role in ROLES and isinstance(content, str):
            found.append({"role": role, "content": content})
    is_asked = bool(messages) and messages[-1].get("role") == "user" and bool(found)
    return found if is_asked and found[-1]["role"] == "user" else None
