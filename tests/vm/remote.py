# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests marked ``vm`` run in the virtual machine, by a pytest in there; out here they appear like all others.

Rules
- The machine boots once for a run of pytest, with the tests that were selected, when the first test comes that is no
  system test, and runs beside those from then on, at a lower priority. Tests marked ``vm`` come last and wait for it.
- In there ``inside.py`` writes each report down as soon as there is one (``REPORTS``); it is taken here as it is.
- A machine that does not boot, says nothing for too long or ends too early fails the test that was waited for, with the
  last lines of its output and of its console, and all tests after that one.
- It takes minutes, so it boots only for who asks for it: with a run of all tests, with `-m vm`, for something in
  tests/vm, or where ``DPVS_PROBE_REQUIRE`` names it.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.vm import kernel, machine

HERE = Path(__file__).parent
TESTS = HERE.parent
REPORTS = "reports"  # in the guest's job directory: one line of JSON for each
WANTED = "wanted"  # there too: the tests to run, one a line
GUEST_JOB = Path("/run/job")

BOOT_S = 900  # to the first news: 20 on a machine that is idle
SILENT_S = 900  # between two of them
STACKS_S = 500  # of one test: its stacks are shown, even if the signal of its limit (600 s) does not get through
END_S = 60  # from the last report to the end of the machine
PATIENCE = "2"  # of limits in tests
POLL_S = 0.1
TAIL = 60  # lines of the output, and of the console
NICENESS = 5
NOT_ASKED = "boots a virtual machine, for minutes: a run of all tests does, or -m vm, or DPVS_PROBE_REQUIRE=vm"


class Lost(Exception):
    """The guest will not tell of a test any more."""


class Remote:
    """The guest and what it says about tests."""

    def __init__(self, items: list[pytest.Item]) -> None:
        self.items = items
        self._guest: machine.Guest | None = None
        self._source: BinaryIO | None = None
        self._partial = b""
        self._news_at = 0.0
        self._limit_s: float = BOOT_S
        self._reports: dict[str, list[dict[str, Any]]] = {}
        self._done: set[str] = set()
        self._output = bytearray()
        self._lost = ""
        self._said = False

    def start(self) -> None:
        """Boot, if that has not been done."""
        if self._guest is not None or self._lost:
            return
        files = dict.fromkeys(str(item.path) for item in self.items)
        command = [
            ".venv/bin/python", "-X", "faulthandler", "-m", "pytest", "-p", "tests.vm.inside", "-p", "no:cacheprovider",
            "-p", "no:hypothesispytest", "-q", "--tb=short", "-o", f"faulthandler_timeout={STACKS_S}",
            *files,
        ]  # fmt: skip
        wanted = "".join(f"{item.nodeid}\n" for item in self.items)
        guest = machine.Guest(
            command,
            environment={"DPVS_PROBE_PATIENCE": PATIENCE},
            files={WANTED: wanted, REPORTS: ""},
            niceness=NICENESS,
        )
        try:
            guest.__enter__()
        except (kernel.NoKernel, OSError) as error:  # there was one when we looked
            self._lost = f"the virtual machine does not start: {error}"
            return
        self._guest = guest
        self._source = (guest.job / REPORTS).open("rb")
        self._news_at = time.monotonic()

    def reports(self, nodeid: str) -> list[dict[str, Any]]:
        """What the guest says of a test: set-up, call, teardown. Waits for it. Raises Lost."""
        self.start()
        while nodeid not in self._done:
            if self._lost:
                raise Lost(self._lost)
            if not self._listen():
                time.sleep(POLL_S)
        return self._reports.pop(nodeid)

    def finish(self) -> str:
        """Wait for the guest's end; what is wrong with it, or nothing."""
        if self._guest is None:
            return ""
        until = time.monotonic() + END_S
        while self._guest.running():
            if time.monotonic() > until:
                return f"the guest did not end within {END_S} s"
            time.sleep(POLL_S)
        status = self._guest.status()
        return "" if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else f"pytest ended with {status}"

    def sections(self) -> Iterator[tuple[str, str]]:
        """The guest's last words, once."""
        if self._guest is not None and not self._said:
            self._said = True
            self._output += self._guest.output()
            for title, text in (("output", self._output.decode(errors="replace")), ("console", self._guest.console())):
                yield f"the virtual machine's {title}", "\n".join(text.splitlines()[-TAIL:])

    def close(self) -> None:
        """End the machine."""
        if self._source is not None:
            self._source.close()
        if self._guest is not None:
            self._guest.__exit__()
            self._guest = None

    def _listen(self) -> bool:
        """Take in what came; whether there was anything."""
        assert self._guest is not None
        assert self._source is not None
        running = self._guest.running()  # before the last look
        self._output += self._guest.output()
        if data := self._source.read():
            *lines, self._partial = (self._partial + data).split(b"\n")
            self._news_at, self._limit_s = time.monotonic(), SILENT_S
            for line in lines:
                self._take(json.loads(line))
            return True
        if not running:
            self._lost = f"the virtual machine ended before this test: {self._ended()}"
        elif time.monotonic() > self._news_at + self._limit_s:
            self._lost = f"the virtual machine has said nothing for {self._limit_s:.0f} s"
            self._guest.stop()
        return False

    def _ended(self) -> str:
        assert self._guest is not None
        status = self._guest.status()
        return "it did not come up" if status == machine.NOT_RUN else f"its exit status is {status}"

    def _take(self, report: dict[str, Any]) -> None:
        self._reports.setdefault(report["nodeid"], []).append(report)
        if report["when"] == "teardown":
            self._done.add(report["nodeid"])


STASH = pytest.StashKey[Remote]()


def _asked(config: pytest.Config) -> bool:
    """Whether this run of pytest shall boot a machine."""
    paths = [(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args]
    everything = any(path == TESTS or path in TESTS.parents for path in paths)
    some = any(path == HERE or HERE in path.parents for path in paths)
    required = "vm" in os.environ.get("DPVS_PROBE_REQUIRE", "").split(",")
    return everything or some or required or "vm" in str(config.option.markexpr).split()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if machine.IN_GUEST in os.environ:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.needs("vm"))
    remote = [item for item in items if item.get_closest_marker("vm")]
    items[:] = [item for item in items if not item.get_closest_marker("vm")] + remote
    if not remote:
        return
    asked = _asked(config)
    for item in remote:
        item.add_marker(pytest.mark.timeout(0), append=False)  # limits are kept in the guest, and above
        if not asked:
            item.add_marker(pytest.mark.skip(reason=NOT_ASKED))
    if asked and machine.not_ready() is None:
        config.stash[STASH] = Remote(remote)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    remote = item.config.stash.get(STASH, None)
    if remote is None:
        return None
    if item not in remote.items:
        if item.get_closest_marker("system") is None:
            remote.start()
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(remote, item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _reports(remote: Remote, item: pytest.Item) -> list[pytest.TestReport]:
    try:
        made = remote.reports(item.nodeid)
    except Lost as lost:
        return [_failure(remote, item, str(lost), "call")]
    restore = item.config.hook.pytest_report_from_serializable
    reports = [restore(config=item.config, data=data) for data in made]
    if item is remote.items[-1] and (trouble := remote.finish()):
        reports[-1] = _failure(remote, item, f"after the last test: {trouble}", "teardown")
    return reports


def _failure(remote: Remote, item: pytest.Item, why: str, when: Any) -> pytest.TestReport:
    report = pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", why, when)
    report.sections.extend(remote.sections())
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (remote := session.config.stash.get(STASH, None)) is not None:
        remote.close()
