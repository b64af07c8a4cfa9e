# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe sysdump``: an archive for a maintainer."""

import time
from pathlib import Path
from typing import Any

import click

from probes.errors import DpvsProbeError
from replicator.console import pid_option, run_dir_option, show, version
from replicator.rundir import RunDir

CONFIG = Path("/etc/dpvs-probe.conf")


class NotDumped(DpvsProbeError):
    """The archive cannot be written."""

    help_text = "Name another file; an existing one is not replaced."


@click.command()
@pid_option
@run_dir_option
@click.option(
    "--config", "configs", multiple=True, type=click.Path(path_type=Path), help="A configuration file to add."
)
@click.option("--log", "logs", multiple=True, type=click.Path(path_type=Path), help="A log to add, its last 2 MiB.")
@click.option("--keys", type=click.Path(path_type=Path), help="Where this node's keys are: /etc/dpvs-probe/keys.")
@click.option("--sessions", is_flag=True, help="Add the sessions, with clients' addresses.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), required=False)
def sysdump(file: Path | None, pid: int | None, run_dir: str | None, keys: Path | None, **more: Any) -> None:
    """Pack what a maintainer needs to know into FILE, a tar.gz: versions, doctor, layouts, maps, counters, logs.

    Private keys, and settings named as passwords, secrets or tokens, are taken out of all of it; look into it before
    you send it on all the same. Without --sessions there is no client's address of a session in it. Changes nothing.
    """
    from replicator.keys import KEYS_DIRECTORY
    from replicator.sysdump import collect, secrets_of, write

    target = file or Path(f"dpvs-probe-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    directory = keys or Path(KEYS_DIRECTORY)
    wanted = (*([CONFIG] if CONFIG.exists() else []), *more["configs"])
    members = collect(
        pid, RunDir(run_dir), version(), configs=wanted, logs=more["logs"], keys=directory, sessions=more["sessions"]
    )
    try:
        count = write(target, members, secrets_of(directory))
    except OSError as error:
        raise NotDumped(f"cannot write {target}: {error.strerror}") from error
    show([f"{target}: {count} files, {target.stat().st_size} bytes"])
