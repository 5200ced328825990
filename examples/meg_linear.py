"""`MeGLinear` in a model of your own: a linear layer whose samples can each carry a neuron.

python examples/meg_linear.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meg_kernels import MeGLinear, Neurons

torch.manual_seed(0)


class FeedForward(nn.Module):
    """The usual two projections. The neuron's key reads what the block reads: `source`."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = MeGLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)), source=x)


width, samples = 32, 4
block = FeedForward(width, hidden=128)
x = torch.randn(samples, 10, width)
neurons = Neurons(
    key=torch.randn(2, width), bias=torch.randn(2), value=torch.randn(2, width), activation="gelu"
)

with torch.no_grad():
    plain = block(x)
    # Samples 0 and 3 carry neurons 0 and 1; the others carry none.
    with block.down.mounted(neurons, torch.tensor([0, -1, -1, 1])):
        edited = block(x)
    by_hand = plain[3] + F.gelu(x[3] @ neurons.key[1] + neurons.bias[1])[:, None] * neurons.value[1]

print("as the formula says:", torch.allclose(edited[3], by_hand, atol=1e-5))
print("without a neuron, bit for bit the same:", torch.equal(edited[1], plain[1]))

# Over a layer that is there already; its weights are shared, not copied.
linear = nn.Linear(width, width)
print("shares its weights:", MeGLinear.from_linear(linear).weight is linear.weight)
