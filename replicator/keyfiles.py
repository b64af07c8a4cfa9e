# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that hold keys and certificates: how they are written, and what they must be to be believed.

Rules: a file appears whole or not at all, for its owner only, and none is replaced unless that is asked for. A key
that others could have read is refused, and so is trust that others could have written. Nothing is read beyond
``MAX_FILE_BYTES``.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

from probes.errors import DpvsProbeError

from .transport.address import reason

MAX_FILE_BYTES = 64 << 10


class KeysError(DpvsProbeError):
    """Keys or certificates that cannot be used, or not be made."""

    help_text = "Look at them with `dpvs-probe keys show`; make new ones with `dpvs-probe keys issue`."


class KeysMissing(KeysError):
    """A file is not there."""

    help_text = (
        "Make an authority once with `dpvs-probe keys init`, a node's keys with `dpvs-probe keys issue NODE`, and copy"
        " the directory that it names to that node."
    )


class KeysExist(KeysError):
    """A file is there already."""

    help_text = "Give --force to replace it: what was made with the old one may be refused from then on."


class KeyExposed(KeysError):
    """Others may read a key, or write what we trust."""


class BadKeys(KeysError):
    """A file that holds something else than it should."""


def write_files(directory: Path, files: dict[str, bytes], *, force: bool) -> None:
    """All of ``files``, or, without ``force`` and with one of them there, none. The order given is kept."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else reason(error)
        raise KeysError(f"cannot make directory {directory}: {why}", help_text="Name another directory.") from error
    try:
        found = directory.stat()
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
            raise KeyExposed(
                f"directory {directory} belongs to uid {found.st_uid}, or others may write to it",
                help_text="Name a directory that only you can write to.",
            )
        there = [name for name in files if os.path.lexists(directory / name)]
        if there and not force:
            raise KeysExist(f"{directory / there[0]} is there already")
        for name, data in files.items():
            _write(directory / name, data, force=force)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except FileExistsError as error:
        raise KeysExist(f"{error.filename2 or error.filename} is there already") from error
    except OSError as error:
        raise KeysError(
            f"cannot write {error.filename or directory}: {reason(error)}", help_text="Name another directory."
        ) from error


def _write(path: Path, data: bytes, *, force: bool) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if force:
            os.replace(draft, path)
        else:
            os.link(draft, path)  # unlike a rename, never over what is there
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()


def read_file(path: Path, *, secret: bool = False, trusted: bool = True) -> bytes:
    """A whole file, once it is sure who may read it (``secret``) and who may write it (``trusted``)."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise BadKeys(f"{path} is not a file")
            if trusted or secret:
                _must_be_ours(path, found, secret=secret)
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise KeysMissing(f"there is no {path}") from error
    except OSError as error:
        raise KeysError(f"cannot read {path}: {reason(error)}", help_text="Run it as the owner, or as root.") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadKeys(f"{path} is too long for what it should hold")
    return data


def _must_be_ours(path: Path, found: os.stat_result, *, secret: bool) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid not in (0, os.geteuid()):
        raise KeyExposed(f"{path} belongs to uid {found.st_uid}", help_text=f"chown {os.geteuid()} {path}")
    if secret and mode & 0o077:
        raise KeyExposed(
            f"others may read the key {path} (mode {mode:04o})",
            help_text=f"If nobody did: chmod 600 {path}. Else issue a new one and replace the authority.",
        )
    if mode & 0o022:
        raise KeyExposed(f"others may write {path} (mode {mode:04o})", help_text=f"chmod 600 {path}")
