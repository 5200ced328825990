"""Neurons of the conditions that were asked about last: a repeated query costs no sampling.

With snapping every wording of a fact asks about the same condition, so that each edited fact's
neuron is generated once for as long as it stays in the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from meg_kernels.neuron import Neurons
from meg_kernels.routing.generators import Generator
from meg_kernels.scoped import OwnLock

CAPACITY = 1024  # neurons; 20 MB of Phi-2's


@dataclass(frozen=True)
class Served:
    """What an edited model was asked, and what that cost.

    Args:
        queries: how many were routed.
        edited: how many of them the gate took for edited ones.
        generated: how many neurons the generator made for those.
        reused: how many neurons were there already: in the cache, or collected for facts that the
            generator was not trained on.
    """

    queries: int = 0
    edited: int = 0
    generated: int = 0
    reused: int = 0

    def __add__(self, more: Served) -> Served:
        """Both counts."""
        also = asdict(more)
        return Served(**{name: count + also[name] for name, count in asdict(self).items()})

    def since(self, earlier: Served) -> Served:
        """What was served after `earlier`, an older copy of these counts."""
        before = asdict(earlier)
        return Served(**{name: count - before[name] for name, count in asdict(self).items()})


class NeuronCache:
    """The last neurons of one generator, by their conditions; another generator empties it.

    Call `clear` after changing a generator in place. Threads may share a cache: their neurons are
    made one batch after the other.

    Args:
        capacity: how many neurons are kept; the one that was not asked for longest makes room.
    """

    def __init__(self, capacity: int = CAPACITY):
        self.capacity = capacity
        self._lock = OwnLock()
        self._generator: Generator | None = None
        self._neurons: OrderedDict[bytes, Tensor] = OrderedDict()

    def clear(self) -> None:
        """Forget all neurons."""
        with self._lock:
            self._neurons.clear()

    def generate(
        self, generator: Generator, z: Tensor, keys: Sequence[bytes]
    ) -> tuple[Neurons, Served]:
        """`generator.generate(z)`, made only where it is not in the cache, and what that cost.

        Args:
            generator: makes the neurons.
            z: [B, dim] conditions.
            keys: for each what it is found again by (`edits.condition_keys`).
        """
        with self._lock:
            return self._generate(generator, z, keys)

    def _generate(
        self, generator: Generator, z: Tensor, keys: Sequence[bytes]
    ) -> tuple[Neurons, Served]:
        if generator is not self._generator:
            self.clear()
            self._generator = generator
        if not keys:
            return generator.generate(z), Served()
        rows = {key: row for row, key in enumerate(keys) if key not in self._neurons}
        if rows:
            made = generator.layout.pack(generator.generate(z[list(rows.values())]))
            self._neurons.update(zip(rows, made, strict=True))
        for key in keys:
            self._neurons.move_to_end(key)
        flat = torch.stack([self._neurons[key] for key in keys])
        while len(self._neurons) > self.capacity:
            self._neurons.popitem(last=False)
        served = Served(generated=len(rows), reused=len(set(keys)) - len(rows))
        return generator.layout.unpack(flat), served
