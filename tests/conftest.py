# SPDX-License-Identifier: GPL-2.0-or-later
"""What every test may ask for.

``@pytest.mark.needs("bpf", "twin")`` names the parts of the machine a test cannot do without. What is missing skips the
test with the reason, unless the environment variable ``DPVS_PROBE_REQUIRE`` (words with commas between) names the part:
then the test fails. Tests in tests/system are marked ``system`` and need root and namespaces.

``pair`` is a laboratory of two twins; tests marked ``dpvs`` get one of two real DPVS as well.
``@pytest.mark.pair(workers=2)`` sets fields of tests.lab.node.Settings.
"""

import dataclasses
import os
import signal
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import available

pytest_plugins = ["tests.vm.remote"]

SYSTEM = Path(__file__).parent / "system"
SYSTEM_TIMEOUT_S = 1500
LOG_TAIL = 25
# What is read of a twin's code is kept, but not where an installed dpvs-probe keeps it.
os.environ.setdefault("DPVS_PROBE_CACHE", str(available.ROOT / "build" / "cache"))
# A shell that starts a test run in the background has SIGINT ignored, and programs inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _required() -> set[str]:
    return {word.strip() for word in os.environ.get("DPVS_PROBE_REQUIRE", "").split(",") if word.strip()}


@cache
def _missing(part: str) -> str | None:
    return available.CHECKS[part]()


def demand(part: str) -> None:
    """Skip or fail the running test if ``part`` is missing."""
    reason = _missing(part)
    if reason is None:
        return
    if part in _required():
        pytest.fail(f"{part} is required by DPVS_PROBE_REQUIRE: {reason}", pytrace=False)
    pytest.skip(f"{part}: {reason}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SYSTEM in item.path.parents:
            item.add_marker(pytest.mark.system)
            item.add_marker(pytest.mark.needs("netns"))
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(SYSTEM_TIMEOUT_S))


def pytest_runtest_setup(item: pytest.Item) -> None:
    unknown = _required() - set(available.CHECKS)
    if unknown:
        pytest.exit(f"DPVS_PROBE_REQUIRE names what is no part: {', '.join(sorted(unknown))}", returncode=4)
    for marker in item.iter_markers("needs"):
        for part in marker.args:
            demand(part)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """With a failure come the last lines of every log of its laboratory."""
    report = yield
    pair = getattr(item, "funcargs", {}).get("pair")
    if report.failed and pair is not None:
        directories = [pair.directory, *(node.directory for node in pair.nodes.values())]
        for log in sorted(path for directory in directories for path in directory.glob("*") if path.is_file()):
            if log.suffix in (".log", ".out") and log.stat().st_size:
                lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
                report.sections.append((f"{log.parent.name}/{log.name}", "\n".join(lines)))
    return report


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pair_kind" in metafunc.fixturenames:
        on_real = metafunc.definition.get_closest_marker("dpvs") is not None
        metafunc.parametrize("pair_kind", ["twin", "dpvs"] if on_real else ["twin"], scope="function")


@pytest.fixture(scope="session")
def lab_run() -> Iterator[Any]:
    """What the laboratories of this test run take from the machine, and give back."""
    from tests.lab.run import Run

    with Run() as run:
        yield run


@pytest.fixture(scope="session")
def lab_pages(lab_run: Any) -> Any:
    """Call it with a kind of node: hugepages for a pair of them are there from then on."""
    from tests.lab.pair import hugepages_for

    most = 0

    def grow(kind: str) -> None:
        nonlocal most
        wanted = hugepages_for(kind)
        if wanted > most:
            lab_run.grow(wanted - most)
            most = wanted

    return grow


@pytest.fixture
def pair(request: pytest.FixtureRequest, lab_run: Any, lab_pages: Any, pair_kind: str) -> Iterator[Any]:
    """Two nodes, a client and a real server; node a is active, nothing is attached."""
    from tests.lab.node import Settings
    from tests.lab.pair import Pair, memory_mib

    demand(pair_kind)
    lab_pages(pair_kind)
    settings = Settings(memory_mib=memory_mib(pair_kind))
    for marker in reversed(list(request.node.iter_markers("pair"))):
        settings = dataclasses.replace(settings, **marker.kwargs)
    with Pair(lab_run, kind=pair_kind, settings=settings) as up:
        yield up
