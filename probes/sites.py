# SPDX-License-Identifier: GPL-2.0-or-later
"""Choose where a uprobe costs least, by reading machine code.

Rules: pure, bytes in, ``Site`` out. The kernel runs some instructions under a uprobe itself (a five-byte nop, nops,
jumps, ``push``, ``call``) and single-steps all others, which costs the probed thread ten times as much (kernel
arch/x86/kernel/uprobes.c: branch_setup_xol_ops, push_setup_xol_ops). A site must be executed exactly once in each call
of its function, and a register must still hold the function's first argument there: so only the *entry block* counts,
from the first instruction to the first one that may leave the straight line, up to where the argument is overwritten or
where something jumps back into it. A site is always the first byte of an instruction.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import capstone
from capstone import x86

from probes.errors import DpvsProbeError

Kind = Literal["nop5", "nop", "jump", "push", "call", "stepped"]
# Nanoseconds a hit costs the probed thread: measured, kernel 6.18 in a virtual machine. Only their order matters.
COST_NS: dict[Kind, int] = {"nop5": 560, "nop": 700, "jump": 700, "push": 790, "call": 910, "stepped": 11000}
CHEAP_NS = 2000
ARGUMENT = "rdi"  # first argument of the System V ABI
# Registers that a copy of the argument may be in, as struct pt_regs names them.
PT_REGS = {
    "rdi": "di", "rsi": "si", "rax": "ax", "rbx": "bx", "rcx": "cx", "rdx": "dx", "rbp": "bp",
    "r8": "r8", "r9": "r9", "r10": "r10", "r11": "r11", "r12": "r12", "r13": "r13", "r14": "r14", "r15": "r15",
}  # fmt: skip
_NOP5 = bytes.fromhex("0f1f440000")


class NoSite(DpvsProbeError):
    help_text = "This binary's code cannot be probed: attach with --scan-only, which does without probes."


@dataclass(frozen=True)
class Site:
    """Where to put a probe. ``address`` is a run-time address; ``conn_register`` holds the session there."""

    address: int
    kind: Kind
    mnemonic: str
    why: str
    conn_register: str
    function: str = ""

    @property
    def cost_ns(self) -> int:
        return COST_NS[self.kind]

    @property
    def cheap(self) -> bool:
        """False when the kernel has to single-step the instruction."""
        return self.cost_ns <= CHEAP_NS

    @property
    def pt_regs_field(self) -> str:
        return PT_REGS[self.conn_register]


def choose(code: bytes, address: int, function: str = "") -> Site:
    """The cheapest site in the entry block of a function; its first instruction, single-stepped, if there is none."""
    block = entry_block(code, address)
    if not block:
        raise NoSite(f"{function or hex(address)} does not start with readable machine code")
    best: Site | None = None
    for instruction, registers in block:
        kind = classify(bytes(instruction.bytes))
        if best is None or COST_NS[kind] < best.cost_ns:
            distance = instruction.address - address
            where = "first instruction" if distance == 0 else f"straight line from the entry, +{distance}"
            how = "single-stepped by the kernel" if kind == "stepped" else "run by the kernel itself"
            text = f"{instruction.mnemonic} {instruction.op_str}".strip()
            register = ARGUMENT if ARGUMENT in registers else registers[0]
            best = Site(instruction.address, kind, text, f"{where}, {how}", register, function)
    assert best is not None
    return best


def choose_call(code: bytes, address: int, callee: int, function: str = "") -> Site:
    """The only ``call callee`` in a function: the callee's argument is in place there. Calls are run by the kernel."""
    calls = [i for i in _decode(code, address) if i.mnemonic == "call" and _target(i) == callee]
    if len(calls) != 1:
        raise NoSite(f"{function or hex(address)} has {len(calls)} calls of the function at {callee:#x}, not one")
    call = calls[0]
    why = f"the only call of it in {function or 'the caller'}, run by the kernel itself"
    return Site(call.address, classify(bytes(call.bytes)), f"call {callee:#x}", why, ARGUMENT, function)


def session_sites(function: Callable[[str], tuple[int, bytes]]) -> tuple[Site, Site]:
    """Where DPVS creates and where it frees a session; ``function`` gives a function's address and code by name.

    Create: ``dp_vs_redirect_init(conn)``, called once for each new session when its tuple is complete; if its entry
    would be single-stepped, the call of it in ``dp_vs_conn_new``. Free: ``dp_vs_laddr_unbind(conn)`` is called exactly
    once for each session that got that far, in every way a session can end; ``dp_vs_redirect_free(conn)`` sees the
    same, and also creations that failed before (overload, no local port), which would only cost. DPVS 1.10.2,
    ip_vs_conn.c: dp_vs_conn_new, dp_vs_conn_expire, conn_flush.
    """
    creates = [_choose_in(function, "dp_vs_redirect_init")]
    if not creates[0].cheap:
        address, code = function("dp_vs_conn_new")
        try:
            creates.append(choose_call(code, address, function("dp_vs_redirect_init")[0], "dp_vs_conn_new"))
        except NoSite:
            pass  # inlined or tail-called: the dear site remains
    frees = [_choose_in(function, "dp_vs_laddr_unbind"), _choose_in(function, "dp_vs_redirect_free")]
    return cheapest(creates), cheapest(frees)


def _choose_in(function: Callable[[str], tuple[int, bytes]], name: str) -> Site:
    address, code = function(name)
    return choose(code, address, name)


def cheapest(sites: Iterable[Site]) -> Site:
    """The cheapest of several sites that see the same; of equals the one named first."""
    return min(sites, key=lambda site: site.cost_ns)


def entry_block(code: bytes, address: int) -> list[tuple[capstone.CsInsn, Sequence[str]]]:
    """(instruction, registers that hold the argument before it) of the straight line from the entry.

    Ends with the first instruction that may branch or call, before one that a branch of this function leads to (it may
    run more than once), and where no register holds the argument any more.
    """
    instructions = _decode(code, address)
    targets = {t for i in instructions if (t := _target(i)) is not None and i.mnemonic != "call"}
    holders: list[str] = [ARGUMENT]
    block: list[tuple[capstone.CsInsn, Sequence[str]]] = []
    for instruction in instructions:
        if instruction.address in targets and instruction.address != address:
            break
        if instruction.address == address and address in targets:
            return []  # the entry itself is a loop: nothing here runs once a call
        block.append((instruction, tuple(holders)))
        if _leaves_line(instruction):
            break
        holders = _after(instruction, holders)
        if not holders:
            break
    return block


def classify(code: bytes) -> Kind:
    """How the kernel runs this instruction under a uprobe (arch/x86/kernel/uprobes.c, Linux 5.10 to 6.18)."""
    if code == _NOP5:
        return "nop5"
    if 0x66 in code[:1]:  # an operand size prefix: the kernel emulates no such branch
        return "stepped"
    first = code[0]
    if first == 0x90:
        return "nop"
    if first in (0xEB, 0xE9) or 0x70 <= first <= 0x7F or (first == 0x0F and 0x80 <= code[1] <= 0x8F):
        return "jump"
    if first == 0xE8:
        return "call"
    if 0x50 <= first <= 0x57 or (first == 0x41 and len(code) == 2 and 0x50 <= code[1] <= 0x57):
        return "push"
    return "stepped"


def _decode(code: bytes, address: int) -> list[capstone.CsInsn]:
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    engine.detail = True
    return list(engine.disasm(code, address))


def _target(instruction: capstone.CsInsn) -> int | None:
    """Where a direct branch or call goes."""
    groups = (capstone.CS_GRP_JUMP, capstone.CS_GRP_CALL, capstone.CS_GRP_BRANCH_RELATIVE)
    if not any(instruction.group(group) for group in groups) or not instruction.operands:
        return None
    operand = instruction.operands[0]
    return int(operand.imm) if operand.type == x86.X86_OP_IMM else None


def _leaves_line(instruction: capstone.CsInsn) -> bool:
    groups = (
        capstone.CS_GRP_JUMP, capstone.CS_GRP_CALL, capstone.CS_GRP_RET, capstone.CS_GRP_INT, capstone.CS_GRP_IRET,
        capstone.CS_GRP_BRANCH_RELATIVE,
    )  # fmt: skip
    return any(instruction.group(group) for group in groups) or instruction.mnemonic in ("ud2", "hlt", "syscall")


def _after(instruction: capstone.CsInsn, holders: Sequence[str]) -> list[str]:
    """The registers that hold the argument after an instruction of the straight line."""
    written = {_full(instruction.reg_name(register)) for register in instruction.regs_access()[1]}
    kept = [register for register in holders if register not in written]
    operands = instruction.operands
    if instruction.mnemonic == "mov" and len(operands) == 2 and all(o.type == x86.X86_OP_REG for o in operands):
        to, source = (instruction.reg_name(o.reg) for o in operands)
        if source in holders and to in PT_REGS:
            kept.append(to)
    return kept


def _full(register: str | None) -> str:
    """The 64-bit register that a part of it belongs to: edi, di and dil are rdi; r8d is r8."""
    name = register or ""
    if name in PT_REGS or name == "rsp":
        return name
    if name.startswith("r") and name[1:-1].isdigit():  # r8d, r8w, r8b
        return name[:-1]
    core = name.removeprefix("e").rstrip("lh") if len(name) > 2 or name.endswith(("l", "h")) else name
    full = {"a": "rax", "b": "rbx", "c": "rcx", "d": "rdx"}.get(core)
    return full or f"r{core}"
