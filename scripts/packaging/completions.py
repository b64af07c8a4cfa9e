# SPDX-License-Identifier: GPL-2.0-or-later
"""Completions for bash, zsh and fish: click's own, at the places where Debian's shells look.

python -m scripts.packaging.completions ROOT
"""

import sys
from pathlib import Path

from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from replicator.cli import cli

PROGRAM = "dpvs-probe"
VARIABLE = "_DPVS_PROBE_COMPLETE"
PLACES: tuple[tuple[type[ShellComplete], str], ...] = (
    (BashComplete, f"usr/share/bash-completion/completions/{PROGRAM}"),
    (ZshComplete, f"usr/share/zsh/vendor-completions/_{PROGRAM}"),
    (FishComplete, f"usr/share/fish/vendor_completions.d/{PROGRAM}.fish"),
)


def write(root: Path) -> list[Path]:
    """All three below ``root``; the files."""
    written = []
    for shell, place in PLACES:
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            ShellComplete.source(shell(cli, {}, PROGRAM, VARIABLE))
        )  # bash need not be here to write for it
        written.append(path)
    return written


if __name__ == "__main__":
    for path in write(Path(sys.argv[1])):
        print(path)
