"""/v1/meg and /v1/meg/reload, and Prometheus's counters of what was asked."""

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
from meg_kernels.integrations.vllm.workers import told_apart
from meg_kernels.routing.router import Router

TRIES = 3  # of a reload while another process changes the folder
PAUSE = 0.1  # seconds between looks whether the workers have read


class Endpoints:
    """vLLM's endpoint plugin of an edited model; `meg serve` names it in VLLM_PLUGINS.

    Its paths begin as those do that vLLM's --api-key guards.
    """

    name = "meg"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the routes."""
        routes = APIRouter(prefix="/v1/meg", tags=["meg"])
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
        front_end.running = lambda: engine_client.output_processor.external_req_ids
        # The folder may have changed since it was read here.
        served = {*await engine_client.collective_rpc("meg_served")}
        if served != {self._told_apart(front_end.router)}:
            await self.reload()
        REGISTRY.register(_Collector(front_end))

    @staticmethod
    def _told_apart(router: Router) -> str:
        return told_apart([] if router.edits is None else router.edits.neuron_ids)

    async def state(self, by_fact: bool = False) -> dict[str, Any]:
        """What is served, and what was asked so far."""
        counts = dataclasses.asdict(self.front_end.counted())
        if not by_fact:
            del counts["by_fact"]
        return {"folder": self.folder, "facts": len(self.front_end.router.edits or ()), **counts}

    async def reload(self) -> dict[str, Any]:
        """Read the folder again; requests that are on their way finish as they began."""
        started = time.perf_counter()
        async with self._reloading:
            for _ in range(TRIES):
                try:
                    router = await asyncio.to_thread(Router.from_pretrained, self.folder, "cpu")
                    ours = await asyncio.to_thread(self._told_apart, router)
                except (OSError, ValueError, RuntimeError) as error:
                    raise HTTPException(409, f"nothing was reloaded: {error}") from error
                # First the workers: nobody may be sent to a neuron that is not there.
                if {*await self._loaded()} == {ours}:
                    await self.engine.collective_rpc("meg_commit")
                    self.front_end.put(router)
                    seconds = time.perf_counter() - started
                    facts = len(router.edits or ())
                    return {"folder": self.folder, "facts": facts, "seconds": seconds}
        raise HTTPException(409, "the folder changed while it was read; nothing was reloaded")

    async def _loaded(self) -> list[str]:
        """Have all workers hold what the folder holds, beside what is served."""
        call = self.engine.collective_rpc
        try:
            await call("meg_read", args=(self.folder,))
            while not all(await call("meg_has_read")):
                await asyncio.sleep(PAUSE)
            return await call("meg_load", args=(self.front_end.on_their_way(),))
        except Exception as error:  # a worker's own comes as one of no class
            if getattr(self.engine, "errored", False):
                raise
            raise HTTPException(409, f"nothing was reloaded: {error}") from error


class _Collector:
    """What Prometheus reads; nothing is counted twice."""

    def __init__(self, front_end: FrontEnd):
        self.front_end = front_end

    def collect(self) -> Iterator[Any]:
        """The counters as they stand."""
        counts, edits = self.front_end.counted(), self.front_end.router.edits
        for name, value, what in (
            ("requests", counts.requests, "Requests that the engine was given."),
            ("edited_requests", counts.edited, "Of them, those with a neuron."),
            ("opted_out_requests", counts.opted_out, "Of them, those that wanted the base model."),
            ("reloads", counts.reloads, "Times that the edited model was read again."),
        ):
            yield CounterMetricFamily(f"meg_{name}", what, value=value)
        yield SummaryMetricFamily(
            "meg_routing_seconds", "Time of routing, by batches.", counts.batches, counts.seconds
        )
        yield GaugeMetricFamily("meg_facts", "Facts that are edited.", value=len(edits or ()))
