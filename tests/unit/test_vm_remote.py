# SPDX-License-Identifier: GPL-2.0-or-later
"""How tests that run in the virtual machine appear outside, when the machine does not do what it should."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from tests.vm import machine, remote
from tests.vm.remote import Lost, Remote


class FakeGuest:
    """A machine that says what it is told to, and then ends, or hangs."""

    def __init__(self, directory: Path, *, says: list[str], hangs: bool = False, status: int = 0) -> None:
        self.job, self._says, self._hangs, self._status = directory, says, hangs, status
        self.stopped = False
        self._output = b"Fatal Python error\n"

    def __enter__(self) -> Self:
        lines = [{"nodeid": nodeid, "when": when} for nodeid in self._says for when in ("setup", "call", "teardown")]
        (self.job / remote.REPORTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.stopped = True

    def running(self) -> bool:
        return self._hangs and not self.stopped

    def output(self) -> bytes:
        said, self._output = self._output, b""
        return said

    def console(self) -> str:
        return "Kernel panic\n"

    def status(self) -> int:
        return self._status


Make = Callable[..., Remote]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    monkeypatch.setattr(remote, "POLL_S", 0.001)
    monkeypatch.setattr(remote, "BOOT_S", 0.1)
    monkeypatch.setattr(remote, "SILENT_S", 0.1)
    monkeypatch.setattr(remote, "END_S", 0.1)
    items: Any = [SimpleNamespace(nodeid=name, path=Path("test_x.py")) for name in ("one", "two")]

    def make(**settings: Any) -> Remote:
        monkeypatch.setattr(machine, "Guest", lambda *_, **__: FakeGuest(tmp_path, **settings))
        return Remote(items)

    return make


def test_reports_come_as_they_were_made(made: Make) -> None:
    there = made(says=["one", "two"], hangs=True)
    assert [report["when"] for report in there.reports("one")] == ["setup", "call", "teardown"]
    assert [report["when"] for report in there.reports("two")] == ["setup", "call", "teardown"]
    assert there.finish() == "the guest did not end within 0.1 s"
    there.close()


def test_a_machine_that_says_nothing_any_more(made: Make) -> None:
    there = made(says=["one"], hangs=True)
    assert there.reports("one")
    with pytest.raises(Lost, match="has said nothing for 0 s"):
        there.reports("two")
    assert [text for _, text in there.sections()] == ["Fatal Python error", "Kernel panic"]
    assert not list(there.sections())  # with the first test only
    assert there.finish() == ""


def test_a_machine_that_ends_too_early(made: Make) -> None:
    there = made(says=["one"], status=139)
    assert there.reports("one")
    for _ in range(2):
        with pytest.raises(Lost, match="ended before this test: its exit status is 139"):
            there.reports("two")
    assert there.finish() == "pytest ended with 139"


def test_a_machine_that_does_not_come_up(made: Make) -> None:
    with pytest.raises(Lost, match="it did not come up"):
        made(says=[], status=machine.NOT_RUN).reports("one")


def test_a_pytest_in_there_that_crashes_at_its_end(made: Make) -> None:
    there = made(says=["one", "two"], status=139)
    assert there.reports("one")
    assert there.reports("two")
    assert there.finish() == "pytest ended with 139"
