"""When products run in bfloat16."""

from __future__ import annotations

import pytest
import torch

from meg_kernels import precision
from meg_kernels.machine import Choice
from meg_kernels.precision import bfloat16_choice, bfloat16_pays, fast_dtype, fast_products

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WHAT = "training's products on cpu"


@pytest.fixture
def machine(monkeypatch):
    """machine(native, gain, policy): its bfloat16; a gain of None must not be asked for."""

    def pretend(native: bool, gain: float | None, policy: str = "auto") -> None:
        def measured(name, contest):
            assert gain is not None
            return gain

        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: native)
        monkeypatch.setattr(precision, "gain", measured)
        monkeypatch.setenv(precision.VARIABLE, policy)

    return pretend


@pytest.mark.parametrize(
    "native, gain, policy, chosen, why",
    [
        (True, 1.1, "auto", "bfloat16", "bfloat16 is 1.10 times as fast"),
        (True, 1.09, "auto", "float32", "bfloat16 is 1.09 times as fast"),
        (True, None, "always", "bfloat16", "MEG_KERNELS_BFLOAT16=always"),
        (True, None, "never", "float32", "MEG_KERNELS_BFLOAT16=never"),
        (False, None, "auto", "float32", "bfloat16 is not native"),
        (False, None, "always", "float32", "bfloat16 is not native"),
    ],
)
def test_a_cpu_uses_bfloat16_where_it_is_native_and_measured_to_be_faster(
    machine, native, gain, policy, chosen, why
):
    machine(native, gain, policy)
    assert fast_dtype(CPU, torch.float32) == getattr(torch, chosen)
    assert bfloat16_choice(CPU) == Choice(WHAT, chosen, why)
    with fast_products(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == getattr(torch, chosen)


def test_a_gpu_is_not_measured(machine):
    machine(native=True, gain=None)
    assert bfloat16_pays(GPU) and bfloat16_choice(GPU).why == "bfloat16 is native"


def test_without_bfloat16_weights_keep_their_dtype(machine):
    machine(native=True, gain=0.5)
    assert fast_dtype(CPU, torch.float64) == torch.float64


def test_both_sides_of_the_measurement_are_one_gradient():
    contest = precision._contest()
    exact, rounded = contest.plain(0), contest.other(0)
    assert exact.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)


def test_a_policy_of_another_name_is_refused(monkeypatch):
    monkeypatch.setenv(precision.VARIABLE, "yes")
    with pytest.raises(ValueError, match="MEG_KERNELS_BFLOAT16 is 'yes'; it must be one of auto"):
        bfloat16_pays(CPU)
