"""Frozen projections over packed weights, against the plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from meg_kernels.neuron import Neurons
from meg_kernels.nn import MeGLinear
from meg_kernels.precision import fast_dtype, frozen_products


def projections() -> list[nn.Module]:
    torch.manual_seed(0)
    conv = Conv1D(24, 40)
    nn.init.normal_(conv.bias)
    made = [nn.Linear(40, 24), nn.Linear(40, 24, bias=False), conv]
    return [module.requires_grad_(False) for module in made]


@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 7, 40), (0, 40)])
@pytest.mark.parametrize("which", range(3))
def test_products_and_gradients_are_those_of_the_plain_projection(which, shape):
    module, x = projections()[which], torch.randn(shape, requires_grad=True)
    upstream = torch.randn(*shape[:-1], 24)
    expected = module(x)
    (expected_gradient,) = torch.autograd.grad(expected, x, upstream)
    with frozen_products([nn.Sequential(module)], torch.float32):
        y = module(x)
        (gradient,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_products_in_bfloat16_keep_the_dtype_of_their_inputs(which, own):
    module = projections()[which].to(own)
    x = torch.randn(6, 40).to(own).requires_grad_()
    expected = module.float()(x.float()).detach()
    module.to(own)
    with frozen_products([module], torch.bfloat16):
        y = module(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == gradient.dtype == own
    # Inputs, weights, bias and output are rounded to 8 bits each.
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)
    assert own == torch.bfloat16 or not torch.equal(y, expected)


def test_outside_the_projections_are_the_plain_ones_even_after_an_error():
    module, x = projections()[0], torch.randn(2, 40)
    expected = module(x)
    with pytest.raises(KeyError), frozen_products([module], torch.bfloat16):
        assert not torch.equal(module(x), expected)
        raise KeyError
    assert torch.equal(module(x), expected) and "forward" not in vars(module)


def test_an_inner_block_gives_the_outer_ones_products_back():
    module, x = projections()[0], torch.randn(2, 40)
    with frozen_products([module], torch.bfloat16):
        outer = module(x)
        with frozen_products([module], torch.float32):
            assert not torch.equal(module(x), outer)
        assert torch.equal(module(x), outer)
    assert not torch.equal(module(x), outer)


def test_a_projection_that_carries_neurons_packs_its_weights_and_keeps_them():
    plain = projections()[0]
    module, x = MeGLinear.from_linear(plain), torch.randn(2, 40)
    neurons = Neurons(torch.randn(1, 40), None, torch.randn(1, 24))
    index = torch.tensor([-1, 0])
    with frozen_products([module], torch.bfloat16):
        alone = module(x)
        with module.mounted(neurons, index):
            together = module(x)
    assert not torch.equal(alone, plain(x))
    assert torch.equal(together[0], alone[0])
    added = (x[1] @ neurons.key[0]) * neurons.value[0]
    torch.testing.assert_close(together[1], alone[1] + added, rtol=1e-4, atol=1e-4)


def test_without_gradients_every_projection_is_frozen():
    module, x = nn.Linear(40, 24), torch.randn(2, 40)
    with torch.no_grad(), frozen_products([module], torch.bfloat16):
        rounded = module(x)
    assert not torch.equal(rounded, module(x))


def test_projections_that_are_trained_or_of_another_class_stay_as_they_are():
    class Other(nn.Linear):
        pass

    trained, other = nn.Linear(4, 4), Other(4, 4).requires_grad_(False)
    with frozen_products([trained, other], torch.bfloat16):
        assert "forward" not in vars(trained) and "forward" not in vars(other)


@pytest.mark.parametrize("native, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_the_fast_dtype_is_bfloat16_where_the_device_multiplies_it(monkeypatch, native, expected):
    monkeypatch.setattr("meg_kernels.precision.multiplies_bfloat16", lambda device: native)
    assert fast_dtype(torch.device("cpu"), torch.float32) == expected
