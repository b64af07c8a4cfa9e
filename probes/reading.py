# SPDX-License-Identifier: GPL-2.0-or-later
"""Which bytes of its structs a program's own code touches, found by following pointers through machine code.

Rules: pure, bytes in, sets of numbers out. A function is followed from its entry along every branch, and into the
functions that it calls, with what its argument registers hold: a pointer named by a *path*. ``("dp_vs_conn",)`` is a
pointer that the caller gave this name; what is loaded from byte 336 there has the path ``("dp_vs_conn", 336)``. Every
access through such a pointer is noted as (path, offset, bytes). Two more things are, with a path that is one longer:
that a pointer is the first argument of a function that has a name (``takes``), and that an argument itself is stored.
What is not understood is forgotten, never guessed: a register that anything else writes to, everything that a call may
clobber. So an access that is noted is one that the code can make; one that is not noted proves nothing by itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import capstone
from capstone import x86

Path = tuple[int | str, ...]
Access = tuple[Path, int, int]  # path, byte offset, bytes; 0 bytes: the address of it is given to a function
Value = tuple[Path, int]  # a pointer: what it is the path of, and how far into that it points
State = tuple[dict[int, Value], dict[int, Value]]  # registers, words of the stack by offset from the entry's rsp

MAX_INSTRUCTIONS = 40_000
MAX_DEPTH = 4  # calls into calls
MAX_PATH = 6
MAX_VISITS = 2  # of one instruction: what a loop's pointer was before it, and in it
CHUNK_BYTES = 512
STACK: Path = ("stack",)
ELEMENT = -2  # in a path: some element of the array that the path so far leads to
_ARGUMENTS = (x86.X86_REG_RDI, x86.X86_REG_RSI, x86.X86_REG_RDX, x86.X86_REG_RCX, x86.X86_REG_R8, x86.X86_REG_R9)
_CLOBBERED = (*_ARGUMENTS, x86.X86_REG_RAX, x86.X86_REG_R10, x86.X86_REG_R11)  # System V ABI, by any call
_FAMILIES = (
    ("rax", "eax", "ax", "al", "ah"), ("rbx", "ebx", "bx", "bl", "bh"), ("rcx", "ecx", "cx", "cl", "ch"),
    ("rdx", "edx", "dx", "dl", "dh"), ("rsi", "esi", "si", "sil"), ("rdi", "edi", "di", "dil"),
    ("rbp", "ebp", "bp", "bpl"), ("rsp", "esp", "sp", "spl"),
    *((f"r{n}", f"r{n}d", f"r{n}w", f"r{n}b") for n in range(8, 16)),
)  # fmt: skip
_WHOLE = {
    getattr(x86, f"X86_REG_{name.upper()}"): getattr(x86, f"X86_REG_{family[0].upper()}")
    for family in _FAMILIES
    for name in family
}
_STACKED = frozenset({x86.X86_INS_PUSH, x86.X86_INS_POP, x86.X86_INS_CALL})


@dataclass
class Reader:
    """``code(address)``: some bytes of the program from a link-time address on, empty where there is no code.

    ``returns``: functions whose result has a name, by address. ``takes``: what the first argument of a function is,
    by address: that ``("dp_vs_conn",)`` plus 264 is given to one is noted as (("dp_vs_conn", name), 264, 0). That the
    argument ``name`` is stored is noted as ((path, "=name"), offset, 8).
    """

    code: Callable[[int], bytes]
    returns: Mapping[int, str] = field(default_factory=dict)
    takes: Mapping[int, str] = field(default_factory=dict)
    found: set[Access] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        self._decoder.detail = True
        self._decoded: dict[int, Any] = {}
        self._left = 0
        self._frame: str | None = None
        self._results: dict[tuple[int, tuple[tuple[int, Value], ...]], Value | None] = {}

    def follow(self, address: int, arguments: Mapping[int, str], frame: str | None = None) -> None:
        """Add to ``found`` what the function at ``address`` does with these arguments: number from 0 -> its name.

        ``frame``: a name for what its caller put on the stack, from the seventh argument on: the access to it is noted
        as ((frame,), offset, bytes), the offset from the stack pointer at entry, where the return address is.
        """
        self._left, self._frame = MAX_INSTRUCTIONS, frame
        registers: dict[int, Value] = {_ARGUMENTS[n]: ((name,), 0) for n, name in arguments.items()}
        self._function(address, registers, 0)

    # --- one function ------------------------------------------------------------------------------------------------

    def _function(self, address: int, registers: dict[int, Value], depth: int) -> Value | None:
        """Follow it; the pointer that it returns, if it is the same one wherever it returns any that is known."""
        key = (address, tuple(sorted(registers.items())))
        if key in self._results or depth > MAX_DEPTH:
            return self._results.get(key)
        self._results[key] = None  # while it is being followed, should it call itself
        results: set[Value] = set()
        work: list[tuple[int, State]] = [(address, ({**registers, x86.X86_REG_RSP: (STACK, 0)}, {}))]
        visits: dict[int, list[State]] = {}
        while work and self._left > 0:
            at, state = work.pop()
            while self._left > 0:
                seen = visits.setdefault(at, [])
                if len(seen) >= MAX_VISITS or state in seen:
                    break
                seen.append((dict(state[0]), dict(state[1])))
                instruction = self._at(at)
                if instruction is None:
                    break
                self._left -= 1
                following = self._step(instruction, state, depth)
                if not following:
                    if instruction.group(capstone.CS_GRP_RET) and (result := state[0].get(x86.X86_REG_RAX)):
                        results.add(_array(result))
                    break
                work += [(target, (dict(state[0]), dict(state[1]))) for target in following[1:]]
                at = following[0]
        self._results[key] = results.pop() if len(results) == 1 else None
        return self._results[key]

    def _at(self, address: int) -> Any:
        if address not in self._decoded:
            code = self.code(address)
            for instruction in self._decoder.disasm(code, address):
                if address < instruction.address > address + CHUNK_BYTES - 32:
                    break  # the bytes may end within this one
                self._decoded.setdefault(instruction.address, instruction)
        return self._decoded.setdefault(address, None)

    def _step(self, ins: Any, state: State, depth: int) -> list[int]:
        """Do one instruction to ``state``; where it goes on, most likely first."""
        operands = ins.operands
        after = ins.address + ins.size
        for operand in operands:
            if operand.type == x86.X86_OP_MEM and ins.id not in (x86.X86_INS_LEA, x86.X86_INS_NOP):
                self._note(operand, state, depth)
        if ins.group(capstone.CS_GRP_RET) or ins.id in (x86.X86_INS_UD2, x86.X86_INS_HLT):
            return []
        if ins.group(capstone.CS_GRP_JUMP):
            if operands[0].type != x86.X86_OP_IMM:
                return []
            target = int(operands[0].imm)
            if ins.id == x86.X86_INS_JMP:  # a call as the last thing that a function does
                self._named(target, state[0])
            return [target] if ins.id == x86.X86_INS_JMP else [after, target]
        if ins.group(capstone.CS_GRP_CALL):
            held = {r: v for r in _ARGUMENTS if (v := state[0].get(r)) is not None and v[0] != STACK}
            self.found.update((path, offset, 0) for path, offset in held.values())
            target = int(operands[0].imm) if operands[0].type == x86.X86_OP_IMM else 0
            self._named(target, held)
            result = self._function(target, held, depth + 1) if held and target else None
            for register in _CLOBBERED:
                state[0].pop(register, None)
            _put(state[0], x86.X86_REG_RAX, ((self.returns[target],), 0) if target in self.returns else result)
            return [after]
        self._effect(ins, operands, state)
        return [after]

    def _effect(self, ins: Any, operands: Any, state: State) -> None:
        registers, stack = state
        rsp = registers.get(x86.X86_REG_RSP)
        if ins.id in _STACKED and rsp is not None:
            if ins.id == x86.X86_INS_PUSH:
                rsp = (STACK, rsp[1] - 8)
                registers[x86.X86_REG_RSP] = rsp
                _put(stack, rsp[1], self._value(operands[0], state) if operands[0].type == x86.X86_OP_REG else None)
            else:
                _put(registers, operands[0].reg, stack.get(rsp[1]))
                registers[x86.X86_REG_RSP] = (STACK, rsp[1] + 8)
            return
        moves = ins.id in (x86.X86_INS_MOV, x86.X86_INS_MOVABS) and operands[0].size == 8
        if moves and operands[0].type == x86.X86_OP_REG:
            _put(registers, operands[0].reg, self._value(operands[1], state))
            return
        if moves and operands[0].type == x86.X86_OP_MEM:
            place = self._place(operands[0], state)
            if place is not None and place[0] == STACK:
                _put(stack, place[1], self._value(operands[1], state) if operands[1].type == x86.X86_OP_REG else None)
            elif place is not None and operands[1].type == x86.X86_OP_REG:
                held = self._value(operands[1], state)
                if held is not None and len(held[0]) == 1 and held[1] == 0 and held[0] != STACK:
                    self.found.add(((*place[0], f"={held[0][0]}"), place[1], 8))
            return
        if ins.id == x86.X86_INS_LEA and operands[0].size == 8:
            _put(registers, operands[0].reg, self._place(operands[1], state))
            return
        if ins.id in (x86.X86_INS_ADD, x86.X86_INS_SUB) and operands[1].type == x86.X86_OP_IMM:
            held = registers.get(operands[0].reg) if operands[0].type == x86.X86_OP_REG else None
            if held is not None and operands[0].size == 8:
                step = int(operands[1].imm)
                registers[operands[0].reg] = (held[0], held[1] + (step if ins.id == x86.X86_INS_ADD else -step))
                return
        if ins.id == x86.X86_INS_ADD and operands[0].size == 8 and operands[1].type == x86.X86_OP_REG:
            both = [v for o in operands if o.type == x86.X86_OP_REG and (v := registers.get(o.reg)) is not None]
            _put(registers, operands[0].reg, _element(both[0]) if len(both) == 1 else None)
            return
        for register in ins.regs_access()[1]:
            registers.pop(_WHOLE.get(register, register), None)

    def _named(self, target: int, registers: Mapping[int, Value]) -> None:
        held = registers.get(x86.X86_REG_RDI)
        if target in self.takes and held is not None and held[0] != STACK:
            self.found.add(((*held[0], self.takes[target]), held[1], 0))

    # --- operands ----------------------------------------------------------------------------------------------------

    def _place(self, operand: Any, state: State) -> Value | None:
        """The pointer that a memory operand amounts to: an offset from one that is known, or in an array there."""
        memory = operand.mem
        if memory.segment:
            return None
        held = state[0].get(memory.base) if memory.base else None
        if memory.index:
            other = state[0].get(memory.index)
            if (held is None) == (other is None) or (held is None and memory.scale != 1):
                return None
            held = _element(held or other)
        return None if held is None else (held[0], held[1] + int(memory.disp))

    def _value(self, operand: Any, state: State) -> Value | None:
        if operand.type == x86.X86_OP_REG:
            return state[0].get(operand.reg)
        if operand.type == x86.X86_OP_MEM and (place := self._place(operand, state)) is not None:
            if place[0] == STACK:
                return state[1].get(place[1])
            if len(place[0]) < MAX_PATH:
                return ((*place[0], place[1]), 0)
        return None

    def _note(self, operand: Any, state: State, depth: int) -> None:
        place = self._place(operand, state)
        if place is None:
            return
        if place[0] != STACK:
            self.found.add((place[0], place[1], int(operand.size)))
        elif self._frame is not None and depth == 0 and place[1] > 0:
            self.found.add(((self._frame,), place[1], int(operand.size)))


def _array(of: Value) -> Value:
    """Of an element of an array, as of the array itself: both are where its first element is."""
    return (of[0][:-1], of[1]) if of[0][-1] == ELEMENT else of


def _element(of: Value | None) -> Value | None:
    if of is None or of[0] == STACK or len(of[0]) >= MAX_PATH:
        return None
    return of if of[0][-1] == ELEMENT else ((*of[0], ELEMENT), of[1])


def _put(where: dict[int, Value], key: int, value: Value | None) -> None:
    if value is None:
        where.pop(key, None)
    else:
        where[key] = value
