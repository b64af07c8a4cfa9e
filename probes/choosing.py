# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the layout of a process comes from.

Rules: the first of these that there is: the debug information of its binary, or a debug file of the same build id
beside it; a layout file that was added for exactly this build id; a shipped one of its release. Whatever it is, it is
proven on the process before anything relies on it. A layout that a user names comes before all of them.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from probes import dwarf, making
from probes.errors import DpvsProbeError
from probes.layout import BadLayout, Layout, parse_text, release_name
from probes.memory import choose_layout
from probes.target import Image, Target

VARIABLE = "DPVS_PROBE_LAYOUTS"
DIRECTORY = Path("/etc/dpvs-probe/layouts")
DEBUG = "usr/lib/debug/.build-id"
MAX_BYTES = 1 << 20


class NoLayout(DpvsProbeError):
    pass


class NotAdded(DpvsProbeError):
    help_text = f"Layouts are kept in {DIRECTORY}, or where {VARIABLE} says."


def directory() -> Path:
    """Where added layouts are."""
    return Path(os.environ.get(VARIABLE) or DIRECTORY)


def choose(target: Target, named: str | None = None) -> tuple[Layout, str]:
    """The layout to try on a process, and where it comes from. Raises UnknownLayout, BadLayout and the like."""
    if named is not None:
        return by_name(named), "named"
    for path in debug_files(target):
        if dwarf.has(path):
            version = target.global_u32("g_version")
            release = release_name(version) if version else "unknown"
            return _of_debug(path, target.build_id or str(target.pid), release), f"debug information of {path}"
    if (mine := _added_for(target.build_id)) is not None:
        return mine, f"added for build id {target.build_id}"
    return choose_layout(target), "shipped"


def of_program(program: Path) -> Layout:
    """The layout of a DPVS that does not run: of its own debug information, or added for its build id. Which release a
    program is, it says only when it runs. Raises NoLayout."""
    if not program.is_file():
        raise NoLayout(f"there is no program {program}")
    build_id = Image(str(program)).build_id
    for path in (program, *_debug_files(build_id, [Path("/")])):
        if dwarf.has(path):
            return _of_debug(path, build_id or program.name, "unknown")
    if (mine := _added_for(build_id)) is not None:
        return mine
    raise NoLayout(
        f"{program} has no debug information, and no layout was added for its build id {build_id or '(none)'}",
        help_text=f"Give --layout. {releases()}",
    )


def releases() -> str:
    """The shipped layouts, and what they are for."""
    shipped = (f"{name} is for DPVS {', '.join(Layout.load(name).releases)}" for name in Layout.shipped())
    return f"{'; '.join(shipped)}; or ./FILE."


def _added_for(build_id: str) -> Layout | None:
    path = directory() / f"{build_id}.json"
    return from_file(path) if build_id and os.path.isfile(path) else None


def by_name(name: str) -> Layout:
    """A shipped layout by its name, or a user's by its path, which has a slash. Raises UnknownLayout, BadLayout."""
    return from_file(Path(name)) if "/" in name else Layout.load(name)


def from_file(path: Path) -> Layout:
    """A layout file of a user's. Raises BadLayout."""
    try:
        with path.open("rb") as file:
            return parse_text(path.stem, file.read(MAX_BYTES))
    except OSError as error:
        raise BadLayout(
            f"cannot read {path}: {error.strerror}", help_text="Name a file, or a shipped layout."
        ) from None


def debug_files(target: Target) -> Iterator[Path]:
    """The binary itself, and the debug files of its build id, as DPVS sees the disk and as we do."""
    yield Path(target.exe_path)
    yield from _debug_files(target.build_id, [Path(f"/proc/{target.pid}/root"), Path("/")])


def _debug_files(build_id: str, roots: Iterable[Path]) -> Iterator[Path]:
    if len(build_id) > 2:
        for root in roots:
            path = root / DEBUG / build_id[:2] / f"{build_id[2:]}.debug"
            if os.path.isfile(path):
                yield path


def add(path: Path, build_id: str) -> Path:
    """Keep a layout file for a build; where it is kept. Raises BadLayout or NotAdded."""
    from_file(path)
    if not build_id or not all(c in "0123456789abcdef" for c in build_id):
        raise NotAdded(f"'{build_id[:80]}' is not a build id", help_text="It is in hexadecimal, as `file` says it.")
    kept = directory() / f"{build_id}.json"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(".new")
        fresh.write_bytes(path.read_bytes())
        fresh.replace(kept)
    except OSError as error:
        raise NotAdded(f"cannot write {kept}: {error.strerror}") from None
    return kept


def added() -> list[Path]:
    """The layout files that were added."""
    return sorted(directory().glob("*.json"))


def _of_debug(path: Path, name: str, release: str) -> Layout:
    """Structs from debug information. What its enumerations do not say is of the shipped layout of its release."""
    content = making.of_debug_build(path, [release])
    made = Layout.parse(f"debug-{name[:12]}", content)
    wanted = Layout.load(making.MODEL)
    missing = set(wanted.sockopt_ids) - set(made.sockopt_ids) | set(wanted.flags) - set(made.flags)
    if missing:
        raise BadLayout(f"the debug information of {path} lacks {', '.join(sorted(missing))}")
    return made
