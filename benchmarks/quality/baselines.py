"""Other ways to edit many facts, on our model, data, prompts and protocol.

    python -m benchmarks.quality.baselines counterfact.json --limit 500 --name counterfact

    fine_tuning   the FFN of the edited layer, on all facts together: the paper's FT
    lora          the same with a LoRA adapter of low rank on that FFN, by PEFT
    in_context    the fact stands before the question, as IKE has it, without demonstrations; each
                  question, locality queries too, gets the fact that it belongs to
    memit         closed-form updates of several layers' FFNs: see benchmarks/quality/memit.py

Fine-tuning and LoRA are shown each fact in the contexts in which our neurons are fitted; MEMIT has
its own random prefixes. Paraphrases are shown to nobody.

    python -m benchmarks.quality.baselines others.json --limit 64 --name search --search

tries the settings of `GRID` on other facts; the defaults are those with the highest Score there.

Writes benchmarks/results/quality-baselines-NAME-N.json. Rows that are in it are not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm, trange
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.conftest import version_of
from benchmarks.quality.memit import MemitConfig, apply_memit, output_projection, seeded
from meg_kernels.editing.evaluate import Evaluation, Metrics, Prompting, unknown_facts
from meg_kernels.editing.layers import default_layer
from meg_kernels.editing.neuron_fit import CollectionConfig
from meg_kernels.editing.prompting import (
    PromptedModel,
    PromptTemplate,
    TargetBatch,
)
from meg_kernels.facts import Fact, read_facts
from meg_kernels.nn import LowerLayers
from meg_kernels.nn.families import decoder_layers, feed_forward
from meg_kernels.nn.packing import frozen_products, projections
from meg_kernels.precision import fast_dtype
from meg_kernels.pretrained import SMOLLM2, load_language_model
from meg_kernels.storage import fingerprint, write_json

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Request:
    """What a baseline is asked to do.

    Args:
        model, tokenizer: the model, frozen, float32.
        facts: what it shall answer.
        template: how queries become prompts.
        layer: that the edit is allowed to change, or the last one.
        seed: of every random choice.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: Sequence[Fact]
    template: PromptTemplate
    layer: int
    seed: int = 0
    progress: bool = False

    @property
    def prompted(self) -> PromptedModel:
        """The model with its tokenizer and template."""
        return PromptedModel.of(self.model, self.tokenizer, self.template)


@dataclass(frozen=True)
class Edited:
    """What there is to say of an edit, while the model is edited.

    Args:
        notes: for the record.
        prompting: of an edit that stands in the prompt.
    """

    notes: dict[str, Any] = field(default_factory=dict)
    prompting: Prompting | None = None


@contextmanager
def restored(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Afterwards these parameters are frozen again, and bit for bit what they were."""
    before = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, value in before:
            parameter.requires_grad_(False).copy_(value)
            parameter.grad = None


def ffn_projections(model: PreTrainedModel, layer: int) -> list[nn.Module]:
    """The projections of a layer's FFN, which its family keeps in a module of its own."""
    return list(projections([feed_forward(model, layer).exit]))


# ---- fine-tuning and LoRA ---------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingConfig:
    """How parameters are trained on all facts together.

    Args:
        learning_rate: of Adam.
        target_loss: prompts whose target tokens are the argmax, with a mean cross-entropy below
            this, in nats, no longer pull: the less is changed, the more Locality is left.
        max_epochs: after so many the rest is left as it is.
        batch_size: prompts.
    """

    learning_rate: float
    target_loss: float = 0.1
    max_epochs: int = 20
    batch_size: int = 32


@dataclass(frozen=True)
class LoraConfig(TrainingConfig):
    """The same, and the adapter's rank; its scaling is 1."""

    rank: int = 1


def train(request: Request, parameters: Sequence[nn.Parameter], config: TrainingConfig) -> Edited:
    """Train `parameters`, of the edited layer, until every fact is answered in every context."""
    model, prompted = request.model, request.prompted
    contexts = CollectionConfig().contexts_of(prompted.tokenizer)
    pairs = [
        prompted.target(prompted.prompt(fact.query, context), fact.answer)
        for fact in request.facts
        for context in contexts
    ]
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))  # less padding
    lower = LowerLayers(model, request.layer)
    upper = [*decoder_layers(model)[request.layer + 1 :], model.get_output_embeddings()]
    batches: list[tuple[TargetBatch, Tensor]] = []
    with frozen_products(decoder_layers(model)[: request.layer], model.dtype):
        for start in range(0, len(pairs), config.batch_size):
            batch = prompted.batch(pairs[start : start + config.batch_size])
            batches.append((batch, lower.run(**batch.inputs)))
    for parameter in parameters:
        parameter.requires_grad_(True)
    adam = torch.optim.Adam(parameters, config.learning_rate)
    generator = torch.Generator().manual_seed(request.seed)
    steps = learnt = 0
    # Frozen weights, and the gradients through them, need no more than bfloat16.
    with frozen_products(upper, fast_dtype(model.device, model.dtype)):
        for _ in (bar := trange(config.max_epochs, desc="epochs", disable=not request.progress)):
            learnt = 0
            for number in torch.randperm(len(batches), generator=generator).tolist():
                batch, hidden = batches[number]
                with lower.replaced_by(hidden):
                    scores = prompted.score(batch)
                good = scores.right & (scores.losses < config.target_loss)
                learnt += int(good.sum())
                if not good.all():
                    adam.zero_grad()
                    (scores.losses * ~good).mean().backward()
                    adam.step()
                    steps += 1
            bar.set_postfix_str(f"{learnt} of {len(pairs)} prompts learnt")
            if learnt == len(pairs):
                break
    return Edited({"steps": steps, "prompts": len(pairs), "prompts_learnt": learnt})


@contextmanager
def fine_tuning(request: Request, config: TrainingConfig) -> Iterator[Edited]:
    """Inside, the edited layer's FFN is fine-tuned on the facts."""
    parts = ffn_projections(request.model, request.layer)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    with restored(parameters):
        yield train(request, parameters, config)


@contextmanager
def lora(request: Request, config: LoraConfig) -> Iterator[Edited]:
    """Inside, a LoRA adapter, trained on the facts, is merged into the edited layer's FFN."""
    import peft

    model = request.model
    parts = ffn_projections(model, request.layer)
    names = [name for name, part in model.named_modules() if part in parts]
    low_rank = peft.LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=names)
    with restored([parameter for part in parts for parameter in part.parameters()]):
        with seeded(request.seed):
            adapted = peft.get_peft_model(model, low_rank)
        try:
            parameters = [p for p in adapted.parameters() if p.requires_grad]
            edited = train(request, parameters, config)
        finally:
            adapted.merge_and_unload()
        yield edited


# ---- in context, MEMIT ------------------------------------------------------------------------


@dataclass(frozen=True)
class InContextConfig:
    """How the fact stands before the question.

    Args:
        separator: between the two.
    """

    separator: str = "\n"


@contextmanager
def in_context(request: Request, config: InContextConfig) -> Iterator[Edited]:
    """The fact stands before every question that belongs to it, as one answered already."""

    def prompting(query: str, number: int) -> str:
        fact, template = request.facts[number], request.template
        told = f"{template.format(fact.query)} {fact.answer}."
        return f"{told}{config.separator}{template.format(query)}"

    yield Edited(prompting=prompting)


@contextmanager
def memit(request: Request, config: MemitConfig) -> Iterator[Edited]:
    """Inside, the facts are written into the critical layers' output projections."""
    last = request.layer if config.last is None else config.last
    model, layers = request.model, config.critical_layers(last)
    with restored([output_projection(model, layer).weight for layer in layers]):
        yield Edited(
            apply_memit(
                model,
                request.tokenizer,
                request.facts,
                request.template,
                last,
                seed=request.seed,
                config=config,
                progress=request.progress,
            )
        )


# ---- the study --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """A way to edit, and its settings."""

    edit: Callable[[Request, Any], AbstractContextManager[Edited]]
    config: Any

    def measure(self, request: Request, evaluation: Evaluation) -> dict[str, Any]:
        """One row of the table: metrics, settings and seconds of the edit."""
        started = time.perf_counter()
        with self.edit(request, self.config) as edited:
            seconds = time.perf_counter() - started
            verdicts = evaluation.verdicts(
                lambda queries, facts: nullcontext(),
                request.progress,
                prompting=edited.prompting,
            )
        return {
            "metrics": Metrics.of(verdicts).to_dict(),
            "settings": asdict(self.config),
            "seconds": round(seconds, 2),
            **edited.notes,
        }


BASELINES = {
    "fine_tuning": Baseline(fine_tuning, TrainingConfig(learning_rate=1e-3)),
    "lora": Baseline(lora, LoraConfig(learning_rate=2e-2)),
    "in_context": Baseline(in_context, InContextConfig()),
    "memit": Baseline(memit, MemitConfig(last=10, covariance_weight=150.0)),
}
GRID: dict[str, list[dict[str, Any]]] = {
    "fine_tuning": [{"learning_rate": rate} for rate in (1e-3, 3e-4)],
    "memit": [{"last": last, "covariance_weight": 150.0} for last in (10, 15)],
    "lora": [{"learning_rate": rate} for rate in (2e-2, 5e-3)],
    "in_context": [{"separator": separator} for separator in ("\n", "\n\n")],
}


def grid() -> dict[str, Baseline]:
    """The baselines with other settings, by name and setting.

    >>> [name for name in grid() if "lora" in name][:2]
    ['lora, learning_rate=0.02', 'lora, learning_rate=0.005']
    """
    ways = {}
    for name, settings in GRID.items():
        own = BASELINES[name]
        for setting in settings:
            label = ", ".join([name, *(f"{key}={value}" for key, value in setting.items())])
            ways[label] = Baseline(own.edit, replace(own.config, **setting))
    return ways


def run(
    request: Request,
    ways: Mapping[str, Baseline],
    path: Path,
    about: dict[str, Any],
    asked: Sequence[Fact] | None = None,
    work_folder: Path | None = None,
) -> list[dict]:
    """Add the rows that the file at `path` lacks, one after the other; returns all of them.

    Args:
        request: what to edit.
        ways: by name.
        path: of the file.
        about: what else it shall say.
        asked: the first so many of the request's facts; default: all.
        work_folder: keeps what the base model answers.

    Raises:
        SystemExit: the file was made with other facts, another model, layer or seed.
    """
    facts = request.facts if asked is None else asked
    evaluation = Evaluation(request.prompted, facts, work_folder=work_folder)
    content = {
        "study": "quality-baselines",
        **about,
        "facts": len(request.facts),
        "asked": len(evaluation.facts),
        "facts_digest": fingerprint([fact.to_dict() for fact in request.facts]),
        "layer": request.layer,
        "seed": request.seed,
        "protocol": evaluation.protocol(),
    }
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if differing := [name for name in content if before and before.get(name) != content[name]]:
        raise SystemExit(
            f"{path} was made with another {differing[0]}; move it, or rename this run"
        )
    rows = before.get("rows", [])
    missing = [name for name in ways if name not in {row["baseline"] for row in rows}]
    for name in (bar := tqdm(missing, unit="baseline", disable=not request.progress)):
        bar.set_postfix_str(name)
        base = evaluation.base(request.progress).to_dict()
        rows = [*rows, {"baseline": name, **ways[name].measure(request, evaluation)}]
        versions = {package: version_of(package) for package in ("torch", "transformers", "peft")}
        write_json(path, content | {"base": base, "rows": rows, "versions": versions})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="facts, as `meg edit` reads them")
    parser.add_argument("--name", required=True, help="of the data, in the result's name")
    parser.add_argument("--limit", type=int, help="use the first N facts only")
    parser.add_argument("--only", nargs="+", choices=BASELINES, default=[*BASELINES])
    parser.add_argument("--search", action="store_true", help="try the settings of the grid")
    parser.add_argument("--asked", type=int, help="ask about the first so many facts only")
    parser.add_argument("--locality", type=int, help="so many locality queries of each fact only")
    parser.add_argument("--paraphrased", action="store_true", help="facts with paraphrases only")
    parser.add_argument("--work", type=Path, default=Path("build/quality/.base"))
    parser.add_argument("--skip-known", action="store_true", help="as `meg edit --skip-known`")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    model, tokenizer = load_language_model(arguments.model)
    layer = default_layer(model)
    template = PromptTemplate.for_model(model)
    facts = [
        replace(fact, locality=fact.locality[: arguments.locality])
        for fact in read_facts(arguments.data, on_conflict="first")
        if fact.paraphrases or not arguments.paraphrased
    ]
    if arguments.skip_known:
        facts = unknown_facts(PromptedModel(model, tokenizer, template), facts, progress=True)
    random.Random(arguments.seed).shuffle(facts)  # as benchmarks.quality.study has them
    facts = facts[: arguments.limit]
    request = Request(model, tokenizer, facts, template, layer, arguments.seed, progress=True)
    path = RESULTS / f"quality-baselines-{arguments.name}-{len(facts)}.json"
    about = {"data": arguments.name, "model": arguments.model}
    ways = grid() if arguments.search else BASELINES
    ways = {name: way for name, way in ways.items() if name.split(",")[0] in arguments.only}
    for row in run(request, ways, path, about, facts[: arguments.asked], arguments.work):
        shares = {name: value and round(value, 3) for name, value in row["metrics"].items()}
        print(f"{row['baseline']:12} {row['seconds']:8.1f} s  {json.dumps(shares)}")


if __name__ == "__main__":
    main()
