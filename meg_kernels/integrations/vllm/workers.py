"""Which token of a batch has which row of the table, in both of vLLM's model runners.

A request names its neuron in `SamplingParams.extra_args`; the front end puts it there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from meg_kernels.integrations.vllm.table import NO_ROW, Loaded, NeuronTable
from meg_kernels.routing.saving import load_edits
from meg_kernels.storage import fingerprint

NEURON = "meg_neuron"  # in extra_args: the id of the request's neuron


def neuron_of(sampling_params: Any) -> str | None:
    """The id of the neuron of a request with these parameters; None if it has none."""
    extra = None if sampling_params is None else sampling_params.extra_args
    return None if extra is None else extra.get(NEURON)


def table_of(model: Any) -> NeuronTable | None:
    """The table that a model was given; None if it serves no edits."""
    model = getattr(model, "unwrap", lambda: model)()  # of a CUDA graph's wrapper
    return getattr(model, "neuron_table", None)


def fill_in_runner() -> None:
    """Have vLLM's first model runner say before each batch which row its tokens have; once."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    own = GPUModelRunner._preprocess
    if getattr(own, "fills", False):
        return

    @functools.wraps(own)
    def preprocess(self: Any, scheduled: Any, padded: int, *rest: Any, **more: Any) -> Any:
        table = table_of(self.model)
        if table is not None:
            ids, counts = self.input_batch.req_ids, scheduled.num_scheduled_tokens
            rows = [table.row(neuron_of(self.requests[name].sampling_params)) for name in ids]
            table.put(rows, [counts[name] for name in ids], padded)
        return own(self, scheduled, padded, *rest, **more)

    preprocess.fills = True  # type: ignore[attr-defined]
    GPUModelRunner._preprocess = preprocess


@functools.cache
def model_state() -> type:
    """The state of a model with neurons for vLLM's second model runner."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class NeuronState(DefaultModelState):
        """Keeps the row of each request on the device, and spreads it over the batch's tokens."""

        def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any):
            super().__init__(vllm_config, model, encoder_cache, device)
            found = table_of(model)
            assert found is not None
            self.table = found
            self.rows = torch.full((self.max_num_reqs,), NO_ROW, device=device)
            self.in_use: dict[str, str | None] = {}  # by the ids of requests

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            name = neuron_of(new_req_data.sampling_params)
            self.rows[req_index] = self.table.row(name)
            self.in_use[new_req_data.req_id] = name

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self.in_use.pop(req_id, None)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            n, padded = input_batch.num_tokens, input_batch.num_tokens_after_padding
            starts = input_batch.query_start_loc[: input_batch.num_reqs + 1]
            of_requests = self.rows[input_batch.idx_mapping[: input_batch.num_reqs]]
            # All on the device: its counts may be below those that the host planned with.
            self.table.token_rows[:n] = torch.repeat_interleave(
                of_requests, starts.diff(), output_size=n
            )
            self.table.token_rows[n:padded] = NO_ROW
            return super().prepare_inputs(input_batch, req_states)

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
            self.table.token_rows[:num_tokens] = NO_ROW
            return super().prepare_dummy_inputs(num_reqs, num_tokens)

    return NeuronState


class WorkerExtension:
    """What `meg serve` adds to vLLM's workers; `collective_rpc` calls it in each of them.

    Another state of the folder is read in a thread, while tokens are generated; then it is put
    beside what is served, in all workers; and when all have it, it takes its place.
    """

    _meg_reading: Future[Loaded] | None = None

    def meg_read(self, folder: str) -> None:
        """Begin to read what a folder holds now."""
        reader = ThreadPoolExecutor(1, thread_name_prefix="meg-reading")
        self._meg_reading = reader.submit(lambda: Loaded.of(load_edits(folder, "cpu").edits))
        reader.shutdown(wait=False)

    def meg_has_read(self) -> bool:
        """Whether it is read; an error is raised by `meg_load`."""
        assert self._meg_reading is not None
        return self._meg_reading.done()

    def meg_load(self, keep: list[str]) -> str:
        """Put what was read beside what is served.

        Args:
            keep: ids of neurons that requests on their way may have.

        Returns:
            What tells these neurons from others.

        Raises:
            ValueError: they do not fit; nothing changed.
        """
        assert self._meg_reading is not None
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        state = getattr(runner, "model_state", None)
        if state is not None:
            in_use = {*state.in_use.values()}
        else:
            in_use = {neuron_of(request.sampling_params) for request in runner.requests.values()}
        table = _table(runner)
        self._meg_next = table.load(self._meg_reading.result(), {*keep, *(in_use - {None})})
        return told_apart(self._meg_next)

    def meg_commit(self) -> None:
        """Serve what was loaded."""
        _table(self.model_runner).commit(self._meg_next)  # type: ignore[attr-defined]

    def meg_served(self) -> str:
        """What tells the neurons that are served from others."""
        return told_apart(_table(self.model_runner).served)  # type: ignore[attr-defined]


def told_apart(ids: Iterable[str]) -> str:
    """What tells these neurons from others, whatever their order."""
    return fingerprint(sorted(ids))


def _table(runner: Any) -> NeuronTable:
    table = table_of(runner.model)
    if table is None:
        raise RuntimeError("this worker serves no edited model")
    return table
