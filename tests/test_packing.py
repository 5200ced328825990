"""Products with frozen weights, packed and plain: in float64, by rows, and without oneDNN."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from meg_kernels import machine
from meg_kernels.machine import Choice
from meg_kernels.neuron import Neurons
from meg_kernels.nn import MeGLinear, packing
from meg_kernels.nn.packing import PackedWeight, frozen_products, packing_choices

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


def projections() -> list[nn.Module]:
    torch.manual_seed(0)
    conv = Conv1D(24, 40)
    nn.init.normal_(conv.bias)
    made = [nn.Linear(40, 24), nn.Linear(40, 24, bias=False), conv]
    return [module.requires_grad_(False) for module in made]


@pytest.fixture
def packed_rows(monkeypatch):
    """The rows of each packed product so far; None for each weight that was packed."""
    seen: list[int | None] = []

    class Seen(packing._OneDnnWeight):
        def __init__(self, weight):
            seen.append(None)
            super().__init__(weight)

        def __call__(self, x, *rest):
            seen.append(x.shape[:-1].numel())
            return super().__call__(x, *rest)

    monkeypatch.setattr(packing, "_OneDnnWeight", Seen)
    return seen


@pytest.fixture
def measured(monkeypatch):
    """measured(gains by rows): what measurements find; returns the names of those asked for."""
    monkeypatch.setenv(packing.VARIABLE, "auto")

    def pretend(by_rows: dict[int, float]) -> list[str]:
        asked: list[str] = []

        def gain(name, contest):
            asked.append(name)
            return by_rows[int(name.rpartition(" ")[2])]

        monkeypatch.setattr(packing, "gain", gain)
        return asked

    return pretend


@pytest.mark.parametrize("policy", ["always", "never"])
@pytest.mark.parametrize("gelu_tanh", [False, True])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("layout", ["as stored", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 5, 40), (64, 40), (0, 40)])
def test_a_product_is_that_in_float64_but_for_its_rounding(
    monkeypatch, shape, dtype, layout, biased, gelu_tanh, policy
):
    monkeypatch.setenv(packing.VARIABLE, policy)
    torch.manual_seed(0)
    stored = torch.randn((24, 40) if layout == "as stored" else (40, 24)).to(dtype)
    weight = stored if layout == "as stored" else stored.t()
    x, bias = torch.randn(shape).to(dtype), torch.randn(24).to(dtype) if biased else None
    exact = x.double() @ weight.double().t() + (bias.double() if biased else 0)
    # Of the sum: what float32 rounds of its 41 terms. Of the result: its dtype's own rounding,
    # twice where the GELU is another pass; a GELU lengthens no error by more than 1.13.
    terms = x.double().abs() @ weight.double().abs().t() + 1
    bound = 1.13 * (41 * 2**-24 * terms + ROUNDING[dtype] * exact.abs()) + 1e-6
    if gelu_tanh:
        exact = F.gelu(exact, approximate="tanh")
        bound = bound + ROUNDING[dtype] * exact.abs()
    result = PackedWeight(weight)(x, bias, gelu_tanh)
    assert result.dtype == dtype and result.shape == exact.shape
    assert bool(((result.double() - exact).abs() <= bound).all())


@needs_onednn
@pytest.mark.parametrize(
    "rows, packed",
    [(0, False), (1, False), (2, False), (3, True), (22, True), (23, False), (500, False)],
)
def test_a_product_runs_packed_where_that_gains_a_tenth_for_its_rows(
    measured, packed_rows, rows, packed
):
    measured({1: 1.05, 8: 1.1, 64: 0.5})
    weight, x = torch.randn(24, 40), torch.randn(rows, 40)
    product = PackedWeight(weight)
    assert torch.allclose(product(x, None), F.linear(x, weight), atol=1e-5)
    assert packed_rows == ([None, rows] if packed else [])


@needs_onednn
def test_a_weight_is_packed_once_and_each_number_of_rows_keeps_its_path(measured, packed_rows):
    asked = measured({1: 2.0, 8: 1.0, 64: 2.0})
    product = PackedWeight(torch.randn(24, 40))
    for _ in range(2):
        for rows in (1, 2, 8, 64, 65):
            product(torch.randn(rows, 40), None)
        measured({1: 0.1, 8: 9.0, 64: 0.1})  # asked a second time, the machine would say this
    assert packed_rows == [None, *2 * [1, 2, 64, 65]]
    assert asked == [f"packed over plain product: float32 40 to 24, rows {n}" for n in (1, 8, 64)]


@needs_onednn
def test_the_backward_product_is_measured_by_itself(measured, packed_rows):
    asked = measured({1: 1.0, 8: 1.0, 64: 1.0})
    x = torch.randn(8, 40, requires_grad=True)
    with frozen_products(projections(), torch.float32):
        projections()[0](x)
    assert not asked  # another module than the frozen ones
    linear, _, conv = projections()
    with frozen_products([linear, conv], torch.float32):
        (linear(x).sum() + conv(x).sum()).backward()
    rows = ", rows 8"
    named = {name.removeprefix("packed over plain product: float32 ") for name in asked}
    expected = {"40 to 24", "40 to 24 transposed", "24 to 40", "24 to 40 transposed"}
    assert named == {shape + rows for shape in expected} and not packed_rows


class Refusing:
    """An op that takes nothing."""

    def __call__(self, *arguments):
        raise RuntimeError("could not create a primitive descriptor")


@needs_onednn
@pytest.mark.parametrize("policy", ["always", "auto"])
@pytest.mark.parametrize("what", ["namespace", "packing", "product", "packs", "multiplies"])
def test_without_the_private_ops_products_are_the_plain_ones(monkeypatch, tmp_path, policy, what):
    reorder = torch.ops.mkldnn._reorder_linear_weight
    left = {
        "namespace": SimpleNamespace(),
        "packing": SimpleNamespace(_linear_pointwise=torch.ops.mkldnn._linear_pointwise),
        "product": SimpleNamespace(_reorder_linear_weight=reorder),
        "packs": SimpleNamespace(_reorder_linear_weight=Refusing()),
        "multiplies": SimpleNamespace(_reorder_linear_weight=reorder, _linear_pointwise=Refusing()),
    }[what]
    monkeypatch.setattr(torch.ops, "mkldnn", left)
    monkeypatch.setattr(machine, "_known", {})
    monkeypatch.setenv("MEG_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv(packing.VARIABLE, policy)
    module, x = projections()[0], torch.randn(3, 40)
    expected = module(x)
    with torch.no_grad(), frozen_products([module], torch.float32):
        assert torch.equal(module(x), expected)
        assert torch.equal(module(x), expected)
    assert not list(tmp_path.iterdir())  # an op that is not there is not slow


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wide, read", [(24, 40), (50_000, 96)])
def test_both_sides_of_a_measurement_are_one_product(wide, read, transposed):
    weight = torch.empty(read, wide).t() if transposed else torch.empty(wide, read)
    contest = packing._contest(weight, 8)
    plain, packed = contest.plain(7), contest.other(7)
    torch.testing.assert_close(plain, packed)
    torch.testing.assert_close(plain[:, :1], torch.full((8, 1), 0.5 + 0.005 * read))


@needs_onednn
def test_a_measured_choice_multiplies_right_and_is_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_known", {})
    monkeypatch.setenv("MEG_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv(packing.VARIABLE, "auto")
    weight, x = torch.randn(24, 40), torch.randn(3, 40)
    assert packing_choices() == []
    assert torch.allclose(PackedWeight(weight)(x, None), F.linear(x, weight), atol=1e-5)
    (choice,) = packing_choices()
    assert choice.what == "products float32 40 to 24" and choice.why.endswith(" for 8")


@needs_onednn
@pytest.mark.parametrize(
    "weight, packs",
    [
        (torch.randn(4, 4), True),
        (torch.randn(4, 4).bfloat16(), True),
        (torch.randn(4, 4).half(), False),
        (torch.randn(4, 4).double(), False),
        (torch.empty(4, 4, device="meta"), False),
    ],
)
def test_only_weights_that_onednn_takes_are_packed(monkeypatch, weight, packs):
    assert (PackedWeight.of(weight) is not None) == packs
    monkeypatch.setenv(packing.VARIABLE, "never")
    assert PackedWeight.of(weight) is None


@needs_onednn
def test_arguments_that_do_not_fit_are_an_error_and_the_weight_stays_packed(packed_rows):
    product = PackedWeight(torch.randn(24, 40))
    with pytest.raises(RuntimeError, match=r"shapes|size"):
        product(torch.randn(3, 41), None)
    product(torch.randn(3, 40), None)
    assert packed_rows == [None, 3, 3]


def test_a_policy_of_another_name_is_refused(monkeypatch):
    monkeypatch.setenv(packing.VARIABLE, "sometimes")
    with pytest.raises(ValueError, match="MEG_KERNELS_PACKING is 'sometimes'; it must be one of"):
        PackedWeight(torch.randn(4, 4))


def test_choices_are_shown_by_shape(monkeypatch):
    gains = {
        "packed over plain product: float32 40 to 24, rows 8": 1.1,
        "packed over plain product: float32 40 to 24, rows 64": 2.0,
        "packed over plain product: float32 40 to 24, rows 1": 0.5,
        "packed over plain product: bfloat16 40 to 24, rows 1": 1.0,
        "another measurement": 3.0,
    }
    monkeypatch.setattr(packing, "gains", lambda: gains)
    monkeypatch.setenv(packing.VARIABLE, "auto")
    assert packing_choices() == [
        Choice("products bfloat16 40 to 24", "plain", "gain by packing: 1.00 for 1"),
        Choice(
            "products float32 40 to 24",
            "packed for 8, 64 rows",
            "gain by packing: 0.50 for 1, 1.10 for 8, 2.00 for 64",
        ),
    ]
    monkeypatch.setenv(packing.VARIABLE, "never")
    (choice,) = packing_choices()
    assert (choice.chosen, choice.why) == ("plain", "MEG_KERNELS_PACKING=never")


@pytest.mark.parametrize("policy", ["always", "never"])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 7, 40), (0, 40)])
@pytest.mark.parametrize("which", range(3))
def test_products_and_gradients_are_those_of_the_plain_projection(
    monkeypatch, which, shape, policy
):
    monkeypatch.setenv(packing.VARIABLE, policy)
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
