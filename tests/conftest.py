"""Counts the faults that tests inject: `@pytest.mark.injects(n)` on a test, or as `pytestmark` for all of a file.

The number goes into the test's properties, as `--junitxml` writes them; `benchmarks/robustness.py` adds them up.
"""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "injects(n): the test injects n faults, and passes if the right thing happens")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if marker := item.get_closest_marker("injects"):
        item.user_properties.append(("faults", marker.args[0]))
