# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian package in a Debian that has nothing but what the package depends on."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.packaging import man
from scripts.packaging.deb import DEPENDS
from tests.available import ROOT
from tests.lab.fresh_root import FreshRoot, base
from tests.lab.net import inside
from tests.lab.pair import Pair

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the base is fetched once

COMPLETE = """
. /usr/share/bash-completion/completions/dpvs-probe
COMP_WORDS=({words}) COMP_CWORD={number}
_dpvs_probe_completion dpvs-probe
echo "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def deb(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("deb")
    command = [sys.executable, "-m", "scripts.packaging.deb", "--wheel", str(wheel), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def root(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> FreshRoot:
    """A root with the package in it."""
    names = sorted({each.partition(" ")[0] for each in DEPENDS})
    fresh = FreshRoot(base(names), tmp_path_factory.mktemp("root"))
    fresh.put(deb, "/root/package.deb")
    done = fresh.run("dpkg", "--install", "/root/package.deb")
    assert done.returncode == 0, done.stdout + done.stderr
    return fresh


def said(root: FreshRoot, *command: str) -> str:
    done = root.run(*command)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_what_it_depends_on_is_all_it_needs(root: FreshRoot) -> None:
    assert "0.1.0" in said(root, "dpvs-probe", "--version")
    for module in (
        "bcc",
        "pyverbs",
        "numpy",
        "replicator.attach",
        "replicator.transport.rdma",
        "replicator.dissect.layer",
    ):
        script = f"import sys; sys.path.insert(0, '/usr/lib/dpvs-probe'); import {module}"
        said(root, "/usr/bin/python3", "-I", "-c", script)
    assert said(root, "dpkg", "--verify", "dpvs-probe") == ""  # every file is there and has the sum it should have


def test_libraries_of_the_package_are_seen_by_nobody_else(root: FreshRoot) -> None:
    assert root.run("/usr/bin/python3", "-c", "import numpy").returncode != 0


def test_manual_and_completions_are_there(root: FreshRoot) -> None:
    files = set(said(root, "dpkg", "--listfiles", "dpvs-probe").split())
    for _, context in man.commands():
        assert f"/usr/share/man/man8/{man.page_name(context)}.8.gz" in files
    assert "/usr/share/zsh/vendor-completions/_dpvs-probe" in files
    assert "/usr/share/fish/vendor_completions.d/dpvs-probe.fish" in files
    assert said(root, "bash", "-c", COMPLETE.format(words="dpvs-probe att", number=1)).split() == ["attach"]
    words = said(root, "bash", "-c", COMPLETE.format(words="dpvs-probe attach --pe", number=2)).split()
    assert "--peer" in words


@pytest.mark.needs("bpf", "twin", "agent")
def test_doctor_finds_everything(root: FreshRoot, pair: Pair) -> None:
    with inside(pair.network.path("a")):
        done = root.run("dpvs-probe", "doctor", "--pid", str(pair.a.pid))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attach would work" in done.stdout


def test_unit_and_configuration_are_there(root: FreshRoot) -> None:
    said(root, "test", "-f", "/usr/lib/systemd/system/dpvs-probe.service")
    assert "/etc/dpvs-probe.conf" in said(root, "dpkg-query", "--show", "-f", "${Conffiles}", "dpvs-probe")
    said(root, "dpvs-probe", "config", "check")


def test_keys_made_elsewhere_find_their_place(root: FreshRoot) -> None:
    """As the words say that ``keys issue`` prints; here is no scp, and cp takes the same paths."""
    said(root, "dpvs-probe", "keys", "init", "--dir", "/root/authority", "--name", "east")
    lines = said(root, "dpvs-probe", "keys", "issue", "lb1", "--dir", "/root/authority").splitlines()
    words = lines[-1].replace("ssh root@lb1 ", "").replace("scp", "cp").replace("root@lb1:", "").partition(": ")[2]
    said(root, "sh", "-ec", words)
    assert "fit together" in said(root, "dpvs-probe", "keys", "show")
    said(root, "rm", "-r", "/etc/dpvs-probe/keys", "/root/authority")


def test_purge_leaves_nothing(root: FreshRoot) -> None:
    said(root, "dpkg", "--purge", "dpvs-probe")
    assert said(root, "find", "/", "-xdev", "-name", "*dpvs*probe*") == ""
