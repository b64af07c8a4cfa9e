# SPDX-License-Identifier: GPL-2.0-or-later
"""Time that the machine kept its processes waiting."""

import os
from pathlib import Path

import pytest

from tests.lab import load


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    stat, pressure = tmp_path / "stat", tmp_path / "cpu"
    monkeypatch.setattr(load, "STAT", stat)
    monkeypatch.setattr(load, "PRESSURE", pressure)
    return stat, pressure


def test_steal_is_a_mean_and_pressure_is_added(files: tuple[Path, Path]) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    files[0].write_text(
        f"cpu  1 2 3 4 5 6 7 {6 * ticks} 0 0\ncpu0 1 2 3 4 5 6 7 {2 * ticks} 0 0\n"
        f"cpu1 1 2 3 4 5 6 7 {4 * ticks} 0 0\nintr 9\n"
    )
    files[1].write_text("some avg10=0.24 avg60=0.39 avg300=4.99 total=1500000\nfull avg10=0.00 total=7\n")
    assert load.held_up_s() == 3 + 1.5


def test_what_the_kernel_does_not_show_is_zero(files: tuple[Path, Path]) -> None:
    assert load.held_up_s() == 0
    for path in files:
        path.write_text("")
    assert load.held_up_s() == 0
    files[0].write_text("cpu  1 2 3 4\ncpu0 1 2 3 4\n")
    assert load.held_up_s() == 0


def test_it_only_grows() -> None:
    before = load.held_up_s()
    assert 0 <= before <= load.held_up_s()
