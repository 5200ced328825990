"""What makes a generator answer right soonest, and how that grows with the number of facts.

    python -m benchmarks.quality.convergence build/quality/counterfact-10k-10000-0 \\
        --facts 256 1000 4096

The facts and collected neurons of an edited model are taken, the first so many of them, and one
generator after the other is trained on them, each with one choice or the whole network changed,
until 97% of the queries that the model answers with their collected neurons, or of a sample of 256,
are answered with generated ones. Seconds are of the training alone, looks at the answers included.

Two choices are not the package's: with a low rank, the generator makes the neurons' coordinates
along their first principal directions, which share one scale or, whitened, have one each.

Writes benchmarks/results/convergence-NAME.json. Rows that are in it already are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.conftest import version_of
from meg_kernels import DiTConfig, GeneratorConfig, MeGEditor
from meg_kernels.editing.answered import answers_with
from meg_kernels.editing.train import train_generator
from meg_kernels.neuron import NeuronLayout, Neurons
from meg_kernels.routing.generators import (
    DiTGenerator,
    Generator,
    NetworkGenerator,
    NetworkGeneratorConfig,
    build_generator,
)
from meg_kernels.storage import write_json

RESULTS = Path(__file__).parents[1] / "results"
WANTED = 0.97
TRAINING: dict[str, Any] = {
    "enough": WANTED,
    "close": float("inf"),
    "check_every": 25,
    "max_steps": 2000,
}
BASE = GeneratorConfig.dit(**TRAINING)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A generator to train.

    Args:
        config: its own.
        rank: of the neurons' principal directions; None: their weights as they are.
        whitened: one scale for each direction.
    """

    config: NetworkGeneratorConfig = BASE
    rank: int | None = None
    whitened: bool = False


def shaped(**shape: Any) -> Choice:
    return Choice(dataclasses.replace(BASE, network=DiTConfig(**shape)))


def trained(**changes: Any) -> Choice:
    return Choice(BASE.with_training(**changes))


CHOICES = {
    "default": Choice(),
    "width 256, depth 6, patches of 96": shaped(width=256, num_heads=4, depth=6, patch_size=96),
    "depth 4": shaped(depth=4),
    "width 256": shaped(width=256, num_heads=4),
    "patches of 96": shaped(patch_size=96),
    "batch 512": trained(batch_size=512),
    "batch 32": trained(batch_size=32),
    "learning rate 3e-4": trained(learning_rate=3e-4),
    "v-prediction": shaped(prediction="v"),
    "condition through adaLN only": shaped(token_condition=False),
    "exact conditions": trained(condition_noise=0.0),
    "other wordings instead of noise": trained(reword=True),
    "first 256 directions": Choice(rank=256),
    "first 256 directions, whitened": Choice(rank=256, whitened=True),
    "mlp": Choice(GeneratorConfig.mlp(**TRAINING)),
    "mlp, width 4096": Choice(GeneratorConfig.mlp(width=4096, **TRAINING)),
}


class LowRankGenerator(DiTGenerator):
    """Makes coordinates along the first principal directions of standardised neurons."""

    directions: Tensor
    scales: Tensor

    def __init__(self, choice: Choice, layout: NeuronLayout, condition_dim: int):
        assert choice.rank is not None
        rank = choice.rank
        # What the network sees of the layout is how many numbers there are.
        small = NeuronLayout(rank // 2, rank - rank // 2, False, layout.activation)
        super().__init__(choice.config, small, condition_dim)
        self.whole, self.whitened = Whole(choice.config, layout, condition_dim), choice.whitened
        self.register_buffer("directions", torch.zeros(rank, layout.dim))
        self.register_buffer("scales", torch.ones(rank))

    def standardize(self, conditions: Tensor, neurons: Neurons) -> None:
        self.whole.standardize(conditions, neurons)
        for name in ("condition_mean", "condition_std"):
            getattr(self, name).copy_(getattr(self.whole, name))
        weights = self.whole.scaled_weights(neurons)
        _, _, directions = torch.linalg.svd(weights, full_matrices=False)
        self.directions[: len(directions)] = directions[: len(self.directions)]
        spread = (weights @ self.directions.T).square().mean(0).sqrt()  # [rank]
        one = spread.square().mean().sqrt().expand_as(spread)
        self.scales.copy_(spread.clamp(min=1e-3 * float(one[0])) if self.whitened else one)

    def scaled_weights(self, neurons: Neurons) -> Tensor:
        return self.whole.scaled_weights(neurons) @ self.directions.T / self.scales

    def generate(self, z: Tensor) -> Neurons:
        with torch.no_grad():
            coordinates = self._generate(self.scaled_conditions(z))
        weights = (coordinates * self.scales) @ self.directions
        whole = self.whole
        return whole.layout.unpack(weights * whole.weight_std + whole.weight_mean)


class Whole(NetworkGenerator):
    """The scales of whole neurons."""


def build(choice: Choice, layout: NeuronLayout, condition_dim: int) -> Generator:
    if choice.rank is None:
        return build_generator(choice.config, layout, condition_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(choice.config.training.seed)
        return LowRankGenerator(choice, layout, condition_dim).eval()


def measure(editor: MeGEditor, n: int, choice: Choice) -> dict[str, Any]:
    """One row: how long a generator so made trains on the first n facts."""
    edits = editor.edits
    generator = build(choice, editor.attached.layout, editor.encoder.dim)
    answers = answers_with(
        editor.prompted, editor.attached, edits.facts[:n], editor.config.collection.batch_size
    )
    training = train_generator(
        generator,
        edits.conditions[:n],
        edits.neurons[:n],
        answers,
        rewording=edits.held_out.rewording if choice.config.training.reword else None,
        progress=True,
    )
    enough = training.steps < choice.config.training.max_steps or training.answered >= WANTED
    return {
        "n": n,
        "parameters": sum(parameter.numel() for parameter in generator.parameters()),
        "steps": training.steps if enough else None,
        "seconds": training.seconds[-1] if enough else None,
        "answered": training.answered,
        "history": [
            {"step": step, "seconds": round(seconds, 2), "answered": answered, "distance": off}
            for (step, _, answered, off), seconds in zip(
                training.history, training.seconds, strict=True
            )
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what `meg edit` saved")
    parser.add_argument("--name", default="counterfact-10k", help="of the data")
    parser.add_argument("--facts", type=int, nargs="+", default=[256, 1000], help="how many")
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=[*CHOICES])
    arguments = parser.parse_args()
    path = RESULTS / f"convergence-{arguments.name}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    content |= {
        "study": "convergence",
        "data": arguments.name,
        "wanted": WANTED,
        "threads": torch.get_num_threads(),
        "versions": {name: version_of(name) for name in ("torch", "transformers")},
    }
    editor = MeGEditor.from_pretrained(arguments.folder)
    for n in arguments.facts:
        for name in arguments.only:
            if (name, n) in {(row["choice"], row["n"]) for row in content["rows"]}:
                continue
            row = {"choice": name} | measure(editor, n, CHOICES[name])
            content["rows"].append(row)
            write_json(path, content)
            print(name, n, row["steps"], row["seconds"], row["answered"], flush=True)


if __name__ == "__main__":
    main()
