"""Checks of arguments: what they let through, what they keep, and what they say."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Literal

import numpy as np
import pytest
import tiny
import torch

from meg_kernels import (
    CollectionConfig,
    DiTConfig,
    EditorConfig,
    EncoderTuningConfig,
    NeuronLayout,
    NoiseSchedule,
    PromptedModel,
    SamplerConfig,
    attach,
)
from meg_kernels.checks import (
    FLAG,
    SEED,
    TEXTS,
    check_fields,
    instance_of,
    integer,
    number,
    one_of,
    shown,
)
from meg_kernels.diffusion import Execution
from meg_kernels.editing.layers import compare_layers
from meg_kernels.ops.short_attention import short_attention
from meg_kernels.routing.generators import TrainingConfig
from meg_kernels.routing.router import RoutingConfig

Color = Literal["red", "blue"]


@pytest.mark.parametrize(
    ("check", "given", "kept"),
    [
        (integer(1), 1, 1),
        (integer(1), np.int64(3), 3),
        (integer(1), torch.tensor(3), 3),
        (integer(0, 2), 2, 2),
        (integer(1).or_none(), None, None),
        (SEED, 2**63 - 1, 2**63 - 1),
        (number(above=0), 1, 1),
        (number(above=0), np.float32(0.5), 0.5),
        (number(least=0, most=1), 1.0, 1.0),
        (number(least=0, most=math.inf), math.inf, math.inf),
        (FLAG, False, False),
        (one_of(Color), "red", "red"),
        (instance_of(dict), {}, {}),
        (TEXTS, ["a", "b"], ("a", "b")),
    ],
)
def test_what_fits_is_kept_as_plain_values(check, given, kept):
    value = check("x", given)
    assert value == kept and type(value) is type(kept)


@pytest.mark.parametrize(
    ("check", "given", "wanted"),
    [
        (integer(1), 0, "an integer of at least 1"),
        (integer(1), True, "an integer of at least 1"),
        (integer(1), np.True_, "an integer of at least 1"),
        (integer(1), torch.tensor(True), "an integer of at least 1"),
        (integer(1), 1.0, "an integer of at least 1"),
        (integer(1, 9), 10, "an integer in 1 to 9"),
        (SEED, 2**63, "an integer in 0 to 2**63 - 1"),
        (number(above=0), 0.0, "a number, positive and finite"),
        (number(above=0), math.nan, "a number, positive and finite"),
        (number(above=0, below=1), 1, "a number, above 0 and below 1"),
        (number(least=0), math.inf, "a number, at least 0 and finite"),
        (number(least=0, most=math.inf), math.nan, "a number, at least 0 and at most inf"),
        (number(), 10**400, "a number, finite"),
        (number(), False, "a number, finite"),
        (number().or_none(), "1", "a number, finite, or None"),
        (FLAG, 1, "True or False"),
        (one_of(Color), ["red"], "one of 'red', 'blue'"),
        (TEXTS, "ab", "a list of texts, at least one"),
        (TEXTS, [], "a list of texts, at least one"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_it_must_be(check, given, wanted):
    with pytest.raises(ValueError) as error:
        check("x", given)
    assert str(error.value) == f"x is {shown(given)}; it must be {wanted}"


def test_another_class_is_a_type_error():
    with pytest.raises(TypeError, match=r"^x is 3; it must be an instance of dict, or None$"):
        instance_of(dict).or_none()("x", 3)


def test_long_and_unprintable_values_are_shown_in_short():
    assert shown("a" * 1000) == f"'{'a' * 199}…"
    assert shown(10**5000) == "a int too large to be shown"


def test_the_fields_of_a_frozen_dataclass_are_checked_and_kept():
    @dataclasses.dataclass(frozen=True)
    class Config:
        size: int = 3

        def __post_init__(self):
            check_fields(self, size=integer(1))

    assert type(Config(np.int32(4)).size) is int
    with pytest.raises(ValueError, match="size is 0"):
        Config(0)


CONFIGURATIONS = [
    *(CollectionConfig, EncoderTuningConfig, EditorConfig, TrainingConfig, DiTConfig),
    *(SamplerConfig, RoutingConfig, NoiseSchedule, Execution),
]


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_no_field_of_a_configuration_takes_just_anything(kind):
    for field in dataclasses.fields(kind):
        with pytest.raises((TypeError, ValueError), match=field.name):
            kind(**{field.name: object()})


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_numbers_of_numpy_are_kept_as_python_has_them(kind):
    plain = {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}
    given = {
        name: np.float64(value) if type(value) is float else np.int64(value)
        for name, value in plain.items()
        if type(value) in (int, float)
    }
    made = kind(**given)
    assert made == kind()
    json.dumps({name: getattr(made, name) for name in given})


def _layer(number):
    model = tiny.make_language_model(tiny.make_tokenizer())
    attached = attach(model, number(2))
    attached.detach()
    return type(attached.layer), attached.layer


def _layers(number):
    tokenizer = tiny.make_tokenizer()
    prompted = PromptedModel.of(tiny.make_language_model(tokenizer), tokenizer)
    config = CollectionConfig(max_steps=number(1))
    compared = compare_layers(prompted, tiny.EDITED[:2], [number(0)], config)
    return json.dumps([quality.layer for quality in compared.layers])


def _answers(number):
    tokenizer = tiny.make_tokenizer()
    prompted = PromptedModel.of(tiny.make_language_model(tokenizer), tokenizer)
    keywords = {"no_repeat_ngram_size": 1, "min_new_tokens": 2, "eos_token_id": 5}
    given = {name: number(value) for name, value in keywords.items()}
    return prompted.answers(tiny.QUERIES, number(4), **given)


def _neurons(number):
    layout = NeuronLayout(number(2), number(3), True, "gelu")
    flat = torch.arange(3.0 * layout.dim).view(3, -1)
    neurons = layout.unpack(flat)
    return [layout.pack(neurons[rows([number(0), number(2)])]).tolist() for rows in (list, tuple)]


def _attention(number):
    qkv = torch.ones(1, 3, 96) * torch.arange(96)
    return short_attention(qkv, num_heads=number(2)).tolist()


@pytest.mark.parametrize("use", [_layer, _layers, _answers, _neurons, _attention])
@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_numpys_whole_numbers_are_taken_as_pythons(use, kind):
    assert use(kind) == use(int)
