# SPDX-License-Identifier: GPL-2.0-or-later
"""probes/target.py: what the kernel says of a process, some of which the process chose: names of files and threads,
the command line.

An input is a form u8 (0: arguments, 1: a name of a file in a memory map, else a whole memory map) and the bytes.
"""

from collections.abc import Iterable

from probes.errors import DpvsProbeError
from probes.target import Region, ipc_argument, parse_maps
from tests.fuzz.judge import SLACK_BYTES, must, only

MAX_BYTES = 2048
WORDS = (
    b"--ipc-file=",
    b"--ipc",
    b"-x",
    b"--",
    b"\0",
    b"\r",
    b"\x0b",
    b"\xe2\x80\xa8",
    b"\xc2\x85",
    b" (deleted)",
    b"rw-s",
)
ARGUMENTS, NAME = 0, 1
_LINE = b"7f0000000000-7f0000200000 rw-s 00200000 00:2f 4711%s"


def seeds() -> Iterable[bytes]:
    yield bytes([ARGUMENTS]) + b"dpvs\0--conf\0/etc/dpvs.conf\0-x\0/run/dpvs.ipc\0--\0-l\x001-3\0"
    yield bytes([ARGUMENTS]) + b"dpvs\0-x/run/dpvs.ipc\0--ipc-file=/run/b\0"
    yield bytes([NAME]) + b"/mnt/huge/rtemap_0 (deleted)"
    lines = (_LINE % b" /mnt/huge/rtemap_0", _LINE % b"", _LINE % b" [heap]", _LINE % b" /memfd:x (deleted)")
    yield bytes([2]) + b"\n".join(lines) + b"\n"


def bound(data: bytes) -> int:
    return SLACK_BYTES + 64 * len(data)


def check(data: bytes) -> None:
    form, text = (data or b"\0")[0], data[1:]
    if form == ARGUMENTS:
        arguments = [part.decode("utf-8", "surrogateescape") for part in text.split(b"\0")[:-1]]
        found = ipc_argument(arguments)
        must(found is None or any(found in word for word in arguments), "a value that stands there")
        return
    if form == NAME:  # the kernel writes a newline in a name as \012
        name = text.replace(b"\n", b"\\012")
        lines = _LINE % (b"      /" + name) + b"\n" + _LINE % b"" + b"\n"
        regions = parse_maps(lines.decode(errors="replace"))
        must([region.size for region in regions] == [2 << 20] * 2, "a name is part of its line, whatever is in it")
        must(regions[0].path.rstrip() == "/" + name.decode(errors="replace").rstrip(), "and is read whole")
        return
    with only(DpvsProbeError):
        for region in parse_maps(text.decode(errors="replace")):
            must(isinstance(region, Region) and region.start >= 0 and region.inode >= 0, "numbers are numbers")
            must(region.shared in (True, False) and region.start <= region.end, "a range")
