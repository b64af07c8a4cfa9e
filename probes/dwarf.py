# SPDX-License-Identifier: GPL-2.0-or-later
"""Struct layouts out of debug information (DWARF 2 to 5), of an object file, a program, or the debug file of one.

Rules: reads a file, runs nothing. Structs, their members (those of unnamed unions and structs too), the arguments of
functions and the values of enumerations, by the names that are asked for. A unit is looked into only while something is
still missing: a whole DPVS has a thousand of them.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elftools.common.exceptions import DWARFError, ELFError
from elftools.elf.elffile import ELFFile

from probes.errors import DpvsProbeError
from probes.layout import Struct

MAX_NESTING = 8
REGISTERS, WORD = 6, 8  # arguments that are passed in registers; bytes of each of the others


class NoDebugInformation(DpvsProbeError):
    help_text = "It has to be built with -g, and not stripped; or give the source tree of DPVS (--tree) and its DPDK."


@dataclass
class Found:
    """What a file says: structs by name, enumerators by name."""

    structs: dict[str, Struct] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)


def read(path: str | Path, structs: Collection[str], values: Collection[str] = ()) -> Found:
    """Look for these structs and enumerators in a file. Raises NoDebugInformation."""
    found = Found()
    try:
        with open(path, "rb") as file:
            elf = ELFFile(file)
            if not elf.has_dwarf_info(strict=True):
                raise NoDebugInformation(f"{path} has no debug information")
            info = elf.get_dwarf_info()
            for unit in info.iter_CUs():
                _unit(unit, found, structs, values)
                if all(name in found.structs for name in structs) and all(name in found.values for name in values):
                    break
    except (ELFError, DWARFError, OSError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise NoDebugInformation(f"the debug information of {path} cannot be read: {error}") from None
    return found


def has(path: str | Path) -> bool:
    """Whether a file carries debug information."""
    try:
        with open(path, "rb") as file:
            return bool(ELFFile(file).has_dwarf_info(strict=True))
    except (ELFError, OSError):
        return False


def _unit(unit: Any, found: Found, structs: Collection[str], values: Collection[str]) -> None:
    for die in unit.iter_DIEs():
        if die.tag == "DW_TAG_structure_type":
            name = _name(die)
            if name in structs and name not in found.structs and "DW_AT_byte_size" in die.attributes:
                fields = {member: (at, size) for member, at, size in _members(die)}
                found.structs[name] = Struct(name, die.attributes["DW_AT_byte_size"].value, fields)
        elif die.tag == "DW_TAG_subprogram" and (name := _name(die)) in structs and name not in found.structs:
            if (frame := _frame(name, die)) is not None:
                found.structs[name] = frame
        elif die.tag == "DW_TAG_enumerator" and (name := _name(die)) in values:
            found.values.setdefault(name, int(die.attributes["DW_AT_const_value"].value))


def _frame(name: str, die: Any) -> Struct | None:
    """The arguments of a function from the seventh on, as a struct above the stack pointer at its entry (x86-64); None
    for one whose arguments this does not say, or that has no more than six. Each is a number or a pointer in DPVS."""
    arguments = [child for child in die.iter_children() if child.tag == "DW_TAG_formal_parameter"]
    if len(arguments) <= REGISTERS or not all(_name(argument) for argument in arguments):
        return None
    fields = {
        _name(argument): (WORD * (number + 1), _size(argument.get_DIE_from_attribute("DW_AT_type")))
        for number, argument in enumerate(arguments[REGISTERS:])
    }
    return Struct(name, WORD * (len(fields) + 1), fields)


def _name(die: Any) -> str:
    attribute = die.attributes.get("DW_AT_name")
    return attribute.value.decode(errors="replace") if attribute else ""


def _members(die: Any, base: int = 0, depth: int = 0) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each member, those of unnamed members in place of them."""
    for member in die.iter_children():
        if member.tag != "DW_TAG_member" or "DW_AT_bit_size" in member.attributes:
            continue
        at = member.attributes.get("DW_AT_data_member_location")
        offset = base + (int(at.value) if at is not None and isinstance(at.value, int) else 0)
        kind = member.get_DIE_from_attribute("DW_AT_type")
        if name := _name(member):
            yield name, offset, _size(kind)
        elif depth < MAX_NESTING:
            yield from _members(_plain(kind), offset, depth + 1)


def _plain(die: Any) -> Any:
    while die.tag in ("DW_TAG_typedef", "DW_TAG_volatile_type", "DW_TAG_const_type", "DW_TAG_atomic_type"):
        die = die.get_DIE_from_attribute("DW_AT_type")
    return die


def _size(die: Any) -> int:
    die = _plain(die)
    if die.tag == "DW_TAG_array_type":
        count = 1
        for part in die.iter_children():
            if part.tag == "DW_TAG_subrange_type":
                if "DW_AT_count" in part.attributes:
                    count *= int(part.attributes["DW_AT_count"].value)
                else:
                    bound = part.attributes.get("DW_AT_upper_bound")
                    count *= int(bound.value) + 1 if bound is not None and isinstance(bound.value, int) else 0
        return count * _size(die.get_DIE_from_attribute("DW_AT_type"))
    if "DW_AT_byte_size" in die.attributes:
        return int(die.attributes["DW_AT_byte_size"].value)
    return 8  # a pointer
