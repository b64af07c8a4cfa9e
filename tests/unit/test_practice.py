# SPDX-License-Identifier: GPL-2.0-or-later
"""The practice process: its loops run, its sites are the instructions they are meant to be."""

import os
import signal

import capstone
import pytest

from probes.practice import REGISTERS, Practice, PracticeFailed, assumed, code_for, median_of_rounds
from probes.sites import COST_NS, PT_REGS, Kind, Site, classify

KINDS: tuple[Kind, ...] = tuple(COST_NS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_site_is_of_its_kind_and_the_session_is_in_its_register(kind: Kind) -> None:
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    for register in PT_REGS:
        code, (loop,) = code_for([(kind, register)])
        instructions = list(engine.disasm(code[loop.function :], loop.function))
        at = next(n for n, i in enumerate(instructions) if i.address == loop.site)
        assert classify(bytes(instructions[at].bytes)) == kind
        before = instructions[at - 1]
        assert f"{before.mnemonic} {before.op_str}" == f"mov {register}, qword ptr [rsp]"


def test_every_loop_in_every_register_comes_to_its_end() -> None:
    sites = [(kind, register) for kind in KINDS for register in REGISTERS if register in PT_REGS]
    with Practice(sites) as practice:
        for which in range(len(sites)):
            assert 0 <= practice.run(which, 1000) < 1000
        middle, count = median_of_rounds(practice, 0, 1000.0, rounds=3)
        assert count == 6000
        assert middle < 1000
        pid = practice.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_practice_process_that_dies_is_an_error_and_not_a_wait() -> None:
    with Practice([("nop", "rdi")]) as practice:
        os.kill(practice.pid, signal.SIGKILL)
        with pytest.raises(PracticeFailed, match=r"ended|answer"):
            practice.run(0, 1000)


def test_nothing_is_left_open() -> None:
    before = os.listdir("/proc/self/fd")
    with Practice([("push", "rbx")]):
        pass
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_assumed_costs_are_on_the_dear_side() -> None:
    push, stepped = (Site(0, kind, "", "", "rdi") for kind in ("push", "stepped"))  # type: ignore[arg-type]
    costs = assumed((push, stepped))
    assert costs == (1.5 * COST_NS["push"], 1.5 * COST_NS["stepped"], False)
    assert costs.session_ns == costs.create_ns + costs.free_ns
