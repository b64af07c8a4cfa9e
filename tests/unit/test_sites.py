# SPDX-License-Identifier: GPL-2.0-or-later
"""probes/sites.py on machine code by hand, and on whole binaries checked against objdump."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from probes.sites import NoSite, Site, cheapest, choose, choose_call, classify, entry_block, session_sites
from probes.target import Image

HERE = 0x1000
ROOT = Path(__file__).resolve().parents[2]

ENDBR64, NOP5, RET = "f30f1efa", "0f1f440000", "c3"
PUSH_RBP, PUSH_R12, MOV_RBP_RSP = "55", "4154", "4889e5"
MOV_RBX_RDI, MOV_RDI_RSI, XOR_EDI, MOV_RAX_MEM = "4889fb", "4889f7", "31ff", "488b8730020000"
TEST_RAX, SUB_RSP = "4885c0", "4883ec10"
JE_NEAR, JE_SHORT, JMP_SHORT, JMP_NEAR, JMP_REG = "0f8410000000", "7404", "eb04", "e910000000", "ffe0"
CALL_NEAR, CALL_MEM = "e810000000", "ff10"


def code(*parts: str) -> bytes:
    return bytes.fromhex("".join(parts))


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        (NOP5, "nop5"),
        ("90", "nop"),
        (JMP_SHORT, "jump"),
        (JMP_NEAR, "jump"),
        (JE_SHORT, "jump"),
        (JE_NEAR, "jump"),
        (CALL_NEAR, "call"),
        (PUSH_RBP, "push"),
        (PUSH_R12, "push"),
        (ENDBR64, "stepped"),
        (MOV_RAX_MEM, "stepped"),
        (SUB_RSP, "stepped"),
        (RET, "stepped"),
        (JMP_REG, "stepped"),
        (CALL_MEM, "stepped"),
        ("0f1f00", "stepped"),  # a short nop that older kernels single-step
        ("66e90000", "stepped"),  # 16-bit jump
        ("6655", "stepped"),  # 16-bit push
        ("4150"[:2] + "8b07", "stepped"),  # REX and a load, not a push
        ("e300", "stepped"),  # jrcxz
        ("ff36", "stepped"),  # push from memory
    ],
)
def test_how_the_kernel_runs_an_instruction(instruction: str, kind: str) -> None:
    assert classify(bytes.fromhex(instruction)) == kind


@pytest.mark.parametrize(
    ("name", "parts", "offset", "kind", "register"),
    [
        ("a push at the entry", [PUSH_RBP, MOV_RBP_RSP, RET], 0, "push", "rdi"),
        ("a patchable entry", [ENDBR64, NOP5, PUSH_RBP, RET], 4, "nop5", "rdi"),
        ("a jcc behind two plain ones", [MOV_RAX_MEM, TEST_RAX, JE_NEAR, PUSH_RBP], 10, "jump", "rdi"),
        ("a jcc is cheaper than a push", [PUSH_R12, MOV_RAX_MEM, TEST_RAX, JE_NEAR, RET], 12, "jump", "rdi"),
        ("the first of equals", [PUSH_RBP, PUSH_R12, RET], 0, "push", "rdi"),
        ("nothing behind a branch", [MOV_RAX_MEM, "eb00", PUSH_RBP], 7, "jump", "rdi"),
        ("argument kept in another register", [MOV_RBX_RDI, MOV_RDI_RSI, PUSH_RBP, RET], 6, "push", "rbx"),
        ("argument overwritten before", [XOR_EDI, PUSH_RBP, RET], 0, "stepped", "rdi"),
        ("overwritten by its 32-bit half", ["bf01000000", PUSH_RBP], 0, "stepped", "rdi"),
        ("only plain instructions", [ENDBR64, MOV_RAX_MEM, RET], 0, "stepped", "rdi"),
        ("a call at the end of the line", [SUB_RSP, CALL_NEAR, PUSH_RBP], 4, "call", "rdi"),
        ("nothing after a call", [MOV_RAX_MEM, CALL_MEM, PUSH_RBP], 0, "stepped", "rdi"),
        ("a return ends it", [MOV_RAX_MEM, RET, PUSH_RBP], 0, "stepped", "rdi"),
        # mov; push; ...; jne back to the push: it may run more than once a call
        ("a loop back into the line", [MOV_RAX_MEM, PUSH_RBP, TEST_RAX, "75fa"], 0, "stepped", "rdi"),
    ],
)
def test_the_cheapest_in_the_entry_block(name: str, parts: list[str], offset: int, kind: str, register: str) -> None:
    site = choose(code(*parts), HERE, "f")
    assert (site.address - HERE, site.kind, site.conn_register) == (offset, kind, register), name
    assert site.cheap == (kind != "stepped")
    assert site.why
    assert site.function == "f"


def test_a_loop_to_the_very_entry_has_no_site() -> None:
    with pytest.raises(NoSite):
        choose(code(PUSH_RBP, TEST_RAX, "75fa", RET), HERE)


@pytest.mark.parametrize("parts", [[""], ["06"], ["0f"]])
def test_no_code_no_site(parts: list[str]) -> None:
    with pytest.raises(NoSite):
        choose(code(*parts), HERE)


def test_the_call_of_a_function() -> None:
    caller = code(PUSH_RBP, MOV_RBX_RDI, CALL_NEAR, RET)
    site = choose_call(caller, HERE, HERE + 4 + 5 + 0x10)
    assert (site.address - HERE, site.kind, site.conn_register) == (4, "call", "rdi")


@pytest.mark.parametrize("parts", [[PUSH_RBP, RET], [CALL_NEAR, "e80b000000", RET]])
def test_no_call_or_more_than_one(parts: list[str]) -> None:
    with pytest.raises(NoSite):
        choose_call(code(*parts), HERE, HERE + 5 + 0x10)


def test_cheapest_prefers_the_first_of_equals() -> None:
    dear, one, two = (Site(a, k, "", "", "rdi") for a, k in ((1, "stepped"), (2, "jump"), (3, "jump")))
    assert cheapest([dear, one, two]) is one


class Functions:
    """What ``Target.function`` gives, from hand-made code."""

    def __init__(self, **functions: bytes) -> None:
        self.table = {name: (HERE + i * 0x1000, body) for i, (name, body) in enumerate(functions.items())}

    def __call__(self, name: str) -> tuple[int, bytes]:
        return self.table[name]


LINE = code(MOV_RAX_MEM, TEST_RAX, JE_NEAR, RET)
PLAIN = code(MOV_RAX_MEM, RET)


def test_session_sites_prefer_what_pairs_with_create() -> None:
    functions = Functions(dp_vs_redirect_init=LINE, dp_vs_laddr_unbind=LINE, dp_vs_redirect_free=LINE)
    create, free = session_sites(functions)
    assert (create.function, free.function) == ("dp_vs_redirect_init", "dp_vs_laddr_unbind")


def test_session_sites_take_the_cheaper_free() -> None:
    functions = Functions(dp_vs_redirect_init=LINE, dp_vs_laddr_unbind=PLAIN, dp_vs_redirect_free=LINE)
    assert session_sites(functions)[1].function == "dp_vs_redirect_free"


def test_session_sites_fall_back_to_the_call() -> None:
    call = bytes([0xE8]) + (HERE - (HERE + 0x1000 + 5) & 0xFFFFFFFF).to_bytes(4, "little")
    functions = Functions(
        dp_vs_redirect_init=PLAIN, dp_vs_conn_new=call + b"\xc3", dp_vs_laddr_unbind=LINE, dp_vs_redirect_free=LINE
    )
    create, _ = session_sites(functions)
    assert (create.kind, create.function, create.address) == ("call", "dp_vs_conn_new", HERE + 0x1000)


def test_session_sites_without_a_cheap_create() -> None:
    functions = Functions(
        dp_vs_redirect_init=PLAIN, dp_vs_conn_new=PLAIN, dp_vs_laddr_unbind=LINE, dp_vs_redirect_free=LINE
    )
    create, _ = session_sites(functions)
    assert not create.cheap
    assert create.address == HERE


def binaries() -> list[str]:
    named = [os.environ.get("DPVS_BIN", ""), str(ROOT / "build/twin/dpvs-twin")]
    return [path for path in named if path and Path(path).exists()]


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.parametrize("path", binaries() or [pytest.param("", marks=pytest.mark.skip("no twin built, no DPVS_BIN"))])
def test_every_site_of_a_real_binary_is_an_instruction_of_its_straight_line(path: str) -> None:
    """Against objdump's decoding: on a boundary, and nothing before it that branches."""
    image = Image(path)
    names = ["dp_vs_redirect_init", "dp_vs_laddr_unbind", "dp_vs_redirect_free", "dp_vs_conn_new", "dp_vs_conn_put"]
    for name in names:
        symbol = image.symbol(name)
        assert symbol is not None
        body = image.code(symbol.value, symbol.size)
        site = choose(body, symbol.value, name)
        span = [f"--start-address={symbol.value}", f"--stop-address={symbol.value + symbol.size}"]
        text = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", *span, path], capture_output=True, text=True, check=True
        ).stdout
        lines = {int(m[1], 16): m[2] for m in re.finditer(r"^\s*([0-9a-f]+):\t(.*)$", text, re.M)}
        assert site.address in lines, name
        before = [lines[at].split()[0] for at in sorted(lines) if at < site.address]
        assert not any(word.startswith(("j", "call", "ret", "bnd")) for word in before), (name, before)
        assert len(entry_block(body, symbol.value)) > len(before)
