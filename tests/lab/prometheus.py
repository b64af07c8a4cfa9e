# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's Prometheus, unpacked below build/prometheus and not installed: no daemon of it starts on the machine.

``python -m tests.lab.prometheus`` fetches it through apt, as scripts/setup does; the tests themselves fetch nothing.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "prometheus"
PACKAGE = "prometheus"
SERVER, TOOL = KEPT / "prometheus", KEPT / "promtool"


class NoPrometheus(Exception):
    """It cannot be fetched."""


def is_there() -> bool:
    """Whether both programs are."""
    return os.access(SERVER, os.X_OK) and os.access(TOOL, os.X_OK)


def fetch() -> None:
    """Get both programs; raises NoPrometheus."""
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT.parent) as work:
        _run("apt-get", "-qq", "download", PACKAGE, cwd=work)
        (package,) = Path(work).glob("*.deb")
        _run("dpkg-deb", "--extract", str(package), f"{work}/root", cwd=work)
        KEPT.mkdir(exist_ok=True)
        for program in (SERVER, TOOL):
            (Path(work) / "root/usr/bin" / program.name).rename(program)


def _run(*command: str, cwd: str) -> None:
    try:
        subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise NoPrometheus(f"no {command[0]} here") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or ["no reason given"]
        raise NoPrometheus(f"{' '.join(command[:3])}: {said[-1]}") from error


if __name__ == "__main__":
    if not is_there():
        print(f"prometheus: fetching {PACKAGE}")
        try:
            fetch()
        except (NoPrometheus, OSError) as error:
            sys.exit(f"prometheus: {error}")
