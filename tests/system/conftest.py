# SPDX-License-Identifier: GPL-2.0-or-later
"""What is built once for all tests of packages."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.available import ROOT

SOURCES = ("probes", "collector", "replicator", "pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md",
           "CHANGELOG.md")  # fmt: skip


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
