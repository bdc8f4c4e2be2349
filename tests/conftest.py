"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from pipeline.prepare import make_data
from pipeline.recipe import load_config
from tests.launch import TINY, train

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices on several threads spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The tiny recipe's shards, made by its own command."""
    folder = tmp_path_factory.mktemp("tiny") / "data"
    make_data(load_config(TINY, {"data.path": str(folder)}), print)
    return folder


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, data):
    """An uninterrupted 2-rank ZeRO-3 run: what others are compared with."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, data, ranks=2)
    return out


def pytest_terminal_summary(terminalreporter) -> None:
    """Name every golden case with what became of it: one that is refused passes, but must not look compared."""
    lines = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            if "test_reference_parity.py" in report.nodeid and "_case[" in report.nodeid:
                name = report.nodeid.partition("[")[2].rstrip("]")
                said = dict(report.user_properties).get("golden", outcome)
                lines.append(f"{name}: {said if outcome == 'passed' else outcome}")
    if lines:
        terminalreporter.section("golden cases")
        for line in sorted(lines):
            terminalreporter.write_line(line)
