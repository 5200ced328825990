"""The command line with which `meg serve` starts vLLM's OpenAI server."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from meg_kernels.integrations.vllm import PLUGINS, WANTED
from meg_kernels.integrations.vllm.settings import KEY, Settings
from meg_kernels.pretrained import SMOLLM2, smollm2_folder
from meg_kernels.routing.manifest import read_manifest

SERVER = "vllm.entrypoints.openai.api_server"
EXTENSION = "meg_kernels.integrations.vllm.workers.WorkerExtension"


def command(folder: Path, options: Sequence[str]) -> list[str]:
    """The arguments with which vLLM's server serves an edited model.

    Args:
        folder: where `meg edit` wrote.
        options: vLLM's own, which win, but for those that decide what is served.

    Raises:
        ImportError: vLLM is not installed.
        FileNotFoundError: there are no edits.
        CorruptFileError: a file is damaged, or of a newer version of the format.
        ValueError: it cannot be served so, or an option is decided already.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "vLLM is not installed; run: pip install 'meg-kernels[vllm]', or on a CPU make serve"
        )
    given, rest = _taken(options, "--additional-config")
    try:
        more = json.loads(given) if given else {}
    except ValueError as error:
        raise ValueError(f"--additional-config is no JSON: {error}") from error
    if not isinstance(more, dict):
        raise ValueError("--additional-config must be an object")
    names = {option.partition("=")[0].replace("_", "-") for option in rest if option[:2] == "--"}
    if "--api-server-count" in names:
        raise ValueError("edited models are served by one API server; leave --api-server-count out")
    ours = {KEY: asdict(Settings.of_folder(folder))}
    base = read_manifest(folder)["base"]
    if not base["name"]:
        raise ValueError(
            f"the model that was edited in {folder} had no name to load it by; vLLM needs its "
            "folder: edit with MeGEditor.for_model(folder)"
        )
    model = str(smollm2_folder()) if base["name"] == SMOLLM2 else base["name"]
    decided = {
        "--model": model,
        "--additional-config": json.dumps(more | ours),
        "--worker-extension-cls": EXTENSION,
    }
    defaults = {"--dtype": base["dtype"], "--served-model-name": folder.resolve().name}
    if both := sorted(names & {*decided}):
        raise ValueError(f"{both[0]} is decided by {folder}; leave it out")
    chosen = decided | {name: value for name, value in defaults.items() if name not in names}
    return [sys.executable, "-m", SERVER, *(x for pair in chosen.items() for x in pair), *rest]


def _taken(options: Sequence[str], name: str) -> tuple[str, list[str]]:
    """The value of an option, and the options without it."""
    rest, value = [*options], ""
    for place, option in enumerate(options):
        if option == name and place + 1 < len(options):
            value, rest = options[place + 1], [*options[:place], *options[place + 2 :]]
        elif option.startswith(f"{name}="):
            value, rest = option.partition("=")[2], [*options[:place], *options[place + 1 :]]
    return value, rest


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """These variables of the environment, with our endpoints among vLLM's plugins."""
    found = importlib.metadata.entry_points()
    names = {
        p.name
        for group in found.groups
        if group.startswith("vllm.")
        for p in found.select(group=group)
    }
    # By default vLLM takes all plugins but those with endpoints.
    wanted = (
        [*filter(None, variables[PLUGINS].split(","))] if PLUGINS in variables else sorted(names)
    )
    return {**variables, WANTED: "1", PLUGINS: ",".join(dict.fromkeys([*wanted, "meg"]))}


def serve(folder: Path, options: Sequence[str]) -> None:
    """Become vLLM's server; arguments and errors as `command` has them."""
    arguments = command(folder, options)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, arguments, environment(os.environ))
