"""What makes the library trustworthy, measured: each module fills a part of results/trust.json."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meg_kernels.machine import processor_name
from meg_kernels.storage import write_json

RESULT = Path(__file__).parents[1] / "results" / "trust.json"


def record(part: str, found: Mapping[str, Any], path: Path = RESULT) -> None:
    """Put what was found in its part of the file, with the day and the processor."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    about = {"date": datetime.date.today().isoformat(), "cpu": processor_name()}
    write_json(path, content | {part: about | dict(found)})
