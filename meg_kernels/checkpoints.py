"""Checkpoints of transformers: where they are, whether they are whole, what is wrong with them.

transformers fills a weight that a checkpoint lacks with random numbers, asks a hub that does not
answer again and again, and lets a damaged file end in whatever error its reader raises.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import HFValidationError, get_session, validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import hub

from meg_kernels.storage import CorruptFileError, read_json

log = logging.getLogger(__name__)

HUB_SECONDS = 5.0  # within which a hub that can be reached at all has answered
LISTED = 5  # of what is wrong, in a message
_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"  # an environment variable of transformers
# Buffers that earlier versions of transformers saved, and that are made anew today.
_OLD_BUFFERS = re.compile(
    r"(^|\.)(position_ids|masked_bias|(attn|attention)\.bias|rotary_emb\.\w+|inv_freq"
    r"|embed_positions\.weights)$"
)


_LOADING = threading.RLock()
# Numbers of a configuration that say how many parts are built one by one.
_PARTS = {
    *("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
    *("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"),
}
_MANY_PARTS = 1000
_PACKED = 16  # a quantised checkpoint holds so many times fewer numbers, at most
_FEW = 1_000_000  # numbers that nobody misses


@contextlib.contextmanager
def reaching(source: str | Path, local_files_only: bool = False) -> Iterator[None]:
    """Inside, transformers looks for a checkpoint where it can be, and asks nobody in vain.

    A hub that does not answer would be asked again and again, for half a minute; whether it does
    is asked once. Nor is anyone asked to convert pickled weights there, which transformers does in
    a thread of its own that keeps the program from ending. All this is one for all threads, so that
    they take turns.

    Args:
        source: a folder, or a Hugging Face model id.
        local_files_only: whether the caller rules the hub out.

    Raises:
        FileNotFoundError: no folder is there, and no model id looks so.
        NotADirectoryError: there is a file.
    """
    local = os.path.isdir(source)
    if not local:
        _check_id(source)
    with _LOADING, contextlib.ExitStack() as until:
        offline = not local and (
            local_files_only or not (constants.HF_HUB_OFFLINE or _hub_answers())
        )
        before = os.environ.get(_NO_CONVERSION)
        until.callback(_set_variable, _NO_CONVERSION, before)
        _set_variable(_NO_CONVERSION, "1")
        # transformers 4 has a copy of its own.
        for owner, name in ((constants, "HF_HUB_OFFLINE"), (hub, "_is_offline_mode")):
            if offline and hasattr(owner, name):
                until.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, True)
        yield


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _check_id(source: str | Path) -> None:
    """Raise FileNotFoundError or NotADirectoryError unless a model on the hub may be called so."""
    if os.path.isfile(source):
        raise NotADirectoryError(f"{source} is a file; name the folder that it lies in")
    try:
        validate_repo_id(str(source))
        if isinstance(source, Path) or source != source.strip() or not source:
            raise HFValidationError
    except HFValidationError:
        raise FileNotFoundError(f"there is no folder {str(source)!r}") from None


def _hub_answers() -> bool:
    """Whether anything answers where the hub is, asked once, the way all requests to it go."""
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # each version of huggingface_hub has its own
        log.warning(
            "%s does not answer (%s); only models that were downloaded before are looked for",
            constants.ENDPOINT,
            error,
        )
        return False
    return True


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The whole numbers of a configuration and of its parts, by their names."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        yield from ((name, value) for name, value in part.items() if type(value) is int)


def check_sizes(source: str | Path, auto: Any, **loading: Any) -> None:
    """Refuse a folder whose config.json describes a far larger model than its tensors make.

    transformers would build it, fill what is missing with random numbers, and take all memory.

    Args:
        source: a folder with a checkpoint; what is none is passed over.
        auto: what loads such a model, such as `AutoModelForCausalLM`.
        loading: keywords of `AutoConfig.from_pretrained`.

    Raises:
        CorruptFileError: it does.
    """
    folder = Path(source, loading.get("subfolder") or "")
    path = folder / "config.json"
    shapes = [shape for file in folder.glob("*.safetensors") for shape in _shapes(file)]
    if not shapes or not path.is_file():
        return
    config = read_json(path)
    numbers = [*_numbers(config)]
    most = max(len(shapes), _MANY_PARTS)  # below that, what is missing is told by name
    for name, number in numbers:
        if name in _PARTS and number > most:
            raise CorruptFileError(
                f"{path} says {name} {number}, but the checkpoint beside it has {len(shapes)} "
                "tensors; restore the file"
            )
    longest = max(size for shape in shapes for size in (0, *shape))
    if all(number <= longest for _, number in numbers):
        return
    code = {"trust_remote_code": loading.get("trust_remote_code", False)}
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.from_pretrained(source, **loading), **code)
    wanted = sum(weight.numel() for weight in model.parameters())
    there = sum(math.prod(shape) for shape in shapes)
    if wanted > _PACKED * there + _FEW:
        raise CorruptFileError(
            f"{path} describes a model of {wanted:,} numbers, but the checkpoint beside it holds "
            f"{there:,}; restore the file"
        )


def _shapes(path: Path) -> list[list[int]]:
    """Of a file's tensors; CorruptFileError if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptFileError(
            f"{path} is truncated, damaged or no safetensors file ({error}); restore it, or "
            "download or copy it again"
        ) from error


def _check_tokens(path: Path) -> None:
    """Refuse a tokenizer with a token of an enormous number: it has a place for each one below."""
    content = read_json(path)
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens = vocabulary if isinstance(vocabulary, dict) else {}
    added = added if isinstance(added, list) else []
    numbers = [*tokens.values(), *(token.get("id") for token in added if isinstance(token, dict))]
    highest = max((number for number in numbers if isinstance(number, int)), default=0)
    if highest > _PACKED * len(numbers) + _FEW:
        raise CorruptFileError(
            f"{path} gives {len(numbers):,} tokens, and one of them number {highest:,}; restore "
            "the file"
        )


def check_files(source: str | Path, thorough: bool = False) -> None:
    """Refuse a folder with a damaged file; what is no folder is passed over.

    Args:
        source: a folder with a checkpoint.
        thorough: whether to read rarer files, and pickled weights, as well.

    Raises:
        CorruptFileError: a file is truncated or damaged; the message names it.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    names = ["config.json", "generation_config.json", "tokenizer_config.json"]
    names += ["model.safetensors.index.json", "adapter_config.json", "tokenizer.json"]
    if thorough:
        names += ["special_tokens_map.json", "added_tokens.json", "vocab.json"]
    for path in (folder / name for name in names):
        if path.is_file() and not isinstance(read_json(path), dict):
            raise CorruptFileError(f"{path} holds no JSON object; restore the file")
    if (path := folder / "tokenizer.json").is_file():
        _check_tokens(path)
    for path in sorted(folder.glob("*.safetensors")):
        _shapes(path)
    for path in sorted(folder.glob("pytorch_model*.bin")) if thorough else ():
        try:
            torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # damage, or code in place of weights
            raise CorruptFileError(
                f"{path} cannot be read as pickled weights ({_first_lines(str(error), 150)}); "
                "restore it, or better, take the checkpoint as safetensors"
            ) from error
    if (index := folder / "model.safetensors.index.json").is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise CorruptFileError(f"{index} has no weight_map; restore the file")
        if absent := sorted({s for s in shards.values() if not (folder / s).is_file()}):
            raise CorruptFileError(
                f"{folder} lacks {', '.join(absent[:LISTED])}, which {index.name} names; download "
                "or copy the folder again"
            )


def explained(error: Exception, what: str, source: str | Path, may_be: str) -> Exception:
    """The error to raise in place of what transformers raised: its cause, and what to do.

    Args:
        error: as it came.
        what: the model and its name, such as `the model 'x'`.
        source: where it was looked for.
        may_be: what can be named instead.

    Returns:
        An OSError if the files are not there, a CorruptFileError if one is damaged, else a
        ValueError; what a missing package or too little memory raised, as it is.
    """
    # Where there is no tokenizer, version 4 misses what would read one of another kind.
    has_none = os.path.isdir(source) and not any(Path(source).glob("*.model"))
    if isinstance(error, ImportError) and not has_none:
        return error
    if isinstance(error, CorruptFileError | MemoryError | torch.OutOfMemoryError):
        return error
    try:
        check_files(source, thorough=True)
    except (CorruptFileError, OSError) as damage:
        return damage if isinstance(damage, CorruptFileError) else OSError(f"{damage}")
    said = _first_lines(str(error)) or type(error).__name__
    config = Path(source) / "config.json"
    if os.path.isdir(source):
        if not config.is_file():
            return OSError(f"cannot load {what}: {source} has no config.json; {may_be}")
        content = json.loads(config.read_text(encoding="utf-8"))
        kind = content.get("model_type")
        if "Unrecognized" in said or "does not recognize" in said or not isinstance(kind, str):
            return ValueError(
                f"cannot load {what}: its config.json has model_type {kind!r}, which transformers "
                f"{transformers.__version__} does not load as such a model; {may_be}, of a type "
                "that it knows"
            )
    if isinstance(error, OSError):
        return OSError(f"cannot load {what}: {may_be}\n{said}")
    return ValueError(
        f"cannot load {what}: transformers raises {type(error).__name__} ({said}); see whether its "
        "config.json, its tokenizer and the keywords belong to it"
    )


def _first_lines(text: str, most: int = 400) -> str:
    """The beginning of a message; some list every model that there is."""
    return text if len(text) <= most else f"{text[:most]} ..."


def check_whole(
    model: PreTrainedModel, loading: Mapping[str, Any], what: str, unread: re.Pattern[str]
) -> None:
    """Refuse a model that did not get exactly the weights of its checkpoint.

    Args:
        model: as it was loaded.
        loading: what transformers says about that, its `output_loading_info`.
        what: the model and its name, such as `the model 'x'`.
        unread: names of weights that nobody reads, so that they may be missing.

    Raises:
        ValueError: weights are missing, have other sizes, or lie unread in a part of the model.
    """
    # Each line's first word is of the checkpoint.
    sizes: list[str] = []
    named: set[str] = set()
    for key in sorted(loading["mismatched_keys"]):  # names in version 4, with both sizes in 5
        name, there = (key, "") if isinstance(key, str) else (key[0], f"{list(key[1])}, ")
        wanted = list(model.state_dict()[key].shape if isinstance(key, str) else key[2])
        sizes.append(f"{name} ({there}not {wanted})")
        named.add(name)
    missing = sorted(
        name for name in loading["missing_keys"] if not unread.search(name) and name not in named
    )
    unexpected = sorted(
        name
        for name in loading["unexpected_keys"]
        if not _OLD_BUFFERS.search(name) and _is_inside(model, name)
    )
    if getattr(model, "hf_quantizer", None) is not None:
        unexpected = []  # scales and zero points, by the quantisation's own names
    found = [
        (missing, "weights are missing, which transformers would fill with random numbers"),
        (sizes, "weights have other sizes than config.json says"),
        (unexpected, "weights have no place in the model that config.json describes"),
    ]
    if lines := [f"{len(names)} {said}: {_listed(names)}" for names, said in found if names]:
        raise ValueError(
            f"{what} is not whole: {'; '.join(lines)}. Restore or download the checkpoint again, "
            "with the config.json that belongs to it"
        )


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those that hold NaN or infinite values, as far as they are plain numbers."""
    # The least and the greatest are NaN where anything is: one pass, and no memory.
    ranges = [
        (name, torch.stack(torch.aminmax(tensor.detach())).isfinite().all())
        for name, tensor in tensors
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1
        if tensor.numel() and not tensor.is_meta
    ]
    return [name for name, finite in ranges if not finite]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _is_inside(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight of this name would lie in a part of `model`, not in another head."""
    roots: list[nn.Module] = [model, model.base_model]
    names = [name, name.removeprefix(f"{model.base_model_prefix}.")]
    for root in roots:
        for candidate in names:
            part: Any = root
            for step in candidate.split("."):
                child = dict(part.named_children()).get(step)
                if child is None:
                    break
                part = child
            if not any(part is root for root in roots):
                return True
    return False
