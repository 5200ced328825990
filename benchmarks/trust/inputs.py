"""The table of bad inputs, counted: how many of each kind are refused as they should be.

    python -m benchmarks.trust.inputs

Runs tests/test_bad_inputs.py. An input is *refused* if it ends in the error that the table names,
whose message says what is wrong and what to do; *silent* if it is accepted; *another error* if it
ends otherwise; and the run is ended, and says so, if it takes longer than ten minutes.

Writes its part of benchmarks/results/trust.json.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.trust import record

TESTS = Path(__file__).parents[2] / "tests" / "test_bad_inputs.py"
MOST_SECONDS = 600
VERDICTS = ("refused", "silent", "another error")


def verdict(case: ElementTree.Element) -> str:
    """How a case of pytest's report ended.

    >>> case = '<testcase><failure message="Failed: DID NOT RAISE ValueError"/></testcase>'
    >>> verdict(ElementTree.fromstring(case))
    'silent'
    """
    failure = case.find("failure")
    if failure is None:
        return "refused" if case.find("error") is None else "another error"
    return "silent" if "DID NOT RAISE" in failure.get("message", "") else "another error"


def counted(report: ElementTree.Element) -> dict[str, Counter[str]]:
    """How many inputs of each kind ended in each way."""
    kinds: dict[str, Counter[str]] = {}
    for case in report.iter("testcase"):
        named = re.search(r"\[(\w+): ", case.get("name", ""))
        if named and case.find("skipped") is None:
            kinds.setdefault(named[1], Counter())[verdict(case)] += 1
    return kinds


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(TESTS), f"--junitxml={path}"]
        subprocess.run(command, timeout=MOST_SECONDS, check=False, stdout=subprocess.DEVNULL)
        kinds = counted(ElementTree.parse(path).getroot())
    for kind, counts in sorted(kinds.items()):
        print(f"{kind:10}", ", ".join(f"{counts[name]} {name}" for name in VERDICTS))
    total = sum(kinds.values(), Counter[str]())
    print(f"{sum(total.values())} inputs: {total['refused']} refused as they should be")
    record(
        "inputs",
        {kind: {name: counts[name] for name in VERDICTS} for kind, counts in sorted(kinds.items())},
    )
    if total["refused"] != sum(total.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
