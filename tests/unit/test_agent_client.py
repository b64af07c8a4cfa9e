# SPDX-License-Identifier: GPL-2.0-or-later
"""probes/agent/client.py: what stands where the agent's door should be may be anything."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from probes.agent import abi
from probes.agent.client import AgentAbsent, Door, visible_pid
from probes.agent.loading import tracer_of
from probes.target import Target

BASE = 0x1000


class Process:
    """A process whose memory is one door."""

    pid = 4711

    def __init__(self, **fields: Any) -> None:
        self.door = np.zeros((), abi.DOOR)
        self.door["magic"], self.door["abi"] = abi.DOOR_MAGIC, abi.ABI
        for name, value in fields.items():
            self.door[name] = value

    def read(self, address: int, size: int) -> bytes:
        return self.door.tobytes()[address - BASE : address - BASE + size]


@pytest.mark.parametrize("state", [6, 77, 0xFFFFFFFF])
def test_a_state_that_no_agent_has(state: int) -> None:
    door = Door(cast(Target, Process(state=state)), BASE)
    for ask in (lambda: door.state, door.prove):
        with pytest.raises(AgentAbsent):
            ask()


def test_its_words_can_be_printed() -> None:
    process = Process(state=abi.State.FAILED, version=b"1\x1b[2J", error=b"no\nmemory \xff")
    door = Door(cast(Target, process), BASE)
    assert (door.version, door.error) == ("1?[2J", "no?memory \ufffd")
    with pytest.raises(AgentAbsent, match=r"never came up: no\?memory"):
        door.prove()


def test_a_process_may_be_called_anything() -> None:
    name = Path("/proc/self/comm")
    before = name.read_bytes()
    try:
        for called in (b"\xff\xfe", b"\x0bTracerPid: 7", b"\rTracerPid: 7", b"\rNSpid: 7"):
            name.write_bytes(called)
            assert tracer_of(os.getpid()) == 0
            assert visible_pid(cast(Target, SimpleNamespace(pid=os.getpid()))) == os.getpid()
    finally:
        name.write_bytes(before)
