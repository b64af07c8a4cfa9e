# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the layout of a process comes from.

Rules: the first of these that there is: the debug information of its binary, or a debug file of the same build id
beside it; a layout file that was added for exactly this build id; a shipped one of its release. Whatever it is, it is
proven on the process before anything relies on it. A layout that a user names comes before all of them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from probes import dwarf, making
from probes.errors import DpvsProbeError
from probes.layout import BadLayout, Layout, parse_text, release_name
from probes.memory import choose_layout
from probes.target import Target

VARIABLE = "DPVS_PROBE_LAYOUTS"
DIRECTORY = Path("/etc/dpvs-probe/layouts")
DEBUG = "usr/lib/debug/.build-id"
MAX_BYTES = 1 << 20


class NotAdded(DpvsProbeError):
    help_text = f"Layouts are kept in {DIRECTORY}, or where {VARIABLE} says."


def directory() -> Path:
    """Where added layouts are."""
    return Path(os.environ.get(VARIABLE) or DIRECTORY)


def choose(target: Target, named: str | None = None) -> tuple[Layout, str]:
    """The layout to try on a process, and where it comes from. Raises UnknownLayout, BadLayout and the like."""
    if named is not None:
        if "/" in named:
            return from_file(Path(named)), named
        return Layout.load(named), "named"
    for path in debug_files(target):
        if dwarf.has(path):
            return _of_debug(target, path), f"debug information of {path}"
    added = directory() / f"{target.build_id}.json"
    if target.build_id and added.is_file():
        return from_file(added), f"added for build id {target.build_id}"
    layout = choose_layout(target)
    return layout, "shipped"


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
    if len(target.build_id) > 2:
        name = f"{target.build_id[:2]}/{target.build_id[2:]}.debug"
        for root in (Path(f"/proc/{target.pid}/root"), Path("/")):
            path = root / DEBUG / name
            if path.is_file():
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


def _of_debug(target: Target, path: Path) -> Layout:
    """Structs from debug information. What its enumerations do not say is of the shipped layout of its release."""
    version = target.global_u32("g_version")
    release = release_name(version) if version else "unknown"
    content = making.of_debug_build(path, [release])
    made = Layout.parse(f"debug-{target.build_id[:12] or target.pid}", content)
    wanted = Layout.load(making.MODEL)
    missing = set(wanted.sockopt_ids) - set(made.sockopt_ids) | set(wanted.flags) - set(made.flags)
    if missing:
        raise BadLayout(f"the debug information of {path} lacks {', '.join(sorted(missing))}")
    return made
