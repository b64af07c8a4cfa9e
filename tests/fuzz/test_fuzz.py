# SPDX-License-Identifier: GPL-2.0-or-later
"""Every decoder of bytes from outside, fuzzed for some seconds; and that faults would be found.

``DPVS_PROBE_FUZZ_SECONDS`` says how long each target gets. For more: ``./scripts/fuzz``.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeGuard

import pytest

from tests.fuzz import session
from tests.fuzz.judge import judge, load

SECONDS = int(os.environ.get("DPVS_PROBE_FUZZ_SECONDS", "4"))
FIND_S = 300  # for a planted fault: the search ends with it
REPEAT_S = 60

pytestmark = [pytest.mark.fuzz, pytest.mark.needs("fuzz"), pytest.mark.timeout(SECONDS + session.GRACE_S + 10)]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[session.Outcome]]]:
    """Of all targets that this test run has; one for each processor at a time."""
    wanted = [str(item.callspec.params["name"]) for item in request.session.items if _fuzzes(item)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(session.fuzz, name, SECONDS) for name in wanted}
        pool.shutdown(cancel_futures=True)


def _fuzzes(item: pytest.Item) -> TypeGuard[pytest.Function]:
    return isinstance(item, pytest.Function) and item.originalname == "test_target" and item.path == Path(__file__)


@pytest.mark.parametrize("name", session.names())
def test_target(name: str, outcomes: dict[str, Future[session.Outcome]]) -> None:
    outcome = outcomes[name].result()
    print(outcome.line())
    if outcome.failed:
        pytest.fail(outcome.report(), pytrace=False)
    assert outcome.runs > 20
    assert outcome.edges > 10


@pytest.mark.parametrize("name", session.names())
def test_seeds_are_the_same_each_time(name: str) -> None:
    target = load(name)
    seeds = list(target.seeds())
    assert seeds
    if name != "certificates":  # signatures never are
        assert list(load(name).seeds()) == seeds
    for seed in seeds:
        target.check(seed)
    for seed in seeds:
        judge(target, seed)


@pytest.mark.timeout(FIND_S + REPEAT_S + session.GRACE_S + 10)
@pytest.mark.parametrize(("name", "what"), [("planted", "IndexError"), ("planted_memory", "were allocated")])
def test_a_planted_fault_is_found(name: str, what: str) -> None:
    outcome = session.fuzz(name, FIND_S)
    assert outcome.failed
    assert what in outcome.output
    assert outcome.finding is not None
    assert outcome.finding.hex() in outcome.report()
    again = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--repeat", name, outcome.finding.hex()],
        cwd=session.ROOT, capture_output=True, text=True, timeout=REPEAT_S, check=False,
    )  # fmt: skip
    assert again.returncode == 1
    assert what in again.stderr
