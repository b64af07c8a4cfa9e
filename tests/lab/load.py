# SPDX-License-Identifier: GPL-2.0-or-later
"""How long this machine kept its processes waiting for a CPU: what a bound in seconds of wall clock has to leave out.

before = held_up_s()
...
assert elapsed - (held_up_s() - before) < bound
"""

import os
from pathlib import Path

STAT = Path("/proc/stat")
PRESSURE = Path("/proc/pressure/cpu")
STEAL = 8  # field of the line "cpu" in proc(5), its name counted


def _steal_s() -> float:
    """What the host took from this guest, as a mean over the CPUs."""
    try:
        lines = STAT.read_text().splitlines()
    except OSError:
        return 0.0
    cpus = sum(line.startswith("cpu") for line in lines) - 1  # the first is the sum of all
    fields = lines[0].split() if lines else []
    if cpus < 1 or len(fields) <= STEAL:
        return 0.0
    return int(fields[STEAL]) / os.sysconf("SC_CLK_TCK") / cpus


def _pressure_s() -> float:
    """Time in which some process was ready and had no CPU. A kernel without PSI, or with psi=0, shows nothing."""
    try:
        text = PRESSURE.read_text()
    except OSError:
        return 0.0
    for line in text.splitlines():
        if line.startswith("some "):
            return int(line.rpartition("total=")[2]) / 1e6
    return 0.0


def held_up_s() -> float:
    """Seconds since boot in which the machine kept its processes waiting: two calls and their difference."""
    return _steal_s() + _pressure_s()
