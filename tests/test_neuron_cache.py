"""The cache of generated neurons against the generator that it asks."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from meg_kernels.neuron import NeuronLayout, Neurons
from meg_kernels.routing.edits import condition_keys
from meg_kernels.routing.neuron_cache import NeuronCache, Served

LAYOUT = NeuronLayout(3, 3, True, "gelu")


class Recording:
    """A generator that remembers what it was asked."""

    layout = LAYOUT

    def __init__(self, scale: float = 1.0):
        self.scale, self.asked = scale, []

    def generate(self, z: Tensor) -> Neurons:
        self.asked.append(z.clone())
        return self.layout.unpack(self.scale * z.repeat(1, self.layout.dim))


@pytest.fixture
def cache() -> NeuronCache:
    return NeuronCache(capacity=3)


def conditions(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1)


def asked(generator: Recording) -> list[list[float]]:
    return [z[:, 0].tolist() for z in generator.asked]


def check(cache: NeuronCache, generator: Recording, *numbers: float) -> Served:
    z = conditions(*numbers)
    neurons, served = cache.generate(generator, z, condition_keys(z))
    expected = generator.scale * conditions(*numbers).repeat(1, LAYOUT.dim)
    assert torch.equal(LAYOUT.pack(neurons), expected)
    return served


def test_each_condition_is_generated_once_and_every_row_gets_its_own(cache):
    generator = Recording()
    served = check(cache, generator, 5, 7, 5)
    served += check(cache, generator, 7, 6, 5)
    served += check(cache, generator, 6)
    assert asked(generator)[0] in ([7, 5], [5, 7]) and asked(generator)[1:] == [[6]]
    assert served == Served(generated=3, reused=3)


def test_another_generator_waits_until_the_neurons_of_one_are_made(cache):
    """Else they would be taken for its own."""
    other = Recording(2.0)
    thread = threading.Thread(target=check, args=(cache, other, 5))

    class Slow(Recording):
        def generate(self, z: Tensor) -> Neurons:
            thread.start()
            thread.join(0.5)
            return super().generate(z)

    check(cache, Slow(), 5)
    thread.join()
    check(cache, other, 5)


def test_the_one_not_asked_for_longest_makes_room(cache):
    generator = Recording()
    for number in (1, 2, 3, 1, 4, 1, 3, 2):
        check(cache, generator, number)
    assert asked(generator) == [[1], [2], [3], [4], [2]]


def test_a_batch_larger_than_the_cache_is_answered_in_full(cache):
    generator = Recording()
    check(cache, generator, 1, 2, 3, 4, 5)
    check(cache, generator, 5, 4, 3)
    assert len(generator.asked) == 1


def test_another_generator_does_not_get_the_first_ones_neurons(cache):
    check(cache, Recording(), 1, 2)
    check(cache, Recording(scale=10), 1, 2)


def test_a_cleared_cache_knows_nothing(cache):
    generator = Recording()
    check(cache, generator, 1)
    cache.clear()
    check(cache, generator, 1)
    assert len(generator.asked) == 2


def test_conditions_that_differ_in_a_bit_are_others(cache):
    generator = Recording()
    near = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    check(cache, generator, 1.0, near)
    assert len(generator.asked[0]) == 2


def test_no_conditions_give_no_neurons(cache):
    neurons, served = cache.generate(Recording(), conditions(), [])
    assert len(neurons) == 0 and served == Served()


def test_what_was_served_since_is_a_difference():
    assert Served(5, 4, 3, 2).since(Served(1, 1, 1, 1)) == Served(4, 3, 2, 1)
