"""vLLM's `LLM` with neurons: compiled or not, in both model runners, on two workers."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

import tiny
import torch
import transformers
from oracle import MOST, SHAPE, Oracle
from vllm.engine.arg_utils import EngineArgs

from meg_kernels import MeGEditor
from meg_kernels.editing.prompting import PromptTemplate
from meg_kernels.integrations.vllm import additional_config
from meg_kernels.integrations.vllm.settings import Settings

pytestmark = pytest.mark.slow  # each starts vLLM anew
TEXTS = [f"Q: {query}\nA:" for query in [*tiny.QUERIES, *tiny.PARAPHRASES[:3], *tiny.ELSEWHERE[:8]]]
ENGINE = {
    "enforce_eager": True,
    "max_model_len": 96,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,
    "block_size": 32,
    "disable_log_stats": True,
}


def answers(base, edited, tmp_path, engine, **environment):
    """Tokens of each text with its neuron, twice, and without."""
    out = tmp_path / "said.json"
    given = {"model": str(base), "edited": str(edited), "prompts": TEXTS, "out": str(out)}
    dtype = engine.get("dtype", "float32")
    given |= {"most": MOST, "engine": ENGINE | engine | {"dtype": dtype}}
    told = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **environment}
    script = Path(__file__).with_name("offline.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(given)],
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(out.read_text())


WAYS = {
    "eager": ({}, {}),
    "compiled": ({"enforce_eager": False}, {}),
    "synchronous": ({"async_scheduling": False}, {}),
    "two workers": ({"tensor_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
    "second runner": ({}, {"MEG_TEST_V2": "1"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_engine_answers_as_transformers_does(base, edited, oracle, tmp_path, way):
    engine, environment = WAYS[way]
    first, again, off = answers(base, edited, tmp_path, engine, **environment)
    expected = [oracle.tokens(text) for text in TEXTS]
    assert first == expected and again == expected
    assert off == [oracle.tokens(text, False) for text in TEXTS] and off != expected


def test_in_bfloat16_neurons_are_the_same(base, edited, oracle, tmp_path):
    first, again, off = answers(base, edited, tmp_path, {"dtype": "bfloat16"})
    assert first == again != off
    expected = [oracle.tokens(text)[:1] for text in TEXTS]  # rounding decides later ones
    same = [said[:1] == one for said, one in zip(first, expected, strict=True)]
    assert sum(same) >= 0.75 * len(same)


SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
FAMILIES = {
    "gpt2": transformers.GPT2Config(n_embd=64, n_layer=3, n_head=2, n_positions=128),
    "phi": transformers.PhiConfig(
        **SIZES, intermediate_size=96, max_position_embeddings=128, partial_rotary_factor=0.5
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        **SIZES, intermediate_size=96, max_position_embeddings=128
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_other_families_carry_neurons_as_well(family, tmp_path):
    tokenizer, config = tiny.make_tokenizer(), FAMILIES[family]
    config.vocab_size, config.bos_token_id = len(tokenizer), None
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    base, encoder = tmp_path / "base", tmp_path / "encoder"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    tiny.make_encoder().save_pretrained(encoder)
    # Whether it learns them is another question: it has neurons in any case.
    template = PromptTemplate()  # also where the paper has another one
    config = dataclasses.replace(tiny.BANK, serve_unlearnt=True, template=template)
    editor = MeGEditor.for_model(str(base), config, encoder=str(encoder), device="cpu")
    tiny.edit(editor)
    edited = tmp_path / "edited"
    editor.save_pretrained(edited)
    first, again, off = answers(base, edited, tmp_path, {})
    oracle = Oracle(MeGEditor.from_pretrained(edited, device="cpu"))
    assert first == again == [oracle.tokens(text) for text in TEXTS]
    assert off == [oracle.tokens(text, False) for text in TEXTS] and off != first


# ---- what is refused before anything is served --------------------------------------------------


def engine_config(base, edited, **more):
    given = {"dtype": "float32", "max_model_len": 96, "block_size": 32, **more}
    return EngineArgs(
        model=str(base), additional_config=additional_config(edited), **given
    ).create_engine_config()


def test_a_configuration_that_can_be_served_is_taken(base, edited):
    settings = Settings.of(engine_config(base, edited))
    assert settings is not None and settings.edited == str(edited)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"enable_lora": True}, "LoRA adapters"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding",
        ),
    ],
)
def test_what_does_not_go_with_neurons_is_refused_by_name(base, edited, more, what):
    config = engine_config(base, edited, **more)
    with pytest.raises(ValueError, match=f"edited models are served without {what}"):
        Settings.of(config)


def test_another_model_is_refused(edited, tmp_path):
    tokenizer = tiny.make_tokenizer()
    other = tmp_path / "other"
    shape = SHAPE | {"num_hidden_layers": 2}
    tiny.make_language_model(tokenizer, **shape).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="edits a model whose num_hidden_layers is 3"):
        Settings.of(engine_config(other, edited))


def test_a_model_that_carries_no_neurons_is_refused(edited, tmp_path):
    shape = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 64, "num_hidden_layers": 3}
    config = transformers.OPTConfig(vocab_size=64, num_attention_heads=2, **shape)
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vLLM's OPTForCausalLM carries no neurons"):
        Settings.of(engine_config(tmp_path, edited, skip_tokenizer_init=True))


def test_another_implementation_of_the_model_is_refused(base, edited):
    with pytest.raises(ValueError, match="TransformersForCausalLM carries no neurons"):
        Settings.of(engine_config(base, edited, model_impl="transformers"))


def test_settings_of_another_layer_are_refused(base, edited):
    config = engine_config(base, edited)
    given = dataclasses.asdict(Settings.of_folder(edited)) | {"layer": 2}
    config.additional_config = {"meg": given}
    with pytest.raises(ValueError, match="is served with"):
        Settings.of(config)
    assert Settings.of(SimpleNamespace(additional_config=None)) is None
