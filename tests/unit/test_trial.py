# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/trial.py: nothing goes in before one session has been looked at."""

import numpy as np
import numpy.typing as npt
import pytest

from collector.record import RECORD, Records
from probes.agent.abi import Code, RecordOp
from probes.agent.client import AgentRefused
from replicator.trial import Trial, TrialFailed

UPSERT, DELETE, YIELD, CLAIM = (int(op) for op in (RecordOp.UPSERT, RecordOp.DELETE, RecordOp.YIELD, RecordOp.CLAIM))
ADDRESS = 0x1234


class Dpvs:
    """Agent and witness in one. ``refused``: client ports that cannot be put in."""

    max_records = 100

    def __init__(self) -> None:
        self.sessions: set[int] = set()
        self.refused: set[int] = set()
        self.live = False
        self.busy_delete = False
        self.requests: list[tuple[str, list[int]]] = []
        self.seen: list[int] = []
        self.wrong: list[str] = []
        self.left: list[str] = []
        self.late = 2  # questions until the answer is there
        self._codes: dict[int, list[int]] = {}
        self._asked = 0

    def submit(self, ops: npt.NDArray[np.uint8], records: Records, *, trial: bool = False) -> int:
        codes, made = [], False
        for op, port in zip(ops.tolist(), records["cport"].tolist(), strict=True):
            if op == DELETE:
                codes.append(Code.LIVE if self.live else Code.BUSY if self.busy_delete else Code.DELETED)
                self.sessions -= set() if self.live or self.busy_delete else {port}
            elif op == CLAIM:
                codes.append(Code.BUSY if trial else Code.LIVE)
            elif port in self.refused:
                codes.append(Code.NO_SERVICE)
            elif trial and made:
                codes.append(Code.BUSY)
            elif op == YIELD:
                codes.append(Code.YIELDED)
                made = True
            else:
                codes.append(Code.UPDATED if port in self.sessions else Code.CREATED)
                self.sessions.add(port)
                made = True
        self.requests.append(("trial" if trial else "batch", codes))
        self._codes[len(self.requests)] = codes
        self._asked = 0
        return len(self.requests)

    def results(self, request_id: int) -> npt.NDArray[np.uint8] | None:
        self._asked += 1
        return np.array(self._codes[request_id], np.uint8) if self._asked > self.late else None

    def tried(self, request_id: int) -> int:
        return ADDRESS if {Code.CREATED, Code.UPDATED, Code.YIELDED} & set(self._codes[request_id]) else 0

    def differences(self, address: int, record: Records) -> list[str]:
        assert address == ADDRESS
        self.seen.append(int(record["cport"][0]))
        return self.wrong

    def restless(self, address: int, record: Records) -> list[str]:
        return [f"it moves: {text}" for text in self.differences(address, record)]

    def remains(self, address: int, record: Records) -> list[str]:
        assert address == ADDRESS
        assert int(record["cport"][0]) not in self.sessions
        return self.left


def records(*ports: int) -> Records:
    out = np.zeros(len(ports), RECORD)
    out["cport"] = ports
    return out


def upsert(trial: Trial, *ports: int) -> int:
    return trial.submit(np.full(len(ports), UPSERT, np.uint8), records(*ports))


def test_one_is_looked_at_and_taken_out_before_the_batch_goes_in() -> None:
    dpvs = Dpvs()
    trial = Trial(dpvs, dpvs)
    dpvs.refused = {1}
    request = upsert(trial, 1, 2, 3)
    assert dpvs.requests == [
        ("trial", [Code.NO_SERVICE, Code.CREATED, Code.BUSY]),
        ("batch", [Code.DELETED]),
        ("batch", [Code.NO_SERVICE, Code.CREATED, Code.CREATED]),
    ]
    assert (request, dpvs.seen, dpvs.sessions, trial.passed) == (3, [2], {2, 3}, True)
    assert upsert(trial, 4) == 4
    assert [kind for kind, _ in dpvs.requests].count("trial") == 1
    assert trial.max_records == 100


def test_what_cannot_be_put_in_is_no_trial() -> None:
    dpvs = Dpvs()
    trial = Trial(dpvs, dpvs)
    dpvs.refused = {1, 2}
    assert upsert(trial, 1, 2) == 1, "the answers of the trial are those of the batch"
    assert not trial.passed
    trial.submit(np.array([DELETE], np.uint8), records(5))
    assert not trial.passed
    upsert(trial, 1, 3)
    assert trial.passed
    assert dpvs.seen == [3]


def test_a_copy_of_an_earlier_attach_is_looked_at_and_stays() -> None:
    dpvs = Dpvs()
    dpvs.sessions = {7}
    trial = Trial(dpvs, dpvs)
    upsert(trial, 7, 8)
    assert [kind for kind, _ in dpvs.requests] == ["trial", "batch"]
    assert dpvs.sessions == {7, 8}
    assert trial.passed


def test_where_all_is_here_the_first_that_is_made_to_wait_is_the_trial() -> None:
    dpvs = Dpvs()
    trial = Trial(dpvs, dpvs)
    assert trial.submit(np.array([YIELD, YIELD], np.uint8), records(1, 2)) == 2
    assert dpvs.requests == [("trial", [Code.YIELDED, Code.BUSY]), ("batch", [Code.YIELDED, Code.YIELDED])]
    assert (dpvs.seen, trial.passed) == ([1], True)


def test_one_that_does_not_wait_refuses_everything() -> None:
    dpvs = Dpvs()
    dpvs.wrong = ["flags in memory is 0x100, not 0x8100"]
    trial = Trial(dpvs, dpvs)
    with pytest.raises(TrialFailed, match="it moves: flags"):
        trial.submit(np.array([YIELD, YIELD], np.uint8), records(1, 2))
    assert (len(dpvs.requests), trial.passed) == (1, False)


def test_nothing_is_claimed_before_the_trial() -> None:
    dpvs = Dpvs()
    trial = Trial(dpvs, dpvs)
    assert trial.submit(np.array([CLAIM], np.uint8), records(1)) == 1
    assert not trial.passed
    trial.submit(np.array([CLAIM, UPSERT], np.uint8), records(1, 2))
    assert dpvs.requests[-1] == ("batch", [Code.LIVE, Code.CREATED])


def test_one_whose_traffic_came_stays() -> None:
    dpvs = Dpvs()
    dpvs.live = True
    trial = Trial(dpvs, dpvs)
    upsert(trial, 7)
    assert trial.passed
    assert dpvs.sessions == {7}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("wrong", ["timeout in memory is 3000, not 90000"], "timeout in memory is 3000, not 90000"),
        ("left", ["DPVS still knows it"], "DPVS still knows it"),
        ("busy_delete", True, "could not be taken out again .busy."),
    ],
)
def test_a_difference_refuses_everything_and_is_named(field: str, value: object, said: str) -> None:
    dpvs = Dpvs()
    setattr(dpvs, field, value)
    trial = Trial(dpvs, dpvs)
    with pytest.raises(TrialFailed, match=said):
        upsert(trial, 7, 8)
    assert not trial.passed
    assert not dpvs.sessions or field == "busy_delete", "what was tried is taken out all the same"
    assert 8 not in dpvs.sessions
    assert issubclass(TrialFailed, AgentRefused), "the injector stops at it"


def test_an_agent_that_does_not_answer() -> None:
    dpvs = Dpvs()
    dpvs.late = 1 << 30
    times = iter(range(0, 1000, 5))
    with pytest.raises(TrialFailed, match="did not answer within 15 s"):
        upsert(Trial(dpvs, dpvs, lambda: next(times)), 7)
