"""Editing is training, also where the caller has turned gradients off."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tiny import (
    BANK,
    CONFIG,
    FURTHER,
    MIXED,
    MOST,
    edit,
    load,
    make_editor,
    make_encoder,
    make_language_model,
    make_tokenizer,
    state,
)

from meg_kernels import (
    CollectionConfig,
    EditorConfig,
    EncoderTuningConfig,
    GeneratorConfig,
    MeGEditor,
)
from meg_kernels.editing.layers import compare_layers
from meg_kernels.gradients import with_gradients

# A few steps of everything: it need not learn, but it must come out the same.
SHORT = EditorConfig(
    layer=CONFIG.layer,
    collection=CollectionConfig(learning_rate=0.1, max_steps=4),
    encoder_tuning=EncoderTuningConfig(epochs=1, batch_size=8, alike_batches=False),
    generator=GeneratorConfig.mlp(width=16, max_steps=10, check_every=5),
)


def life(around, folder):
    """Everything that trains, each in its own `around`, and asking in between."""
    with around():
        editor = make_editor(SHORT)
        edit(editor)
        editor.generate(MIXED[:4], MOST)
    with around():
        editor.add(FURTHER)
        editor.remove(FURTHER[0])
        editor.set_gate(threshold=0.5)
        editor.train()
        editor.save_pretrained(folder)
    editor.detach()
    with around():
        loaded = load(folder)
        loaded.add(FURTHER[:1])
        loaded.train()
    return state(loaded)[2:]


def test_an_editors_life_is_the_same_whatever_the_caller_turned_off(tmp_path):
    plain = life(contextlib.nullcontext, tmp_path / "plain")
    assert life(torch.no_grad, tmp_path / "no_grad") == plain

    # What is made outside takes part in gradients; tests make their models themselves.
    @contextlib.contextmanager
    def inference():
        with torch.inference_mode():
            yield

    made = with_gradients(make_language_model), with_gradients(make_encoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiny.make_language_model", made[0])
        patch.setattr("tiny.make_encoder", made[1])
        assert life(inference, tmp_path / "inference") == plain


def test_a_familiarity_gate_is_trained_whatever_the_caller_turned_off():
    editor = make_editor(BANK)
    edit(editor)
    with torch.inference_mode():
        assert editor.set_gate("familiarity").auroc > 0.5


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_layers_are_compared_whatever_the_caller_turned_off(around):
    editor = make_editor()
    editor.detach()
    with around():
        comparison = compare_layers(editor.prompted, FURTHER, [1], SHORT.collection)
    assert {quality.layer for quality in comparison.layers} == {1, 2}


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_loaded_models_take_part_in_gradients(around, tmp_path):
    tokenizer = make_tokenizer()
    make_language_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    make_encoder().save_pretrained(tmp_path / "encoder")
    with around():
        editor = MeGEditor.for_model(
            str(tmp_path / "model"), CONFIG, encoder=str(tmp_path / "encoder"), device="cpu"
        )
    for module in (editor.model, editor.encoder):
        assert not any(parameter.is_inference() for parameter in module.parameters())
