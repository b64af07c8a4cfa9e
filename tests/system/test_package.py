# SPDX-License-Identifier: GPL-2.0-or-later
"""What is built carries all that is needed, and works outside the source tree."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.available import ROOT
from tests.lab.net import inside
from tests.lab.pair import Pair

SOURCES = ("probes", "collector", "replicator", "pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md",
           "CHANGELOG.md")  # fmt: skip
NEEDED = (
    "collector/rows.pxd",
    "probes/agent/agent.so",
    "probes/agent/agent_abi.h",
    "probes/bpf/session.bpf.c",
    "probes/layouts/1.10.2.json",
    "replicator/cli.py",
)
pytestmark = [pytest.mark.slow]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source archive made from a copy of the tree without anything built in it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, tree / name)
    build = "import setuptools.build_meta as b; b.build_sdist('dist')"
    (tree / "dist").mkdir()
    run(sys.executable, "-c", build, cwd=tree)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def wheel(sdist: Path) -> Path:
    """The wheel built from the source archive, as an installer would."""
    folder = sdist.parent / "wheel"
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", folder, sdist,
        cwd=sdist.parent)  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


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
    for module in ("collector/rows", "replicator/packing"):
        assert [name for name in names if name.startswith(f"{module}.{sys.implementation.cache_tag}")], module
    shim = {str(path.relative_to(ROOT)) for path in (ROOT / "probes/bpf").rglob("*.h")}
    assert shim <= names
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]


def test_it_works_outside_the_source_tree(installed: Path) -> None:
    done = installed_command(installed, "--version")
    assert done.returncode == 0, done.stderr
    assert "0.1.0" in done.stdout


@pytest.mark.needs("bpf", "twin", "agent")
def test_doctor_of_an_installed_wheel_finds_everything(installed: Path, pair: Pair) -> None:
    with inside(pair.network.path("a")):
        done = installed_command(installed, "doctor", "--pid", str(pair.a.pid))
    assert done.returncode == 0, done.stdout + done.stderr
