"""Neurons in their place: what is mounted for whom, and how it is added to a layer's output.

A `Place` belongs to a layer. What is mounted there follows the call: a thread or asyncio task that
mounts neurons has them in its own calls of the model, and no other one has.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from meg_kernels.checks import shown
from meg_kernels.neuron import Neurons
from meg_kernels.ops.dynamic_neuron import check_index, dynamic_neuron, dynamic_neuron_
from meg_kernels.scoped import held, holding, is_traced


class _Copies(threading.local):
    """How many rows each sample has, in the calls of one thread."""

    number: int = 1

    def __reduce__(self) -> Any:
        return _Copies, ()


@dataclass
class Mounted:
    """Neurons that a layer carries, and the row of the batch that each of them belongs to.

    Args:
        neurons: N neurons.
        index: int64 [samples]: each sample's neuron, -1 for none.
        copies: rows that a sample may also have, because `generate` repeats each of them for its
            beams or return sequences.
    """

    neurons: Neurons
    index: Tensor
    copies: _Copies = field(default_factory=_Copies)

    @classmethod
    def at(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        neurons: Neurons,
        index: Tensor | Sequence[int] | None,
    ) -> Mounted:
        """`neurons` on that device and in that dtype.

        Raises:
            TypeError: `index` holds no numbers.
            ValueError: they are not those of these neurons.
        """
        if index is None:
            index = torch.arange(len(neurons))
        elif not isinstance(index, Tensor):
            try:
                index = torch.tensor(index) if len(index) else torch.zeros(0, dtype=torch.int64)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"index is {shown(index)}; it must be a list of neuron numbers (-1 for none), "
                    "such as [0, -1]"
                ) from error
        check_index(index, neurons)  # here, where it is usually on the CPU and can be read
        # Contiguous: flat vectors' views start where no 16-byte load may.
        neurons = neurons.to(device, dtype).contiguous()
        return cls(neurons, index.to(device).contiguous())

    @property
    def learns(self) -> bool:
        """Whether the neurons need gradients."""
        parts = self.neurons.key, self.neurons.bias, self.neurons.value
        return any(part is not None and part.requires_grad for part in parts)

    def add(self, y: Tensor, x: Tensor, rows: int | None = None) -> Tensor:
        """Add each row's own neuron to y; without gradients y itself may be changed.

        Args:
            y: the layer's output, [rows, T, d_out], or [M, d_out] with M a multiple of the rows.
            x: what the keys read; its shape is y's but for the width d_in.
            rows: of the batch, where x is [M, d_in]; default: as many as there are samples.

        Raises:
            ValueError: rows, samples and shapes do not fit together.
        """
        neurons, index, samples = self.neurons, self.index, len(self.index)
        if x.shape[-1] != neurons.key.shape[1]:
            raise ValueError(
                f"the neurons read inputs of width {neurons.key.shape[1]}, but the layer was given "
                f"{tuple(x.shape)}; mount neurons of that width, or pass what they read as source"
            )
        if x.dim() > 2:
            rows = x.shape[0]
        elif rows is None:
            rows = samples
        if rows != samples and rows != samples * self.copies.number:
            raise ValueError(
                f"the batch has {rows} rows, but {samples} neuron indices are mounted; give each "
                "row one index (-1 for none)"
            )
        tokens = x[..., 0].numel()
        if tokens != y[..., 0].numel() or tokens % max(rows, 1):
            raise ValueError(
                f"{rows} rows have neurons mounted, but the layer read {tuple(x.shape)} and gave "
                f"{tuple(y.shape)}; both must hold the same number of tokens for each row"
            )
        if not tokens or not samples:
            return y
        if not neurons.device == index.device == y.device:  # weights offloaded, or on several
            neurons, index = neurons.to(y.device), index.to(y.device)
            self.neurons, self.index = neurons, index
        if rows != samples:
            index = index.repeat_interleave(rows // samples)
        read = x.to(y.device).reshape(rows, -1, x.shape[-1])
        written = y.reshape(rows, -1, y.shape[-1])
        op = dynamic_neuron if torch.is_grad_enabled() else dynamic_neuron_
        return op(written, read, neurons, index).view(y.shape)


class Place:
    """Where a layer carries neurons, for each thread or task those that it mounted itself.

    Args:
        everywhere: what threads and tasks have that mounted nothing themselves.

    Attributes:
        in_use: whether any thread or task has neurons mounted; compiled code is made for either.
        learns: whether any of them may need gradients of its neurons.
    """

    def __init__(self, everywhere: Mounted | None = None) -> None:
        self.name = f"place {next(_NUMBERS)}"
        self._lock, self._users, self._learners = threading.Lock(), 0, 0
        self.everywhere = everywhere
        _PLACES[self.name] = self

    def __reduce__(self) -> Any:
        return Place, (self.everywhere,)

    @property
    def everywhere(self) -> Mounted | None:
        """What is mounted for threads and tasks that mounted nothing themselves."""
        return self._everywhere

    @everywhere.setter
    def everywhere(self, mounted: Mounted | None) -> None:
        self._everywhere = mounted
        self._count(0, 0)

    @property
    def mounted(self) -> Mounted | None:
        """What is mounted here for this thread or task."""
        found = held(self)
        if found is None:
            return self._everywhere
        return None if found is EMPTY else found

    @property
    def is_used_elsewhere(self) -> bool:
        """Whether others than this thread or task have neurons mounted here."""
        return self._users > (self.mounted is not None)

    @property
    def is_emptied(self) -> bool:
        """Whether this thread or task runs inside `holding(EMPTY)`."""
        return held(self) is EMPTY

    @contextmanager
    def holding(self, mounted: Mounted | object) -> Iterator[None]:
        """Inside, `mounted` is mounted here for this thread or task; `EMPTY`: nothing is."""
        learns = isinstance(mounted, Mounted) and mounted.learns
        self._count(mounted is not EMPTY, learns)
        try:
            with holding({self: mounted}):
                yield
        finally:
            self._count(-(mounted is not EMPTY), -learns)

    def _count(self, users: int, learners: int) -> None:
        with self._lock:
            self._users, self._learners = self._users + users, self._learners + learners
            everywhere = self._everywhere
            self.in_use = self._users > 0 or everywhere is not None
            self.learns = self._learners > 0 or (everywhere is not None and everywhere.learns)

    def add(self, y: Tensor, x: Tensor, rows: int | None = None) -> Tensor:
        """`Mounted.add` of what this thread or task has mounted; y itself if that is nothing."""
        if is_traced():
            # Which thread or task calls is known when the compiled code runs, and not before.
            if self.learns or (torch.is_grad_enabled() and (y.requires_grad or x.requires_grad)):
                return _added(self, y, x, rows)
            return torch.ops.meg_kernels.add_mounted(y, x, rows, self.name)
        mounted = self.mounted
        return y if mounted is None else mounted.add(y, x, rows)


EMPTY = object()  # is held where nothing shall be mounted, whatever is around it
_NUMBERS = itertools.count()
_PLACES: weakref.WeakValueDictionary[str, Place] = weakref.WeakValueDictionary()


@torch.compiler.disable
def _added(place: Place, y: Tensor, x: Tensor, rows: int | None) -> Tensor:
    """`place.add`, with gradients, between two compiled graphs."""
    return place.add(y, x, rows)


# What a CUDA graph would record are the neurons of one call.
_TAGS = tuple(
    tag
    for name in ("pt2_compliant_tag", "cudagraph_unsafe")
    if (tag := getattr(torch.Tag, name, None)) is not None
)
_LIBRARY = torch.library.Library("meg_kernels", "FRAGMENT")
_LIBRARY.define("add_mounted(Tensor y, Tensor x, SymInt? rows, str place) -> Tensor", tags=_TAGS)


@torch.library.impl(_LIBRARY, "add_mounted", "CompositeExplicitAutograd")
def _add_mounted(y: Tensor, x: Tensor, rows: int | None, place: str) -> Tensor:
    with torch.no_grad():
        return _PLACES[place].add(y.clone(), x, rows)


@torch.library.register_fake("meg_kernels::add_mounted", lib=_LIBRARY)
def _fake(y: Tensor, x: Tensor, rows: int | None, place: str) -> Tensor:
    return torch.empty_like(y)
