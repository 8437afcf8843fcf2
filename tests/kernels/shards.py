"""A pytest plugin for processes that share the tests: it chooses those of this process, and writes each result at once.

The results go to a file line by line, so that a killed process leaves those that it had.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("shards")
    group.addoption("--share", default="0/1", help="I/N: every N-th test, from the I-th on")
    group.addoption("--results", type=Path, required=True, help="a file that gets one line of JSON a test")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests of this process. Every process collects the same tests in the same order."""
    first, count = map(int, config.getoption("share").split("/"))
    items[:] = items[first::count]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        line = {"test": item.nodeid, "outcome": report.outcome, "seconds": report.duration, "reason": reason}
        if report.outcome == "failed" and report.when != "call":
            line["outcome"] = "error"
        with item.config.getoption("results").open("a") as file:
            file.write(json.dumps(line) + "\n")
    return report
