"""`NeuronTable`: the neurons of all facts on the device, and which of them each token has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from meg_kernels.neuron import NeuronLayout
from meg_kernels.routing.edits import Edits

SPARE = 1.25, 64  # times as many rows as facts, and so many more, for those that are added later
NO_ROW = -1


@dataclass(frozen=True)
class Loaded:
    """Neurons of edits, as a table takes them.

    Args:
        ids: what tells them from others, in the facts' order.
        flat: [N, layout.dim] float32, on the CPU.
        layout: theirs.
    """

    ids: list[str]
    flat: Tensor
    layout: NeuronLayout

    @classmethod
    def of(cls, edits: Edits) -> Loaded:
        """The neurons that queries of these facts are answered with."""
        made = edits.served_neurons(torch.arange(len(edits)))
        return cls(edits.neuron_ids, edits.layout.pack(made).cpu(), edits.layout)


class NeuronTable(nn.Module):
    """Neurons by their rows, at addresses that never change, as CUDA graphs want it.

    Requests name their neuron by its id. What is loaded later takes other rows: those of neurons
    that are neither served nor on their way only where there is no other, the oldest first.

    Args:
        layout: of the neurons.
        rows: how many there is room for.
        tokens: how many a batch may have.
        dtype: of the neurons.
        device: where they are.
    """

    key: Tensor
    bias: Tensor | None
    value: Tensor
    token_rows: Tensor

    def __init__(
        self,
        layout: NeuronLayout,
        rows: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.activation, self.layout = layout.activation, layout

        def buffer(name: str, tensor: Tensor | None) -> None:
            self.register_buffer(name, tensor, persistent=False)  # no part of a checkpoint

        buffer("key", torch.zeros(rows, layout.d_in, dtype=dtype, device=device))
        has_bias = layout.has_bias
        buffer("bias", torch.zeros(rows, dtype=dtype, device=device) if has_bias else None)
        buffer("value", torch.zeros(rows, layout.d_out, dtype=dtype, device=device))
        buffer("token_rows", torch.full((tokens,), NO_ROW, dtype=torch.int64, device=device))
        self._rows: dict[str, int] = {}  # by the ids of neurons
        self.served: frozenset[str] = frozenset()  # those of them that requests are sent to

    @classmethod
    def for_edits(
        cls, edits: Edits, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> NeuronTable:
        """One with room for these and some more, without neurons yet."""
        times, more = SPARE
        rows = int(times * len(edits)) + more
        return cls(edits.layout, rows, tokens, dtype, device)

    @torch.no_grad()
    def load(self, loaded: Loaded, keep: Collection[str] = ()) -> frozenset[str]:
        """Hold these neurons beside those that are served; rows of those that stay do not change.

        Args:
            loaded: ids and neurons.
            keep: ids of neurons that requests on their way may have, whose rows are not taken.

        Returns:
            The ids, for `commit`.

        Raises:
            ValueError: there is no room for them, or they are of another layout; nothing changed.
        """
        if loaded.layout != self.layout:
            raise ValueError(f"the neurons are {loaded.layout}; those served are {self.layout}")
        wanted = {name: place for place, name in enumerate(loaded.ids)}
        new = {name: place for name, place in wanted.items() if name not in self._rows}
        needed = {*wanted, *self.served, *keep}
        gone = [name for name in self._rows if name not in needed]  # the oldest first
        free = sorted({*range(len(self.key))} - {*self._rows.values()})
        if len(new) > len(free) + len(gone):
            raise ValueError(
                f"{len(new)} further neurons do not fit into the {len(free) + len(gone)} rows that "
                f"are free of {len(self.key)}; start vLLM again to serve them (a generator that "
                "was trained again makes all neurons anew)"
            )
        free += [self._rows.pop(name) for name in gone[: max(len(new) - len(free), 0)]]
        if new:
            places = torch.tensor([*new.values()], device=loaded.flat.device)
            neurons = self.layout.unpack(loaded.flat[places])
            where = torch.tensor(free[: len(new)], device=self.key.device)
            self.key[where] = neurons.key.to(self.key)
            self.value[where] = neurons.value.to(self.value)
            if self.bias is not None and neurons.bias is not None:
                self.bias[where] = neurons.bias.to(self.bias)
        self._rows |= dict(zip(new, free, strict=False))
        return frozenset(wanted)

    def commit(self, ids: frozenset[str]) -> None:
        """From now on these neurons are served, which were loaded; others may make room."""
        self.served = ids

    def row(self, name: str | None) -> int:
        """The row of the neuron with this id; -1 for none.

        Raises:
            RuntimeError: there is none; the base model must not answer in its place.
        """
        if name is None:
            return NO_ROW
        if (row := self._rows.get(name)) is None:
            raise RuntimeError(
                f"the neuron {name} of a request is not in the table: the edited folder changed "
                "while vLLM started; start it again"
            )
        return row

    def put(self, rows: Sequence[int], counts: Iterable[int], padded: int) -> None:
        """Say on the host which rows the next batch's tokens have.

        Args:
            rows: of each request.
            counts: how many tokens of each come next to each other.
            padded: how many tokens the batch has with its padding.
        """
        of_tokens = np.full(padded, NO_ROW, dtype=np.int64)
        spread = np.repeat(np.asarray(rows, dtype=np.int64), np.asarray(counts))
        of_tokens[: len(spread)] = spread
        self.token_rows[:padded].copy_(torch.from_numpy(of_tokens), non_blocking=True)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Add each token's neuron, which reads x, to y, the layer's output [..., tokens, d_out]."""
        flat = x.reshape(-1, x.shape[-1])
        added = torch.ops.meg_kernels.dynamic_neuron(
            y.reshape(-1, y.shape[-1]),
            flat,
            self.key,
            self.bias,
            self.value,
            self.token_rows[: flat.shape[0]],
            self.activation,
        )
        return added.view(y.shape)

    def _apply(self, fn: Any, recurse: bool = True) -> NeuronTable:
        # The model may be moved or cast as a whole; a number of a row stays one.
        rows = self.token_rows
        super()._apply(fn, recurse)
        self.token_rows = rows.to(self.key.device)
        return self
