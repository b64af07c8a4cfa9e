# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests.lab.soak takes for flat, and what it does not."""

import itertools
import math

import pytest

from tests.lab.process import LabError
from tests.lab.soak import ALLOWED_KIB, STEADY, Report, Sample, growth

HOUR = range(0, 3600, 15)


def test_warming_up_and_peaks_are_no_growth() -> None:
    samples = [Sample(at, int(50_000 + min(at, 600) * 20 + 3000 * math.sin(at)), 20 + (at % 60 == 0), 4) for at in HOUR]
    found = growth(samples)
    assert abs(found.memory_kib) < 1000
    assert (found.files, found.threads) == (0, 0)
    assert not found.problems(ALLOWED_KIB)
    assert found.last == samples[-1]


@pytest.mark.parametrize(
    ("memory_a_minute", "files_an_hour", "threads_an_hour", "says"),
    [(200, 0, 0, "memory grew"), (0, 12, 0, "descriptors grew"), (0, 0, 4, "threads grew")],
)
def test_what_grows_is_found(memory_a_minute: int, files_an_hour: int, threads_an_hour: int, says: str) -> None:
    def leaking(at: int) -> Sample:
        return Sample(
            at, 50_000 + at * memory_a_minute // 60, 20 + at * files_an_hour // 3600, 4 + at * threads_an_hour // 3600
        )

    found = growth([leaking(at) for at in HOUR])
    assert [problem.rpartition(" by")[0] for problem in found.problems(ALLOWED_KIB)] == [says]
    if memory_a_minute:
        assert found.kib_per_hour == pytest.approx(memory_a_minute * 60, rel=0.05)
    report = Report(3600, alive=STEADY, samples={"dpvs-probe a": [leaking(at) for at in HOUR]})
    assert [problem.startswith(f"dpvs-probe a: {says}") for problem in report.problems()] == [True]
    assert any("dpvs-probe a" in line for line in report.lines())


def test_lost_connections_and_too_little_to_judge() -> None:
    flat = [Sample(at, 1000, 3, 1) for at in HOUR]
    assert Report(3600, alive=STEADY - 1, samples={"x": flat}).problems() == [
        f"only {STEADY - 1} of {STEADY} lasting connections live"
    ]
    with pytest.raises(LabError):
        growth(list(itertools.islice(flat, 6)))
