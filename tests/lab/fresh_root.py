# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian 12 with nothing in it but a package's dependencies, to install the package into.

Rules: the base is made by apt from the places where this machine has its packages, and is kept below build/root under
a name that follows from what is in it. Nothing is ever changed there: a run writes into an overlay of its own. Every
command runs in a mount namespace of its own, so nothing stays mounted, however it ends. Processes and network are those
of whoever calls.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.lab.process import LabError

CACHE = Path(__file__).resolve().parents[2] / "build" / "root"
SUITE = "bookworm"
MAKE_S = 600


def places() -> list[str]:
    """Lines of sources.list: where apt of this machine has the packages of Debian itself from."""
    form = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    command = ["apt-get", "indextargets", "--format", form, "Created-By: Packages"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [line.split("|") for line in said.splitlines()]
    return sorted({f"deb {uri} {suite} {part}" for origin, uri, suite, part in found
                   if origin == "Debian" and suite.startswith(SUITE)})  # fmt: skip


def base(packages: Sequence[str], cache: Path = CACHE) -> Path:
    """The root directory of a minimal system with ``packages``; made at the first call. Raises LabError."""
    wanted = ",".join(sorted(packages))
    kept = cache / hashlib.blake2b(f"{SUITE} {wanted}".encode(), digest_size=6).hexdigest()
    if kept.exists():
        return kept
    lines = places()
    if not lines:
        raise LabError(f"apt has no package lists of Debian {SUITE}: run apt-get update")
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.iterdir():
        shutil.rmtree(old)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        fresh = Path(work) / "root"
        command = [
            "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={wanted}",
            "--dpkgopt=force-unsafe-io", "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-include=/usr/share/doc/dpvs-probe/*", "--aptopt=Acquire::Languages \"none\"",
            SUITE, str(fresh), "-",
        ]  # fmt: skip
        try:
            subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=True,
                           timeout=MAKE_S, env={**os.environ, "TMPDIR": work})  # fmt: skip
        except FileNotFoundError:
            raise LabError("mmdebstrap is not installed: ./scripts/setup") from None
        except subprocess.CalledProcessError as error:
            raise LabError(f"no root could be made: {error.stderr[-2000:]}") from error
        fresh.rename(kept)
    return kept


class FreshRoot:
    """One overlay on a base: what is written goes to ``work``, which belongs to the caller."""

    _MOUNTS = """
        mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
        for each in proc sys dev run; do mount --rbind "/$each" "$2/root/$each"; done
        root=$2; shift 2
        exec chroot "$root/root" "$@"
    """

    def __init__(self, lower: Path, work: Path) -> None:
        self._lower, self.work = lower, work
        for name in ("upper", "work", "root"):
            (work / name).mkdir()

    def put(self, source: Path, place: str) -> None:
        """A file into the root."""
        target = self.work / "upper" / place.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    def run(self, *command: str, timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
        """A command in the root, ended or not well; the caller looks at its status."""
        inner = ["sh", "-ec", self._MOUNTS, "sh", str(self._lower), str(self.work), *command]
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", *inner],
            capture_output=True, text=True, check=False, timeout=timeout_s,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
