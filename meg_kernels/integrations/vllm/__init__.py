"""Edited models served by vLLM: a plugin, without a fork, that gives each request its neuron.

    meg serve FOLDER                                           # vLLM's OpenAI server
    LLM(model, additional_config=additional_config("edited"))  # offline

    settings.py      what is served, and what is refused
    front_end.py     routes what is asked, in a thread; salts the prefix cache by the neuron
    renderers.py     vLLM's renderers, which show the front end what is asked
    table.py         the neurons of all facts, in the worker; a token carries a row number
    models.py        vLLM's models, with the table at the edited feed-forward layer
    workers.py       which token has which row, in both of vLLM's model runners; reloading
    endpoints.py     /v1/meg, /v1/meg/reload, and the counters in /metrics
    server.py        the command line of `meg serve`

vLLM calls `register` in each of its processes. Without `additional_config["meg"]` all that is
registered does what vLLM's own does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["additional_config", "endpoints", "register"]

PLUGINS = "VLLM_PLUGINS"  # the plugins that vLLM loads, if this is set
# By vLLM's name of an architecture, which is transformers': the module and class that serve it.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", "LlamaForCausalLM"),
    "MistralForCausalLM": ("mistral", "MistralForCausalLM"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM"),
    "GemmaForCausalLM": ("gemma", "GemmaForCausalLM"),
    "Gemma2ForCausalLM": ("gemma2", "Gemma2ForCausalLM"),
    "GPT2LMHeadModel": ("gpt2", "GPT2LMHeadModel"),
    "GPTJForCausalLM": ("gpt_j", "GPTJForCausalLM"),
}
# These vLLM builds from transformers' own code, and calls by another name: they are registered only
# where an edited model is served.
BY_TRANSFORMERS = dict.fromkeys(
    ("GPTNeoXForCausalLM", "PhiForCausalLM", "SmolLM3ForCausalLM"),
    ("transformers", "TransformersForCausalLM"),
)
WANTED = "MEG_KERNELS_VLLM"  # this is set there, and vLLM's processes inherit it


def register() -> None:
    """Make vLLM's models and renderers carry neurons where that is configured."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY

    from meg_kernels.integrations.vllm import renderers

    wanted = ARCHITECTURES | (BY_TRANSFORMERS if WANTED in os.environ else {})
    for architecture in wanted:
        ModelRegistry.register_model(architecture, f"{__name__}.models:{architecture}")
    for mode, original in [*RENDERER_REGISTRY.renderers.items()]:
        if original[0] != renderers.__name__:  # its own `register` warns of what is replaced
            renderers.ORIGINALS[mode] = original
            RENDERER_REGISTRY.renderers[mode] = renderers.__name__, mode


def endpoints() -> Any:
    """The plugin with endpoints for vLLM: /v1/meg and /v1/meg/reload."""
    from meg_kernels.integrations.vllm.endpoints import Endpoints

    return Endpoints()


def additional_config(folder: str | Path) -> dict[str, Any]:
    """What vLLM is given as `additional_config` to serve an edited model, in this process.

    Args:
        folder: where `MeGEditor.save_pretrained` or `meg edit` wrote.

    Raises:
        FileNotFoundError: there are no edits.
        CorruptFileError: a file is damaged, or of a newer version of the format.
        ValueError: the edited model cannot be served so; the message says why.
        RuntimeError: vLLM was told not to load this plugin.
    """
    from meg_kernels.integrations.vllm.settings import Settings

    config = Settings.of_folder(folder).to_config()
    os.environ[WANTED] = "1"
    if "vllm" in sys.modules:  # whose plugins may have been loaded before
        register()
    return config
