"""The house: which file imports which. Arrows point down, and never round in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import meg_kernels

PACKAGE = Path(meg_kernels.__path__[0])
# From the ground up. A file may import from its own floor and from those below it.
FLOORS = (
    ("texts", "arguments", "checks", "scoped", "locking", "storage", "facts"),
    ("neuron", "progress", "machine", "precision", "gradients", "checkpoints", "packed_e5"),
    ("pretrained",),
    ("shipped", "conversation", "kernels", "ops"),
    ("nn", "diffusion"),
    ("text_encoder", "familiarity"),
    ("routing",),
    ("editing",),
    ("integrations",),
    ("cli",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def imported(name: str) -> set[str]:
    """The package's modules that this module imports, anywhere but for type checkers alone."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative
                above = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
                parts = above.split(".")[: len(above.split(".")) - node.level + 1]
                base = ".".join(["meg_kernels", *parts, *([base] if base else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    names = {module.removeprefix("meg_kernels.") for module in found if "meg_kernels." in module}
    return names & MODULES.keys() - {name}


ARROWS = {name: imported(name) for name in MODULES}


def test_every_room_has_a_floor():
    rooms = {name.split(".")[0] for name in MODULES}
    assert rooms == set(FLOOR_OF)
    assert sum(map(len, ARROWS.values())) > 150  # the arrows are found


def test_no_import_points_upward():
    upward = {
        f"{name} -> {other}"
        for name, others in ARROWS.items()
        for other in others
        if FLOOR_OF[name.split(".")[0]] < FLOOR_OF[other.split(".")[0]]
    }
    assert not upward


def test_no_imports_go_round_in_a_circle():
    left = {name: set(others) for name, others in ARROWS.items()}
    # A package and what its __init__ offers are one: its modules may import their siblings.
    for name, others in left.items():
        others -= {part for part in others if name.startswith(f"{part}.")}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_nothing_that_answers_needs_a_language_model():
    answering = {name for name in MODULES if name.startswith("routing")}
    reached, ahead = set(), set(answering)
    while ahead:
        reached |= ahead
        ahead = {other for name in ahead for other in ARROWS[name]} - reached
    assert not {name for name in reached if name.split(".")[0] in ("editing", "integrations")}
    assert not {name for name in reached if name.startswith("nn.attached")}


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, meg_kernels; print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_every_public_name_is_there_and_no_other():
    assert all(getattr(meg_kernels, name) is not None for name in meg_kernels.__all__)
    assert set(meg_kernels.__all__) <= set(dir(meg_kernels))
    assert not hasattr(meg_kernels, "collcet")
