"""/meg and /meg/reload, and Prometheus's counters of what was asked."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, HTTPException
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

from meg_kernels.integrations.vllm.front_end import FrontEnd
from meg_kernels.integrations.vllm.workers import served
from meg_kernels.routing.router import Router
from meg_kernels.storage import CorruptFileError

TRIES = 3  # of a reload while another process changes the folder


class Endpoints:
    """vLLM's endpoint plugin of an edited model; `meg serve` names it in VLLM_PLUGINS."""

    name = "meg"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the routes."""
        routes = APIRouter(prefix="/meg", tags=["meg"])
        routes.add_api_route("", self.state, methods=["GET"])
        routes.add_api_route("/reload", self.reload, methods=["POST"])
        app.include_router(routes)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Take the engine, and count from now on.

        Raises:
            RuntimeError: the engine serves no edited model.
        """
        self.engine = engine_client
        front_end = getattr(engine_client.renderer, "meg", None)
        if front_end is None:
            raise RuntimeError("vLLM serves no edited model; start it with meg serve FOLDER")
        self.front_end: FrontEnd = front_end
        self.folder = engine_client.vllm_config.additional_config["meg"]["edited"]
        self._reloading = asyncio.Lock()
        await self._check_same()
        REGISTRY.register(_Collector(front_end))

    async def _check_same(self) -> None:
        edits = self.front_end.router.edits
        states = await self.engine.collective_rpc("meg_state")
        facts = 0 if edits is None else len(edits)
        if any(state["facts"] != facts for state in states):
            await self.reload()

    async def state(self, by_fact: bool = False) -> dict[str, Any]:
        """What is served, and what was asked so far."""
        counts = dataclasses.asdict(self.front_end.counted())
        if not by_fact:
            del counts["by_fact"]
        edits = self.front_end.router.edits
        facts = 0 if edits is None else len(edits)
        return {"folder": self.folder, "facts": facts, **counts}

    async def reload(self) -> dict[str, Any]:
        """Read the folder again; requests that are on their way finish as they began."""
        started = time.perf_counter()
        async with self._reloading:
            for _ in range(TRIES):
                try:
                    router = await asyncio.to_thread(Router.from_pretrained, self.folder, "cpu")
                    edits = router.edits
                    ids = [] if edits is None else await asyncio.to_thread(_ids, router)
                    # First the workers: nobody may be sent to a neuron that is not there.
                    loaded = await self.engine.collective_rpc("meg_load", args=(self.folder,))
                except (CorruptFileError, OSError, ValueError, RuntimeError) as error:
                    raise HTTPException(409, f"nothing was reloaded: {error}") from error
                if {*loaded} == {served(ids)}:
                    self.front_end.put(router)
                    seconds = time.perf_counter() - started
                    return {"folder": self.folder, "facts": len(ids), "seconds": seconds}
        raise HTTPException(409, "the folder changed while it was read; nothing was reloaded")


def _ids(router: Router) -> list[str]:
    assert router.edits is not None
    return router.edits.neuron_ids


class _Collector:
    """What Prometheus reads; nothing is counted twice."""

    def __init__(self, front_end: FrontEnd):
        self.front_end = front_end

    def collect(self) -> Iterator[Any]:
        """The counters as they stand."""
        counts, edits = self.front_end.counted(), self.front_end.router.edits
        for name, value, what in (
            ("requests", counts.requests, "Prompts that were routed."),
            ("edited_requests", counts.edited, "Of them, those taken for edited ones."),
            ("opted_out_requests", counts.opted_out, "Requests for the base model's answer."),
            ("reloads", counts.reloads, "Times that the edited model was read again."),
        ):
            yield CounterMetricFamily(f"meg_{name}", what, value=value)
        yield SummaryMetricFamily(
            "meg_routing_seconds", "Time of routing, by batches.", counts.batches, counts.seconds
        )
        facts = 0 if edits is None else len(edits)
        yield GaugeMetricFamily("meg_facts", "Facts that are edited.", value=facts)
