# SPDX-License-Identifier: GPL-2.0-or-later
"""Churn for as long as tests can afford: memory, descriptors and threads are flat. scripts/soak does it for hours.

``DPVS_PROBE_SOAK_S``: longer than 20 s.
"""

import os
from pathlib import Path

import pytest

from tests.lab.pair import Pair
from tests.lab.soak import SETTINGS, Soak

SECONDS = float(os.environ.get("DPVS_PROBE_SOAK_S", "20"))
pytestmark = [pytest.mark.needs("bpf", "twin", "agent"), pytest.mark.timeout(1500 + 2 * SECONDS)]


@pytest.mark.pair(timeouts=SETTINGS.timeouts)
def test_operation_is_flat(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soak = Soak(pair, tmp_path)
    soak.attach()
    report = soak.run(SECONDS, rate=300, standing=100, trouble_s=7)
    with capsys.disabled():
        print("\n" + "\n".join(report.lines()))
    assert not report.problems()
    assert report.cuts >= 1
    assert report.reloads >= 2
    assert report.sessions > 100
