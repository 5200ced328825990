"""The stages between collection and training: the encoder is tuned, and a gate is made.

Both learn from facts that are not edited: most of them tune the encoder, the others are held out
and calibrate the gate's threshold.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from meg_kernels.editing.config import EditorConfig
from meg_kernels.facts import Fact, FactsError, FactsLike, as_facts, listing, unrelated_to
from meg_kernels.familiarity import (
    Calibration,
    FamiliarityNetwork,
    Gate,
    SimilarityGate,
    calibrate,
)
from meg_kernels.pretrained import MULTILINGUAL_ENCODER
from meg_kernels.routing.edits import Edits, HeldOut
from meg_kernels.routing.router import FEW_FACTS, Router, RoutingConfig
from meg_kernels.scoped import seeded
from meg_kernels.shipped import shipped_tuning_facts, shipped_unrelated_queries
from meg_kernels.storage import (
    CorruptFileError,
    WorkFolder,
    fingerprint,
    read_tensors,
    write_tensors,
)
from meg_kernels.text_encoder import EncoderTuningConfig, TextEncoder, Wordings
from meg_kernels.texts import as_texts, names, normalized_query

FEWEST_TUNING_FACTS = 8
SAME = 0.985  # a cosine from which on conditions count as one
BLOCK = 1024  # facts that are compared with all others at once
CROWD = FEW_FACTS  # facts before one that have its condition, of which more are not looked at
CALIBRATED_TO = 1.5  # the gate is calibrated again when the number of facts changed by this factor


class Stopwatch:
    """Seconds of named stages.

    Attributes:
        seconds: of each stage so far, in the order in which they began.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds that the `with` block takes to those of the stage."""
        started = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a stage, such as those that it took before an interruption."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def warn_of_alike(router: Router, facts: Sequence[Fact], kept: Edits | None = None) -> None:
    """Warn of facts whose queries have one condition, although their answers differ.

    No gate tells them apart, unless their subjects do. So it is with questions in a language that
    the encoder does not know.

    Args:
        router: whose encoder makes the conditions.
        facts: that are about to be edited.
        kept: that are edited already.
    """
    conditions = router.encode([fact.query for fact in facts])
    others = [*(() if kept is None else kept.facts), *facts]
    everything = conditions if kept is None else torch.cat([kept.conditions, conditions])
    first, pairs = len(others) - len(facts), []
    for start in range(first, len(others), BLOCK):
        block = everything[start : start + BLOCK] @ everything.T > SAME
        block = block.tril(start - 1)  # each with those before it
        for i in block.any(1).nonzero()[:, 0].tolist():
            alike = block[i].nonzero()[:CROWD, 0].tolist()
            row = start + i
            taken = (o for o in alike if _one_for_the_other(others[row], others[o], router.config))
            # So many that the right one may not be among the nearest, whatever it is called.
            other = alike[0] if len(alike) == CROWD else next(taken, None)
            if other is not None:
                pairs.append(f"{others[row].query!r} and {others[other].query!r}")
    if pairs:
        head = f"queries that the encoder hardly tells from another one's ({len(pairs)})"
        warnings.warn(
            f"{listing(head, pairs)}\nthey may get each other's answers; give each fact its "
            "subject, reword them, or take an encoder that knows their language "
            f"(meg edit --encoder {MULTILINGUAL_ENCODER}, or encoder=...)",
            stacklevel=3,
        )


def _one_for_the_other(one: Fact, other: Fact, config: RoutingConfig) -> bool:
    """Whether a gate that finds two facts equally near may take either, to another answer."""
    if one.normalized_answer == other.normalized_answer:
        return False
    named = other.is_named_in(one.query) or one.is_named_in(other.query)
    return named or not config.require_subject


def usable_for_tuning(
    tuning: Sequence[Fact],
    edited: Sequence[Fact],
    config: EditorConfig,
    num_edited: int | None = None,
) -> list[Wordings]:
    """The wordings of tuning facts that have nothing to do with what is edited, shuffled.

    Args:
        tuning: facts with paraphrases.
        edited: what is edited.
        config: how many are used, and the seed of the choice.
        num_edited: how many facts will be edited; default: as many as are edited.

    Raises:
        FactsError: fewer than 8 are usable.
    """
    usable = []
    for fact in unrelated_to(tuning, edited):
        same = tuple(dict.fromkeys((fact.query, *fact.paraphrases)))
        if len(same) > 1:
            different = tuple(other.query for other in fact.locality)
            usable.append(Wordings(same, different, fact.named_subject))
    if len(usable) < FEWEST_TUNING_FACTS:
        raise FactsError(
            f"{len(usable)} of {len(tuning)} tuning facts have a paraphrase and neither query "
            f"nor subject in common with an edited fact; at least {FEWEST_TUNING_FACTS} are "
            "needed: pass others"
        )
    random.Random(config.seed).shuffle(usable)
    return usable[: config.tuning_facts_for(len(edited) if num_edited is None else num_edited)]


def tuned_router(
    router: Router,
    wordings: Sequence[Wordings],
    unrelated: Sequence[str],
    config: EditorConfig,
    work_folder: str | Path | None,
    progress: bool,
) -> tuple[Router, HeldOut, float]:
    """A router with a tuned encoder: most of the wordings tune it, the others are held out.

    Args:
        router: a copy of whose encoder is tuned; it may go on answering meanwhile.
        wordings: of tuning facts.
        unrelated: queries about anything.
        config: the share that is held out, and how to tune.
        work_folder: keeps the tuned encoder.
        progress: show a progress bar.

    Returns:
        The router, without edits; the conditions of what was held out; and the seconds that tuning
        took before an interruption, if it was finished then.
    """
    router = Router(copy.deepcopy(router.encoder), None, router.config, router.device)
    num_held = max(2, round(len(wordings) * config.calibration_share))
    tuned, held = wordings[num_held:], wordings[:num_held]
    seconds = _tune_once(
        router.encoder, tuned, config.encoder_tuning, WorkFolder.of(work_folder), progress
    )
    pairs = [(w.same[0], other, w.subject) for w in held for other in w.same[1:]]
    alike = [(w.same[0], other, w.subject) for w in held for other in w.different]
    held_out = HeldOut(
        router.encode([query for query, _, _ in pairs]),
        router.encode([other for _, other, _ in pairs]),
        router.encode([query for query, _, _ in alike]),
        router.encode([other for _, other, _ in alike]),
        router.encode(unrelated),
        _named(pairs).to(router.device),
        _named(alike).to(router.device),
    )
    return router, held_out, seconds


def _named(pairs: Sequence[tuple[str, str, str | None]]) -> Tensor:
    """[P] bool: whether the second text of each pair names the subject, or need not."""
    named = [
        subject is None or names(normalized_query(text), subject) for _, text, subject in pairs
    ]
    return torch.tensor(named, dtype=torch.bool)


def _tune_once(
    encoder: TextEncoder,
    wordings: Sequence[Wordings],
    config: EncoderTuningConfig,
    work: WorkFolder,
    progress: bool,
) -> float:
    """Tune the encoder, or take what an interrupted edit tuned; the seconds that took then."""
    texts = [dataclasses.asdict(wording) for wording in wordings]
    how = [dataclasses.asdict(config), encoder.pooling]
    digest = fingerprint(how, texts, *encoder.model.state_dict().values())

    def make() -> tuple[dict[str, Tensor], dict[str, str]]:
        stopwatch = Stopwatch()
        with stopwatch.stage("tuning"):
            encoder.tune(wordings, config, progress)
        return encoder.model.state_dict(), {"seconds": str(stopwatch.seconds["tuning"])}

    def write(path: Path, tuned: tuple[dict[str, Tensor], dict[str, str]]) -> None:
        write_tensors(path, *tuned)

    def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        weights, noted = read_tensors(path)
        if weights.keys() != encoder.model.state_dict().keys() or "seconds" not in noted:
            raise CorruptFileError(f"{path} holds no tuned encoder")
        return weights, noted

    (weights, noted), found = work.once(f"encoder-{digest}.safetensors", make, write, read)
    if not found:
        return 0.0
    encoder.model.load_state_dict(weights)
    return float(noted["seconds"])


def calibrated_gate(
    facts: Sequence[Fact],
    conditions: Tensor,
    held_out: HeldOut,
    config: EditorConfig,
    progress: bool,
) -> tuple[Gate, Calibration]:
    """A gate over edited queries, its threshold calibrated on held-out ones unless it is given.

    Args:
        facts: N edited facts.
        conditions: [N, dim] of their queries.
        held_out: of other queries.
        config: the gate's kind and threshold.
        progress: show a progress bar.
    """
    rng = torch.Generator().manual_seed(config.seed)
    negative = held_out.negative(conditions, rng)
    positive = held_out.positive(conditions, rng)
    gate: Gate
    if config.gate == SimilarityGate.kind:
        gate = SimilarityGate(conditions)
    else:
        with seeded(config.seed):
            gate = FamiliarityNetwork(conditions.shape[1]).to(conditions.device)
        # Half of the other queries teach uncertainty, the other half calibrate.
        order = torch.randperm(len(negative), generator=rng)
        taught, negative = negative[order].chunk(2)
        gate.fit(conditions, taught, seed=config.seed, progress=progress)
    named = bool(facts) and all(fact.named_subject is not None for fact in facts)
    if gate.kind == SimilarityGate.kind and config.require_subject and named:
        calibration = _calibrated_by_name(held_out, len(conditions), config)
    else:
        scores = gate.score(positive), gate.score(negative)
        calibration = calibrate(*scores, len(conditions), config.rejection_weight)
    gate.threshold = calibration.threshold if config.threshold is None else config.threshold
    return gate, calibration


def _calibrated_by_name(held_out: HeldOut, num_edited: int, config: EditorConfig) -> Calibration:
    """The calibration where a query must name the subject.

    Only those that name it depend on the threshold, and so it is set on them alone. The shares are
    of all: what does not name it is rejected, whatever it asks.
    """
    positive, negative = held_out.by_name
    negative = torch.cat([negative, negative.new_full((len(held_out.unrelated),), -1.0)])
    whole = calibrate(positive, negative, num_edited, config.rejection_weight)
    named, alike = positive[positive > -1], negative[negative > -1]
    if not len(named) or not len(alike):
        return whole
    threshold = calibrate(named, alike, num_edited, config.rejection_weight).threshold
    return dataclasses.replace(
        whole,
        threshold=threshold,
        acceptance=float((positive > threshold).double().mean()),
        rejection=float((negative <= threshold).double().mean()),
    )


def check_any(edits: Edits) -> None:
    """Refuse edits without facts, RuntimeError: nothing can be calibrated or trained for none."""
    if not len(edits):
        raise RuntimeError("no facts are edited yet, this is only prepared; add some first")


def with_gate(edits: Edits, config: EditorConfig, progress: bool) -> Edits:
    """Edits with another gate, as `calibrated_gate` makes it.

    Raises:
        RuntimeError: there are no facts, as `prepare` leaves it.
    """
    check_any(edits)
    gate, calibration = calibrated_gate(
        edits.facts, edits.conditions, edits.held_out, config, progress
    )
    report = dataclasses.replace(edits.report, calibration=calibration)
    return dataclasses.replace(edits, gate=gate, report=report)


def regated(edits: Edits, config: EditorConfig, progress: bool) -> Edits:
    """Edits whose facts have changed, with a gate that fits them.

    Another threshold would change who is let through among queries that have nothing to do with
    what was added or removed: the similarity gate is calibrated again only when the number of
    facts has changed by a factor of 1.5. A familiarity network is retrained after every change.
    """
    then, now = edits.calibration.num_edited, len(edits)
    if config.gate == SimilarityGate.kind and max(then, now) <= CALIBRATED_TO * min(then, now):
        return edits
    return with_gate(edits, config, progress)


def tuned_with(
    tuning_facts: FactsLike | None, unrelated_queries: Iterable[str] | None
) -> tuple[list[Fact], list[str]]:
    """Facts that tune, and queries about anything; the package's where None are given."""
    tuning = shipped_tuning_facts() if tuning_facts is None else as_facts(tuning_facts)
    if unrelated_queries is None:
        unrelated_queries = shipped_unrelated_queries()
    return tuning, as_texts("unrelated_queries", unrelated_queries)
