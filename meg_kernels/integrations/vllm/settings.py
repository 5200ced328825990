"""What vLLM is told about the edited model that it serves, and what is refused by name."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meg_kernels.checks import as_path
from meg_kernels.integrations.vllm import ARCHITECTURES, BY_TRANSFORMERS, PLUGINS
from meg_kernels.routing.manifest import read_manifest

KEY = "meg"  # in vLLM's additional_config
ADVICE = "make it with meg_kernels.integrations.vllm.additional_config(folder), or run meg serve"

# By what a user asked for, where vLLM's configuration says so, and the value with which it is off.
_REFUSED: tuple[tuple[str, str, str, Any], ...] = (
    ("speculative decoding", "speculative_config", "", None),
    ("LoRA adapters", "lora_config", "", None),
    ("KV transfer", "kv_transfer_config", "", None),  # of whose connectors some ignore salts
    ("pipeline parallelism", "parallel_config", "pipeline_parallel_size", 1),
    ("data parallelism", "parallel_config", "data_parallel_size", 1),
    ("prefill context parallelism", "parallel_config", "prefill_context_parallel_size", 1),
    ("decode context parallelism", "parallel_config", "decode_context_parallel_size", 1),
    ("several API servers", "parallel_config", "_api_process_count", 1),
    ("dual batch overlap", "parallel_config", "enable_dbo", False),
    ("microbatches", "parallel_config", "use_ubatching", False),
    ("prompt embeddings", "model_config", "enable_prompt_embeds", False),
    ("fast prefill with shared keys", "cache_config", "kv_sharing_fast_prefill", False),
)


@dataclass(frozen=True)
class Settings:
    """Which edited model vLLM serves: in its `additional_config`, which keys what it compiles.

    Args:
        edited: the folder, absolute.
        layer: the decoder layer with the neurons, from 0.
        d_in: width of what keys read.
        d_out: width of what values are added to.
        has_bias: whether the neurons have biases.
        activation: theirs.
    """

    edited: str
    layer: int
    d_in: int
    d_out: int
    has_bias: bool
    activation: str

    @classmethod
    def of_folder(cls, folder: str | Path) -> Settings:
        """Those with which the edited model in this folder is served.

        Raises:
            FileNotFoundError: there are no edits.
            CorruptFileError: the manifest is damaged, or of a newer version of the format.
            ValueError: it gives each wording of a query a neuron of its own.
        """
        path = as_path("folder", folder).resolve()
        manifest = read_manifest(path)
        if not manifest["config"]["snap"]:
            raise ValueError(
                f"{path} does not snap: each wording of a query has its own neuron, and vLLM holds "
                "one for each fact; edit with snap=True, or serve it with MeGEditor.generate"
            )
        return cls(str(path), manifest["base"]["identity"]["layer"], **manifest["layout"])

    @classmethod
    def of(cls, vllm_config: Any) -> Settings | None:
        """Those in vLLM's configuration; None if it serves no edited model.

        Raises:
            ValueError: they are not those of the folder, the language model is another one, or
                something is asked for that does not go together with neurons.
        """
        given = getattr(vllm_config, "additional_config", None) or {}
        given = given.get(KEY) if isinstance(given, dict) else None
        if given is None:
            return None
        if not isinstance(given, dict) or not isinstance(given.get("edited"), str):
            raise ValueError(f"additional_config[{KEY!r}] names no edited model; {ADVICE}")
        settings = cls.of_folder(given["edited"])
        if given != asdict(settings):
            raise ValueError(
                f"additional_config[{KEY!r}] is {given}, and {settings.edited} is served with "
                f"{asdict(settings)}; {ADVICE}"
            )
        settings._check(vllm_config)
        return settings

    def to_config(self) -> dict[str, Any]:
        """The same as vLLM's `additional_config`.

        Raises:
            RuntimeError: vLLM was told to load other plugins alone, and would serve the base model.
        """
        chosen = os.environ.get(PLUGINS)
        if chosen is not None and KEY not in chosen.split(","):
            raise RuntimeError(f"{PLUGINS} is {chosen!r}, without {KEY}; add it, or unset it")
        return {KEY: asdict(self)}

    def _check(self, vllm_config: Any) -> None:
        for what, part, name, off in _REFUSED:
            value = getattr(vllm_config, part, off)
            value = getattr(value, name, off) if name and value is not None else value
            if value != off and not (off is False and not value):
                shown = f" ({name} is {value})" if name else ""
                raise ValueError(
                    f"edited models are served without {what}{shown}; start vLLM without it"
                )
        model = vllm_config.model_config
        carry = ARCHITECTURES | BY_TRANSFORMERS
        if model.architecture not in carry:
            raise ValueError(
                f"vLLM's {model.architecture} carries no neurons; these do: " + ", ".join(carry)
            )
        if model.runner_type != "generate":
            raise ValueError(f"vLLM's runner is {model.runner_type!r}; edited models generate text")
        if getattr(vllm_config.compilation_config.pass_config, "enable_sp", False):
            raise ValueError(
                "edited models are served without sequence parallelism; start vLLM without it"
            )
        noted = read_manifest(Path(self.edited))["base"]["identity"]
        found = model.hf_text_config
        for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
            value = getattr(found, name, None)
            if noted.get(name) is not None and value != noted[name]:
                raise ValueError(
                    f"{self.edited} edits a model whose {name} is {noted[name]!r}, and that of "
                    f"{model.model} is {value!r}; serve the model that was edited"
                )
