"""The familiarity gate: is this query, in some wording, one of the edited ones?

Section 3.4 of the paper.

A rejected query gets no neuron and leaves the base model as it is, so that Locality is the gate's
doing. Two gates: the paper's `FamiliarityNetwork` (low entropy of a classifier means familiar),
and `SimilarityGate` (cosine to the nearest edited query). Each gives a score, higher means more
familiar, and accepts above a threshold, which `calibrate` sets on held-out queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meg_kernels.arguments import check_alike, check_floating
from meg_kernels.checks import SEED, integer, number
from meg_kernels.kernels.limits import MAX_CLASSES
from meg_kernels.ops.softmax_entropy import softmax_entropy
from meg_kernels.progress import progress_bar
from meg_kernels.scoped import seeded


@dataclass(frozen=True)
class Calibration:
    """How well a gate tells edited queries in other words from all others, on held-out queries.

    Args:
        threshold: the score above which a query counts as edited.
        auroc: area under the ROC curve.
        acceptance: share of held-out paraphrases accepted.
        rejection: share of held-out other queries rejected.
        num_positives, num_negatives: how many of each were held out.
        num_edited: the number of edited queries when the gate was calibrated.
    """

    threshold: float
    auroc: float
    acceptance: float
    rejection: float
    num_positives: int
    num_negatives: int
    num_edited: int


def calibrate(
    positive: Tensor, negative: Tensor, num_edited: int, rejection_weight: float = 1.0
) -> Calibration:
    """The threshold with the best acceptance + rejection_weight * rejection.

    Args:
        positive: [P] scores of queries that the gate should accept.
        negative: [Q] scores of queries that it should reject.
        num_edited: the number of edited queries.
        rejection_weight: how much worse it is to accept a query wrongly than to reject one wrongly.

    Raises:
        TypeError: positive or negative is no tensor.
        ValueError: one of them is empty or not finite, or a number is out of range.

    >>> calibrate(torch.tensor([0.875, 0.75]), torch.tensor([0.125, 0.25]), 2).threshold
    0.5
    """
    check_floating(positive=positive, negative=negative)
    num_edited = integer(0)("num_edited", num_edited)
    rejection_weight = number(least=0)("rejection_weight", rejection_weight)
    for name, scores in (("positive", positive), ("negative", negative)):
        if scores.dim() != 1 or not len(scores) or not bool(scores.isfinite().all()):
            raise ValueError(
                f"{name} must be finite scores, at least one; got {tuple(scores.shape)}, "
                f"{int((~scores.isfinite()).sum())} of them not finite"
            )
    positive, negative = positive.double().cpu(), negative.double().cpu()
    scores = torch.cat([positive, negative]).unique()  # ascending
    # Between neighbouring scores every threshold decides alike: their middle stands for all.
    candidates = torch.cat([(scores[:-1] + scores[1:]) / 2, scores[-1:]])
    acceptance = (positive.unsqueeze(1) > candidates).double().mean(0)
    rejection = (negative.unsqueeze(1) <= candidates).double().mean(0)
    best = int((acceptance + rejection_weight * rejection).argmax())
    wins = (positive.unsqueeze(1) > negative).double() + 0.5 * (positive.unsqueeze(1) == negative)
    return Calibration(
        float(candidates[best]),
        float(wins.mean()),
        float(acceptance[best]),
        float(rejection[best]),
        len(positive),
        len(negative),
        num_edited,
    )


def transplant(z: Tensor, origin: Tensor, target: Tensor) -> Tensor:
    """Move unit vectors z from beside `origin` to beside `target`, keeping their angles to it.

    The reflection that swaps origin and target turns a held-out fact's paraphrase into one of an
    edited fact: exactly as far from its query as real paraphrases are. All arguments [B, dim].
    """
    axis = F.normalize(origin - target, dim=-1)
    return z - 2 * (z * axis).sum(-1, keepdim=True) * axis


@dataclass(frozen=True)
class Rewording:
    """Other wordings of queries, as far from them as paraphrases that are known are from theirs.

    Args:
        queries, paraphrases: [H, dim] unit vectors of some queries and of a paraphrase of each.
    """

    queries: Tensor
    paraphrases: Tensor

    def __call__(self, z: Tensor, rng: torch.Generator) -> Tensor:
        """[B, dim] the condition of another wording, for each of the conditions z [B, dim]."""
        rows = torch.randint(len(self.queries), (len(z),), generator=rng).to(z.device)
        return transplant(self.paraphrases[rows], self.queries[rows], z)


def _check_rows(name: str, rows: Tensor, width: int | None = None) -> None:
    """Raise unless `rows` is floating-point [N, width]."""
    check_floating(**{name: rows})
    if rows.dim() != 2 or not rows.shape[1] or (width is not None and rows.shape[1] != width):
        expected = f"[N, {'dim' if width is None else width}]"
        raise ValueError(f"{name} is {tuple(rows.shape)}; it must be {expected}, one row a query")


def nearest(z: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest edited query of each query: the first of the `nearest_few`.

    Returns:
        [B] the cosine to the nearest one (-1 if none is edited), and [B] int64 its row (-1).
    """
    similarity, row = nearest_few(z, conditions, 1)
    return similarity[:, 0], row[:, 0]


def nearest_few(z: Tensor, conditions: Tensor, few: int) -> tuple[Tensor, Tensor]:
    """The nearest edited queries of each query, the nearest one first.

    Args:
        z: [B, dim] unit vectors of queries.
        conditions: [N, dim] unit vectors of the edited queries.
        few: how many; all, if fewer are edited.

    Returns:
        [B, few] cosines (one of -1 if none is edited), and [B, few] int64 their rows (-1).

    Raises:
        TypeError: one of them is no tensor.
        ValueError: their shapes, dtypes or devices do not fit.
    """
    _check_rows("conditions", conditions)
    _check_rows("z", z, conditions.shape[1])
    check_alike(z, conditions=conditions)
    if not len(conditions):
        return z.new_full((len(z), 1), -1.0), z.new_full((len(z), 1), -1, dtype=torch.int64)
    similarity = z @ conditions.T
    if few == 1:  # faster
        return similarity.max(1, keepdim=True)
    return similarity.topk(min(few, len(conditions)))


class SimilarityGate(nn.Module):
    """What lies close to an edited query is familiar.

    Args:
        conditions: [N, dim] unit vectors of the edited queries.
        threshold: cosine above which a query is accepted.

    Raises:
        TypeError: conditions is no tensor.
        ValueError: conditions has another shape or dtype, or threshold is no finite number.
    """

    kind: Literal["similarity"] = "similarity"
    conditions: Tensor

    def __init__(self, conditions: Tensor, threshold: float = 0.75):
        _check_rows("conditions", conditions)
        super().__init__()
        self.register_buffer("conditions", conditions)
        self.threshold = number()("threshold", threshold)

    def score(self, z: Tensor) -> Tensor:
        """[B] cosine of each of the conditions z [B, dim] to the nearest edited query's."""
        return nearest(z, self.conditions)[0]

    def over(self, conditions: Tensor) -> SimilarityGate:
        """A gate with this one's threshold, over these edited queries' conditions [N, dim]."""
        return SimilarityGate(conditions, self.threshold)


class _ResidualBlock(nn.Module):
    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class FamiliarityNetwork(nn.Module):
    """The paper's gate: a classifier of edited queries into random classes.

    It is trained to certainty on the edited queries; on others it stays uncertain. The score is
    minus the entropy of its prediction, in nats.

    Args:
        dim: length of a condition.
        classes: of the random labels.
        depth: residual blocks.
        dropout: in the blocks.
        threshold: minus the paper's epsilon: a query of lower entropy is accepted.

    Raises:
        ValueError: a number is out of its range.
    """

    kind: Literal["familiarity"] = "familiarity"

    def __init__(
        self,
        dim: int,
        classes: int = 10,
        depth: int = 5,
        dropout: float = 0.1,
        threshold: float = -0.3,
    ):
        classes = integer(2, MAX_CLASSES)("classes", classes)
        depth = integer(0)("depth", depth)
        dropout = number(least=0, most=1)("dropout", dropout)
        super().__init__()
        self.dim = dim = integer(1)("dim", dim)
        self.blocks = nn.Sequential(*(_ResidualBlock(dim, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        self.threshold = number()("threshold", threshold)

    def forward(self, z: Tensor) -> Tensor:
        """[B, classes] logits of the conditions z [B, dim]."""
        _check_rows("z", z, self.dim)
        return self.head(self.norm(self.blocks(z * z.shape[-1] ** 0.5)))

    def over(self, conditions: Tensor) -> FamiliarityNetwork:
        """This network: what it is familiar with is in its weights, until they are fitted again."""
        return self

    @torch.no_grad()
    def score(self, z: Tensor) -> Tensor:
        """[B] minus the entropy, in nats: from -log(classes), unknown, to 0, certain."""
        return -softmax_entropy(self(z).float())

    def fit(
        self,
        conditions: Tensor,
        outliers: Tensor | None = None,
        *,
        steps: int | None = None,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        """Learn the edited queries by heart.

        Args:
            conditions: [N, dim] of the edited queries; each gets a random class.
            outliers: [M, dim] conditions of other queries, which the network is taught to be
                uncertain about (the uniform distribution). The paper has none; with them the gate
                separates far better.
            steps: of AdamW; default: 200, or 50 passes over the queries if that is more.
            batch_size: queries in each step, and as many outliers.
            learning_rate: AdamW's.
            seed: of the classes, the batches and the dropout.
            progress: show a progress bar.

        Raises:
            TypeError: conditions or outliers is no tensor.
            ValueError: no conditions, or an argument is out of range.
        """
        _check_rows("conditions", conditions, self.dim)
        if outliers is not None:
            _check_rows("outliers", outliers, self.dim)
        steps = integer(1).or_none()("steps", steps)
        batch_size = integer(1)("batch_size", batch_size)
        learning_rate = number(above=0)("learning_rate", learning_rate)
        seed = SEED("seed", seed)
        for name, rows in (("conditions", conditions), ("outliers", outliers)):
            if rows is not None and not bool(rows.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinity; leave such rows out")
        if not len(conditions):
            raise ValueError("there are no queries to become familiar with")
        if steps is None:
            steps = max(200, math.ceil(50 * len(conditions) / batch_size))
        rng = torch.Generator().manual_seed(seed)
        classes = self.head.out_features
        labels = torch.randint(classes, (len(conditions),), generator=rng).to(conditions.device)
        optimizer = torch.optim.AdamW(self.parameters(), lr=learning_rate, fused=True)
        self.train()
        with seeded(seed, conditions.device):  # for the dropout
            for _ in progress_bar(range(steps), desc="familiarity", shown=progress, leave=False):
                rows = torch.randint(
                    len(conditions), (min(batch_size, len(conditions)),), generator=rng
                )
                loss = F.cross_entropy(self(conditions[rows]), labels[rows])
                if outliers is not None and len(outliers):
                    away = torch.randint(len(outliers), (len(rows),), generator=rng)
                    loss = loss - F.log_softmax(self(outliers[away]), dim=-1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self.eval()


Gate = SimilarityGate | FamiliarityNetwork
