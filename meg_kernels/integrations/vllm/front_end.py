"""`FrontEnd`: decides in vLLM's front end which neuron a request has, and keeps caches apart by it.

It routes what waits, a batch at a time, in a thread of its own. What it decides travels with the
request as a salt of vLLM's prefix cache: a request has a neuron if and only if its cached blocks
are those of that neuron, on whatever way it comes. Each request has such a salt, also without a
neuron: one that comes without was not looked at, and is refused. Salts are made with a key that
nobody knows, so that no user can name another's.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from meg_kernels.conversation import ROLES, Message, Prompt
from meg_kernels.editing.prompting import PromptTemplate
from meg_kernels.routing.router import Router
from meg_kernels.texts import is_unicode

PREFIX = "meg-"  # of salts that are made here
KEPT = 1 << 16  # salts
AT_ONCE = 64, 1 << 16  # prompts, and characters of them, that are routed together
MOST_REQUESTS = 1 << 12  # whose neurons are noted before finished ones are forgotten
LATELY = 600.0  # seconds for which the neuron of a decision may still be asked for

Asked = Prompt | Sequence[int] | None
"""A text, a conversation, or token ids; None for what has no text."""


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
        requests: how many requests the engine was given.
        edited: how many of them have a neuron.
        opted_out: how many wanted the base model's answer in its place.
        by_fact: how many have the neuron of a fact, by its id.
        batches: in how many batches prompts were routed.
        largest: how many prompts the largest of them had.
        seconds: that routing took.
        reloads: how often what is edited was read again.
    """

    requests: int = 0
    edited: int = 0
    opted_out: int = 0
    by_fact: dict[str, int] = field(default_factory=dict)
    batches: int = 0
    largest: int = 0
    seconds: float = 0.0
    reloads: int = 0


class FrontEnd:
    """Routes prompts, and remembers what it decided by the salts that it gives.

    Args:
        router: of the edited model; no language model is needed.
        template: of the prompts in which queries were fitted: of one of those, the query is routed.

    Attributes:
        tokenizer: the language model's, by which token ids are read.
        running: tells the ids of the requests that the engine has not finished; None: nothing is
            read again, so that nobody needs to know.
    """

    running: Callable[[], Collection[str]] | None = None

    def __init__(self, router: Router, template: PromptTemplate):
        self.router, self.template = router, template
        self.tokenizer: Any = None
        self._key = secrets.token_bytes(32)
        self._salts: OrderedDict[str, Salted] = OrderedDict()
        self._given: dict[str, float] = {}  # neurons, and when they were given last
        self._requests: dict[str, str] = {}  # their neurons, by the ids of requests
        self._room = MOST_REQUESTS
        self._counts, self._lock = Counts(), threading.Lock()
        self._waiting: list[tuple[Asked, Future[str | None]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="meg-routing")

    def counted(self) -> Counts:
        """What it was asked so far."""
        with self._lock:
            return replace(self._counts, by_fact=dict(self._counts.by_fact))

    def count(self, request: str, neuron: str | None, is_off: bool) -> None:
        """Note a request that the engine is given.

        Args:
            request: its id.
            neuron: the id of the neuron that was decided on.
            is_off: whether the user wants the base model's answer in its place.
        """
        fact = None if neuron is None else self._fact(neuron)
        with self._lock:
            counts = self._counts
            counts.requests += 1
            counts.opted_out += is_off
            if neuron is None or is_off:
                return
            counts.edited += 1
            if fact is not None:
                counts.by_fact[fact] = counts.by_fact.get(fact, 0) + 1
            if self.running is not None:
                self._requests[request] = neuron
                if len(self._requests) > self._room:
                    self._forget_finished()
                    self._room = max(MOST_REQUESTS, 2 * len(self._requests))

    def _forget_finished(self) -> None:
        running = () if self.running is None else self.running()
        self._requests = {name: own for name, own in self._requests.items() if name in running}

    def _fact(self, neuron: str) -> str | None:
        edits = self.router.edits
        row = None if edits is None else edits.rows_of_neurons.get(neuron)
        return None if row is None or edits is None else edits.facts[row].id

    def put(self, router: Router) -> None:
        """Route by another router from now on; batches on their way finish with the old one."""
        with self._lock:
            self.router = router
            self._counts.reloads += 1

    def on_their_way(self) -> list[str]:
        """The ids of neurons that requests have, or will have that were decided on lately."""
        now = time.monotonic()
        with self._lock:
            self._forget_finished()
            self._given = {name: at for name, at in self._given.items() if now - at < LATELY}
            return sorted({*self._requests.values(), *self._given})

    # ---- deciding ----------------------------------------------------------------------------

    def decide(self, prompts: Sequence[Asked]) -> list[str | None]:
        """The id of each prompt's neuron; None where the base model answers."""
        futures = self._submitted(prompts)
        return [future.result() for future in futures]

    async def decide_async(self, prompts: Sequence[Asked]) -> list[str | None]:
        """The same, while the event loop goes on."""
        futures = self._submitted(prompts)
        return await asyncio.gather(*map(asyncio.wrap_future, futures))

    def _submitted(self, prompts: Sequence[Asked]) -> list[Future[str | None]]:
        futures: list[Future[str | None]] = [Future() for _ in prompts]
        with self._lock:
            self._waiting += zip(prompts, futures, strict=True)
        self._thread.submit(self._route_waiting)
        return futures

    def _route_waiting(self) -> None:
        """Route all that waits: what came while a batch was routed makes the next one."""
        while True:
            with self._lock:
                some, self._waiting = _first_of(self._waiting)
                router = self.router
            if not some:
                return
            some = [(p, future) for p, future in some if future.set_running_or_notify_cancel()]
            started = time.perf_counter()
            try:
                neurons = self._decided(router, [prompt for prompt, _ in some])
            except Exception as error:  # which the requests' own tasks raise
                for _, future in some:
                    future.set_exception(error)
                continue
            with self._lock:
                counts, now = self._counts, time.monotonic()
                counts.batches += bool(some)
                counts.largest = max(counts.largest, len(some))
                counts.seconds += time.perf_counter() - started
                self._given |= {name: now for name in neurons if name is not None}
            for (_, future), neuron in zip(some, neurons, strict=True):
                future.set_result(neuron)

    def _decided(self, router: Router, prompts: Sequence[Asked]) -> list[str | None]:
        texts = {place: text for place, p in enumerate(prompts) if (text := self._text(p))}
        found: list[str | None] = [None] * len(prompts)
        routing = router.route([*texts.values()])
        if routing.edits is not None:
            ids = routing.edits.neuron_ids
            accepted = zip(routing.accepted.tolist(), routing.fact.tolist(), strict=True)
            for place, (is_edited, fact) in zip(texts, accepted, strict=True):
                found[place] = ids[fact] if is_edited else None
        return found

    def _text(self, prompt: Asked) -> Prompt | None:
        """What is routed of a prompt; None where nothing is said."""
        said: Any = prompt
        if said and isinstance(said[0], int):
            if self.tokenizer is None or min(said) < 0 or max(said) >= len(self.tokenizer):
                return None  # which vLLM refuses
            said = self.tokenizer.decode(said, skip_special_tokens=True)
        if not said:
            return None
        texts = [said] if isinstance(said, str) else [message["content"] for message in said]
        if not texts[-1].strip() or not all(map(is_unicode, texts)):
            return None
        query = self.template.query(said) if isinstance(said, str) else None
        return said if query is None else query

    # ---- salts -------------------------------------------------------------------------------

    def salt(self, neuron: str | None, salt: str | None) -> str:
        """The salt under which a request's blocks are cached, by which `resolve` finds both.

        Args:
            neuron: the id of its neuron; None for none.
            salt: the user's own; None for none.
        """
        text = repr((neuron, salt)).encode("utf-8", "surrogatepass")
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
            ValueError: it is none of these, or is too old: what was asked was not looked at, and
                must not get the base model's answer for that.
        """
        with self._lock:
            found = self._salts.get(salt or "")
            if found is not None:
                self._salts.move_to_end(salt or "")
                if found.neuron is not None:
                    self._given[found.neuron] = time.monotonic()
        if found is None:
            raise ValueError(
                "an edited model is served, and this request was not looked at for edited "
                "questions; send it as text, messages or token ids to /v1/completions or "
                "/v1/chat/completions"
            )
        return found


def _first_of(
    waiting: list[tuple[Asked, Future[str | None]]],
) -> tuple[list[tuple[Asked, Future[str | None]]], list[tuple[Asked, Future[str | None]]]]:
    """What of it makes the next batch, at least one, and the others."""
    most, characters = AT_ONCE
    count = 0
    for prompt, _ in waiting[:most]:
        texts = [m["content"] for m in prompt if isinstance(m, dict)] if prompt else []
        characters -= sum(map(len, texts)) if texts else len(prompt or ())
        if count and characters < 0:
            break
        count += 1
    return waiting[:count], waiting[count:]


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
