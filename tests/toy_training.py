"""A toy problem for training: neurons of a dozen weights, right where they lie close to the wanted.

Toy                      the problem, and how to train a generator on it
TOY, TOY_DIT             generators that learn it in a second
weights                  all that a generator has learnt, in a row
"""

from __future__ import annotations

import functools

import torch

from meg_kernels.diffusion import DiTConfig
from meg_kernels.editing.train import train_generator
from meg_kernels.neuron import NeuronLayout
from meg_kernels.routing.generators import GeneratorConfig, build_generator

LAYOUT = NeuronLayout(6, 6, False, "identity")
CONDITION_DIM = 8
N = 5
TRAINING = {
    "learning_rate": 5e-3,
    "max_steps": 400,
    "warmup_steps": 5,
    "batch_size": 4,
    "check_every": 20,
    "condition_noise": 0.02,
    "ema_decay": 0.9,
}
SHAPE = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
TOY = GeneratorConfig.mlp(width=32, **TRAINING)
TOY_DIT = GeneratorConfig.dit(network=DiTConfig(**SHAPE), **TRAINING)

normalized = functools.partial(torch.nn.functional.normalize, dim=-1)


class Toy:
    """N conditions with their neurons; a generated one is right when it is nearly theirs."""

    def __init__(self, n=N):
        rng = torch.Generator().manual_seed(2)
        self.conditions = normalized(torch.randn(n, CONDITION_DIM, generator=rng))
        self.neurons = LAYOUT.unpack(torch.randn(n, LAYOUT.dim, generator=rng))
        self.tried = []

    def distances(self, neurons, rows=slice(None)):
        return (LAYOUT.pack(neurons) - LAYOUT.pack(self.neurons)[rows]).square().mean(1).sqrt()

    def answers(self, neurons, rows):
        self.tried.append(LAYOUT.pack(neurons))
        return self.distances(neurons, rows) < 0.3

    def only_the_collected(self, neurons, rows):
        """No generated neuron will do."""
        return self.answers(neurons, rows) & (self.distances(neurons, rows) < 1e-9)

    def train(self, config=TOY, **more):
        generator = build_generator(config, LAYOUT, CONDITION_DIM)
        answers = more.pop("answers", self.answers)
        training = train_generator(generator, self.conditions, self.neurons, answers, **more)
        return generator, training


def weights(generator):
    return torch.cat([value.flatten().float() for value in generator.state_dict().values()])
