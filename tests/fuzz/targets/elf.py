# SPDX-License-Identifier: GPL-2.0-or-later
"""probes/target.py, Image: the program file of whatever process a user names. An input is the file."""

import io
import random
import struct
from collections.abc import Iterable

from probes.errors import DpvsProbeError
from probes.sites import NoSite, choose, choose_call
from probes.target import Image, Symbol
from tests.fuzz.judge import SLACK_BYTES, must, only
from tests.fuzz.mutation import resize

MAX_BYTES = 4096
WORDS = (b"\x7fELF\x02\x01\x01", b"GNU\0", b"\x00\x00\x00\x80", b"\xff" * 8, b"\x00\x08", b"\x02\x00\x00\x00")
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_SYM = struct.Struct("<IBBHQQ")
_CODE = bytes.fromhex("5548 89e5 4889fb e800000000 0f1f440000 c3".replace(" ", ""))


def _program(*, compressed: bool = False) -> bytes:
    """A small program: code, a build id, dynamic symbols, section names."""
    base, parts, at = 0x1000, [], {}
    names = b"\0.text\0.note\0.dynsym\0.dynstr\0.shstrtab\0"
    strings = b"\0dp_vs_conn_new\0dp_vs_conn_get\0"
    note = struct.pack("<III4s", 4, 8, 3, b"GNU\0") + bytes(range(8))
    symbols = _SYM.pack(0, 0, 0, 0, 0, 0)
    for number in range(2):
        symbols += _SYM.pack(1 + 15 * number, 0x12, 0, 1, base + 8 * number, 8)
    position = _EHDR.size + 2 * _PHDR.size
    for name, content in (
        ("text", _CODE),
        ("note", note),
        ("dynsym", symbols),
        ("dynstr", strings),
        ("shstrtab", names),
    ):
        at[name] = (position, len(content))
        parts.append(content.ljust(-(-len(content) // 8) * 8, b"\0"))
        position += len(parts[-1])
    phdrs = _PHDR.pack(1, 5, 0, 0, 0, position, position, 0x1000) + _PHDR.pack(
        1, 5, *(at["text"][0], base, base), 20, 20, 8
    )
    sections = bytes(_SHDR.size)
    flags = 0x800 if compressed else 0
    for name, kind, link, size in (
        ("text", 1, 0, 0),
        ("note", 7, 0, 0),
        ("dynsym", 11, 4, 24),
        ("dynstr", 3, 0, 0),
        ("shstrtab", 3, 0, 0),
    ):
        offset, length = at[name]
        sections += _SHDR.pack(names.index(b"." + name.encode()), kind, flags, 0, offset, length, link, 0, 8, size)
    header = _EHDR.pack(b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 3, 62, 1, base, 64, position, 0, 64, 56, 2, 64, 6, 5)
    return header + phdrs + b"".join(parts) + sections


def seeds() -> Iterable[bytes]:
    yield _program()
    yield _program(compressed=True)


def bound(data: bytes) -> int:
    return 16 * SLACK_BYTES + 64 * len(data)  # what the parser of ELF keeps of a file, and nothing that a header names


class _File(Image):
    """An image of bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._parse(io.BytesIO(data), "/proc/1/exe")
        self._path = "/proc/1/exe"


def check(data: bytes) -> None:
    with only(DpvsProbeError):
        image = _File(data)
        must(isinstance(image.build_id, str) and image.build_id.isprintable(), "a build id can be printed")
        must(image.executable(image.entry) in (True, False), "in a part that runs or not")
        for name in ("dp_vs_conn_new", "dp_vs_conn_get"):
            symbol = image.symbol(name)
            must(symbol is None or isinstance(symbol, Symbol), "a symbol, or none")
            if symbol is not None:
                offset = image.file_offset(symbol.value)
                sites(data[offset : offset + min(symbol.size or 512, 512)], symbol.value)


def sites(code: bytes, address: int) -> None:
    """Where the code that the file shows would be probed."""
    with only(NoSite):
        site = choose(code, address, "f")
        must(address <= site.address < address + len(code), "a site lies in its function")
        must(site.pt_regs_field, "a register that the kernel can give")
    with only(NoSite):
        choose_call(code, address, address + 5, "f")


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    """Mostly one field of one header, which says where things are and how many."""
    rng = random.Random(seed)
    if len(data) < _EHDR.size or rng.random() < 0.4:
        return resize(data, longest)
    out = bytearray(data)
    header = list(_EHDR.unpack_from(out))
    at, shape = 0, _EHDR
    what = rng.random()
    if what < 0.7 and header[6] + _SHDR.size <= len(out):
        count = (len(out) - header[6]) // _SHDR.size
        at, shape = header[6] + _SHDR.size * rng.randrange(count), _SHDR
    elif what < 0.8 and _EHDR.size + 2 * _PHDR.size <= len(out):
        at, shape = _EHDR.size + _PHDR.size * rng.randrange(2), _PHDR
    fields = list(shape.unpack_from(out, at))
    which = rng.randrange(shape is _EHDR, len(fields))
    values = (
        0,
        1,
        2,
        7,
        11,
        24,
        64,
        len(data),
        0xFFFF,
        1 << 31,
        (1 << 32) - 1,
        1 << 40,
        (1 << 64) - 1,
        fields[which] + 1,
    )
    fields[which] = rng.choice(values)
    sizes = {"H": 0xFFFF, "I": 0xFFFFFFFF, "Q": (1 << 64) - 1}
    letters = [letter for letter in shape.format.replace("16s", "s") if letter != "<"]
    if letters[which] != "s":
        fields[which] &= sizes[letters[which]]
        shape.pack_into(out, at, *fields)
    return bytes(out[:longest])
