"""Neurons of the conditions that were asked about last: a repeated query costs no sampling.

With snapping every wording of a fact asks about one condition, so that the neuron of an edited fact
is generated once for as long as it stays in the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from meg_kernels.editing.generators import Generator
from meg_kernels.neuron import Neurons

CAPACITY = 1024  # neurons; Phi-2's take 20 MB


@dataclass
class Served:
    """What was asked of an edited model, and what that cost.

    Args:
        queries: number of queries that were routed.
        edited: number of those that the familiarity gate took for edited ones.
        generated: number of neurons that the generator made for them.
        reused: number of neurons that were there already: in the cache, or collected for facts that
            the generator was not trained on.
    """

    queries: int = 0
    edited: int = 0
    generated: int = 0
    reused: int = 0

    def since(self, earlier: Served) -> Served:
        """The counts of what was asked after `earlier`, an older copy of these counts."""
        before = asdict(earlier)
        return Served(**{name: count - before[name] for name, count in asdict(self).items()})


class NeuronCache:
    """The last neurons of one generator, by their conditions; another generator empties it.

    After a generator was changed in place, call `clear`.

    Args:
        served: counts what is generated and reused.
        capacity: the most neurons that are kept; the one not asked for longest makes room.
    """

    def __init__(self, served: Served, capacity: int = CAPACITY):
        self.served, self.capacity = served, capacity
        self._generator: Generator | None = None
        self._neurons: OrderedDict[bytes, Tensor] = OrderedDict()

    def clear(self) -> None:
        """Forget all neurons."""
        self._neurons.clear()

    def generate(self, generator: Generator, z: Tensor) -> Neurons:
        """The neurons of conditions, generated only if they are not in the cache.

        Args:
            generator: makes what is missing.
            z: [B, condition_dim] float32 on the generator's device.

        Returns:
            B neurons, those of `generator.generate(z)`.
        """
        if generator is not self._generator:
            self.clear()
            self._generator = generator
        # On a GPU this is the one wait of a batch, for some kilobytes.
        keys = [row.tobytes() for row in z.float().cpu().numpy()]
        rows = {key: row for row, key in enumerate(keys) if key not in self._neurons}
        if not keys:
            return generator.generate(z)
        if rows:
            made = generator.layout.pack(generator.generate(z[list(rows.values())]))
            self._neurons.update(zip(rows, made, strict=True))
        self.served.generated += len(rows)
        self.served.reused += len(set(keys)) - len(rows)
        for key in keys:
            self._neurons.move_to_end(key)
        flat = torch.stack([self._neurons[key] for key in keys])
        while len(self._neurons) > self.capacity:
            self._neurons.popitem(last=False)
        return generator.layout.unpack(flat)
