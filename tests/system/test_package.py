# SPDX-License-Identifier: GPL-2.0-or-later
"""What is built carries all that is needed, and works outside the source tree."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.available import ROOT
from tests.lab.net import inside
from tests.lab.pair import Pair
from tests.system.conftest import run

PACKAGES = ("collector", "probes", "replicator")
NEEDED = (
    *(str(path.relative_to(ROOT)) for name in PACKAGES for path in ROOT.glob(f"{name}/*.pxd")),
    "probes/agent/agent.so",
    "probes/agent/agent_abi.h",
    "probes/bpf/session.bpf.c",
    "probes/layouts/1.10.2.json",
    "replicator/cli.py",
)
pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked by pip into a folder of its own, far from the source tree."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", folder, wheel, cwd=folder)
    return folder


def installed_command(installed: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    program = (
        "import probes, sys; assert probes.__file__.startswith(sys.argv.pop(1)), probes.__file__;"
        "from replicator.cli import main; main(sys.argv[1:])"
    )
    return subprocess.run(
        [sys.executable, "-P", "-c", program, str(installed), *arguments],
        capture_output=True, text=True, check=False, timeout=60, cwd="/",
        env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip


def test_the_source_archive_holds_sources_only(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in NEEDED if not name.endswith(".so")} <= names
    assert "LICENSE" in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_wheel_holds_bpf_sources_layouts_and_agent(wheel: Path) -> None:
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.endswith(f"-{version}-{version}-linux_x86_64.whl")  # there are loops in it, compiled for it
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert set(NEEDED) <= names
    for module in ("collector/rows", "probes/gathering", "replicator/packing"):
        assert [name for name in names if name.startswith(f"{module}.{sys.implementation.cache_tag}")], module
    shim = {str(path.relative_to(ROOT)) for path in (ROOT / "probes/bpf").rglob("*.h")}
    assert shim <= names
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]


def test_loops_are_compiled_with_their_types(installed: Path) -> None:
    """Without the .pxd beside it a loop compiles as well, is slow, and answers in numbers that JSON does not know."""
    script = (
        "import numpy as np; from replicator.packing import tally; from collector.rows import __file__ as rows;"
        "print(type(tally(np.ones(1, np.int64), 9, np.zeros(8, np.int64))).__name__, rows)"
    )
    done = run(
        sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(installed)!r}); {script}", cwd=installed
    )
    assert done.startswith(f"int {installed}"), done


def test_it_works_outside_the_source_tree(installed: Path) -> None:
    done = installed_command(installed, "--version")
    assert done.returncode == 0, done.stderr
    assert "0.1.0" in done.stdout


@pytest.mark.needs("bpf", "twin", "agent")
def test_doctor_of_an_installed_wheel_finds_everything(installed: Path, pair: Pair) -> None:
    with inside(pair.network.path("a")):
        done = installed_command(installed, "doctor", "--pid", str(pair.a.pid))
    assert done.returncode == 0, done.stdout + done.stderr
