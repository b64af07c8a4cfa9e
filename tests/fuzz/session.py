# SPDX-License-Identifier: GPL-2.0-or-later
"""Fuzzing a target in a process of its own, and what came of it."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TARGETS = Path(__file__).with_name("targets")
PLANTED = "planted"  # targets with a fault, to see that faults are found
SEED = 20100  # of the mutations: the same ones each time, as far as time allows
GRACE_S = 120  # to start and to end, on a machine that has other things to do
LINES, LINE = 40, 300  # of the child's output are shown at most


class Outcome(NamedTuple):
    """Of one target. ``finding``: the input that broke a rule."""

    target: str
    runs: int
    edges: int
    features: int
    finding: bytes | None
    output: str
    failed: bool

    def line(self) -> str:
        """For a person."""
        what = f"{self.target:<14} {self.runs:>9} inputs {self.edges:>6} edges {self.features:>6} features"
        return f"{what}  FOUND" if self.failed else what

    def report(self) -> str:
        """What went wrong, and how to see it again."""
        lines = [self.output]
        if self.finding is not None:
            lines += [f"target {self.target}, input of {len(self.finding)} bytes:", self.finding.hex()]
            lines += ["to repeat:", f"./scripts/fuzz --repeat {self.target} {self.finding.hex()}"]
        return "\n".join(lines)


def names() -> list[str]:
    """All targets but the planted ones."""
    found = sorted(path.stem for path in TARGETS.glob("*.py") if path.stem != "__init__")
    return [name for name in found if not name.startswith(PLANTED)]


def fuzz(target: str, seconds: int, *, seed: int = SEED, options: tuple[str, ...] = ()) -> Outcome:
    """Look for findings for that long."""
    with tempfile.TemporaryDirectory(prefix="dpvs-probe-fuzz-") as directory:
        command = [sys.executable, "-m", "tests.fuzz.child", target, f"-max_total_time={seconds}", f"-seed={seed}"]
        path = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"}
        try:
            done = subprocess.run(
                [*command, *options], cwd=directory, env=path, capture_output=True, text=True, errors="replace",
                timeout=seconds + GRACE_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            return Outcome(target, 0, 0, 0, None, str(error), failed=True)
        findings = sorted(Path(directory).glob("finding-*"))
        finding = findings[0].read_bytes() if findings else None
    text = done.stdout + done.stderr
    ends = re.findall(r"^#\d+\s+\w+\s+cov: (\d+) ft: (\d+)", text, re.MULTILINE)
    edges, features = map(int, ends[-1]) if ends else (0, 0)
    runs = re.search(r"stat::number_of_executed_units:\s+(\d+)", text)
    said = [line for line in text.splitlines() if not re.match(r"#\d|INFO:|WARNING:|stat::|\s*$", line)]
    output = "\n".join(line[:LINE] for line in said[-LINES:])
    failed = done.returncode != 0 or finding is not None
    return Outcome(target, int(runs[1]) if runs else 0, edges, features, finding, output, failed)
