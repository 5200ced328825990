"""Neurons of the conditions that were asked about last: a repeated query costs no sampling.

With snapping every wording of a fact asks about the same condition, so that each edited fact is
generated once for as long as it stays in the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from meg_kernels.editing.generators import Generator
from meg_kernels.neuron import Neurons

CAPACITY = 1024  # neurons; of Phi-2's, 20 MB


@dataclass
class Served:
    """What was asked of an edited model, and what that cost.

    Args:
        queries: that were routed.
        edited: of them, those that the gate took for edited ones.
        generated: neurons that the generator made for them.
        reused: neurons that were there: in the cache, or collected for facts that the generator was
            not trained on.
    """

    queries: int = 0
    edited: int = 0
    generated: int = 0
    reused: int = 0

    def since(self, earlier: Served) -> Served:
        """What came after `earlier`."""
        before = asdict(earlier)
        return Served(**{name: count - before[name] for name, count in asdict(self).items()})


class NeuronCache:
    """The last neurons of one generator, by their conditions; another generator empties it.

    A generator that is changed in place must be told of: `clear`.

    Args:
        served: where to count.
        capacity: neurons; the one that was not asked for longest makes room.
    """

    def __init__(self, served: Served, capacity: int = CAPACITY):
        self.served, self.capacity = served, capacity
        self._generator: Generator | None = None
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()

    def clear(self) -> None:
        self._known.clear()

    def generate(self, generator: Generator, z: Tensor) -> Neurons:
        """`generator.generate(z)` for conditions z [B, dim], made only where it is not known."""
        if generator is not self._generator:
            self.clear()
            self._generator = generator
        # On a GPU this is the one wait of a batch, for some kilobytes.
        keys = [row.tobytes() for row in z.float().cpu().numpy()]
        rows = {key: row for row, key in enumerate(keys) if key not in self._known}
        if not keys:
            return generator.generate(z)
        if rows:
            made = generator.layout.pack(generator.generate(z[list(rows.values())]))
            self._known.update(zip(rows, made, strict=True))
        self.served.generated += len(rows)
        self.served.reused += len(set(keys)) - len(rows)
        for key in keys:
            self._known.move_to_end(key)
        flat = torch.stack([self._known[key] for key in keys])
        while len(self._known) > self.capacity:
            self._known.popitem(last=False)
        return generator.layout.unpack(flat)
