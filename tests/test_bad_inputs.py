"""Every bad input is refused before the work, with what is wrong and what to do about it."""

from __future__ import annotations

import re

import pytest
from bad_inputs import Case, all_cases

CASES = all_cases()


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{kind}: {case.name}") for kind, case in CASES]
)
def test_a_bad_input_is_refused_with_its_cause_and_its_mending(case: Case, tmp_path):
    with pytest.raises(case.raises) as caught:
        case.act(tmp_path)
    assert type(caught.value) is case.raises
    error = caught.value
    message = str(error.args[0] if isinstance(error, KeyError) else error)
    assert not message.startswith("[Errno")
    for said in case.says:
        assert re.search(said, message, re.IGNORECASE), f"{said!r} is not in {message!r}"


def test_the_names_are_unique():
    names = [(kind, case.name) for kind, case in CASES]
    assert len(names) == len(set(names))
