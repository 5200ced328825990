"""hypothesis; where it is not installed (a borrowed GPU machine), property tests are skipped."""

from __future__ import annotations

from typing import Any

import pytest

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Absent:
        """Stands for every strategy and every way to make one."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self

        def __getattr__(self, name: str) -> Any:
            return self

    HealthCheck = st = _Absent()  # type: ignore[assignment, misc]

    def given(*args: Any, **kwargs: Any) -> Any:
        def skipped(test: Any) -> Any:
            @pytest.mark.skip(reason="needs hypothesis")
            def in_its_place() -> None:
                pass

            in_its_place.__name__ = test.__name__
            return in_its_place

        return skipped

    def settings(*args: Any, **kwargs: Any) -> Any:  # type: ignore[no-redef]
        return lambda test: test


__all__ = ["HealthCheck", "given", "settings", "st"]
