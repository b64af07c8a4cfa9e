# SPDX-License-Identifier: GPL-2.0-or-later
"""Off the processors of DPVS's workers, where others are left, and back again."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from probes import doctor, processors

ALL = {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("allowed", "workers", "left"),
    [
        (ALL, [{2}, {3}], {0, 1, 4, 5}),
        (ALL, [{2, 3}, {3, 4}], {0, 1, 5}),
        (ALL, [{1}, {2}, {3}, {4}], {0, 5}),
        (ALL, [{1}, {2}, {3}, {4}, {5}], None),
        (ALL, [ALL], None),  # workers that are pinned to nothing
        ({1}, [{2}], {1}),  # the administrator has chosen one, and no worker has it
        ({1, 2}, [{2}], None),
        (ALL, [], ALL),
    ],
)
def test_what_is_left(allowed: set[int], workers: list[set[int]], left: set[int] | None) -> None:
    assert processors.without(allowed, workers) == left


@pytest.mark.parametrize(("numbers", "text"), [({0, 2, 3, 4, 7}, "0,2-4,7"), ({5}, "5"), (set(), ""), ({1, 0}, "0-1")])
def test_words(numbers: set[int], text: str) -> None:
    assert processors.shown(numbers) == text


def affinities() -> set[frozenset[int]]:
    """Of every thread of this process."""
    found = set()
    for path in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # one of another test's, that has just ended
            found.add(frozenset(os.sched_getaffinity(int(path.name))))
    return found


@pytest.fixture
def waiting() -> Iterator[None]:
    """A thread that is there already."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    yield
    end.set()
    thread.join()


@pytest.mark.usefixtures("waiting")
def test_every_thread_moves_and_comes_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("one processor only")
    monkeypatch.setattr(processors, "LEAST", len(before) - 1)
    worker = max(before)
    caplog.set_level(logging.INFO)
    kept = processors.KeptOff([{worker}])
    try:
        assert affinities() == {frozenset(before - {worker})}
        assert f"off those of DPVS's workers ({worker})" in caplog.text
    finally:
        kept.close()
    assert affinities() == {frozenset(before)}


def test_too_few_are_left(caplog: pytest.LogCaptureFixture) -> None:
    before = affinities()
    caplog.set_level(logging.INFO)
    processors.KeptOff([os.sched_getaffinity(0)]).close()
    assert affinities() == before
    assert "leave too few" in caplog.text


def test_doctor_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: ALL)
    assert doctor._processors({1: {2}, 2: {3}})[1:3] == (True, "2 workers on 2-3, attach would run on 0-1,4-5")
    name, ok, detail, advice = doctor._processors({1: {1, 2, 3, 4, 5}})
    assert (name, ok, detail) == ("processors", None, "1 worker on 1-5 of 0-5")
    assert "Leave two more" in advice
