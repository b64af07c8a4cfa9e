# SPDX-License-Identifier: GPL-2.0-or-later
"""Layouts are made, kept and chosen; processes to attach to are found."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from probes import candidates, choosing, dwarf, making
from probes.layout import BadLayout, Layout, UnknownLayout

SOURCE = """\
struct inner { short one; char two[3]; };
struct outer {
    unsigned char first;
    unsigned bits : 3;
    union { unsigned word; unsigned char bytes[4]; };
    struct { long deep; } ;
    struct inner nested[2];
    volatile struct inner *pointer;
} __attribute__((aligned(64)));
enum numbers { MINUS = -3, SEVEN = 7 };
struct outer *keep_outer; struct inner *keep_inner; enum numbers keep_numbers;
"""
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(choosing.VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A layout file of a user's: the shipped one, written anew."""
    text = Path(choosing.__file__).with_name("layouts").joinpath("1.10.2.json").read_text()
    making.write(json.loads(text), tmp_path / "mine.json")
    return tmp_path / "mine.json"


@needs_cc
@pytest.mark.parametrize("version", ["-gdwarf-4", "-gdwarf-5"])
def test_structs_of_debug_information(tmp_path: Path, version: str) -> None:
    built = tmp_path / "a.o"
    subprocess.run(["cc", "-xc", version, "-c", "-o", built, "-"], input=SOURCE, text=True, check=True)
    found = dwarf.read(built, ["outer", "inner", "absent"], ["MINUS", "SEVEN"])
    assert found.values == {"MINUS": -3, "SEVEN": 7}
    assert found.structs["inner"].fields == {"one": (0, 2), "two": (2, 3)}
    assert found.structs["outer"].size == 64
    assert found.structs["outer"].fields == {
        "first": (0, 1), "word": (4, 4), "bytes": (4, 4), "deep": (8, 8), "nested": (16, 12), "pointer": (32, 8),
    }  # fmt: skip


@needs_cc
def test_no_debug_information(tmp_path: Path) -> None:
    built = tmp_path / "a.o"
    subprocess.run(["cc", "-xc", "-c", "-o", built, "-"], input=SOURCE, text=True, check=True)
    assert not dwarf.has(built)
    for path in (built, tmp_path / "absent", Path(__file__)):
        with pytest.raises(dwarf.NoDebugInformation):
            dwarf.read(path, ["outer"])


def test_what_is_written_is_read_again(file: Path) -> None:
    made, shipped = choosing.from_file(file), Layout.load("1.10.2")
    assert (made.structs, made.flags, made.sockopt_ids) == (shipped.structs, shipped.flags, shipped.sockopt_ids)


def test_a_tree_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(making.CannotMake, match="no include"):
        making.of_tree(tmp_path, [], [], ["1.0"])


def test_kept_for_a_build(kept: Path, file: Path) -> None:
    assert choosing.add(file, "0123abcd") == kept / "0123abcd.json"
    assert choosing.added() == [kept / "0123abcd.json"]
    for build_id in ("", "../../x", "xyz"):
        with pytest.raises(choosing.NotAdded):
            choosing.add(file, build_id)
    file.write_text("{}")
    with pytest.raises(BadLayout):
        choosing.add(file, "0123abce")
    assert len(choosing.added()) == 1


def test_by_name(file: Path) -> None:
    assert choosing.by_name("1.9.4") is Layout.load("1.9.4")
    assert choosing.by_name(str(file)).name == "mine"
    with pytest.raises(UnknownLayout):
        choosing.by_name("1.2.3")
    with pytest.raises(BadLayout, match="cannot read"):
        choosing.by_name("./not-there")


@needs_cc
def test_of_a_program_that_does_not_run(kept: Path, file: Path, tmp_path: Path) -> None:
    program = tmp_path / "dpvs"
    build = ["cc", "-xc", "-Wl,--build-id=0xabcdef12", "-o", program, "-"]
    subprocess.run(build, input="int main(void) { return 0; }", text=True, check=True)
    with pytest.raises(choosing.NoLayout, match="abcdef12") as refused:
        choosing.of_program(program)
    assert "1.9.4 is for DPVS 1.9.2, 1.9.4" in refused.value.help_text
    choosing.add(file, "abcdef12")
    assert choosing.of_program(program).name == "abcdef12"
    with pytest.raises(choosing.NoLayout, match="no program"):
        choosing.of_program(tmp_path / "absent")


class TestCandidates:
    @staticmethod
    def _process(proc: Path, pid: int, program: Path, *words: str, space: str = "1") -> None:
        entry = proc / str(pid)
        (entry / "ns").mkdir(parents=True)
        (entry / "exe").symlink_to(program)
        (entry / "cmdline").write_bytes(b"\0".join(w.encode() for w in words) + b"\0")
        for kind in ("pid", "mnt"):
            (entry / "ns" / kind).symlink_to(f"{kind}:[{space}]")

    def test_every_dpvs_and_nothing_else(self, tmp_path: Path) -> None:
        proc, program, other = tmp_path / "proc", tmp_path / "renamed", tmp_path / "dpvs"
        program.write_bytes(b"\x7fELF" + bytes(100) + candidates.MARK + b"rest")
        other.write_bytes(b"\x7fELF, but only dp_vs_redirect_init_not")
        self._process(proc, 7, program, "renamed", "-x", "a\nb")
        self._process(proc, 30, program, "dpvs", "x" * 200, space="2")
        self._process(proc, 9, other, "dpvs")
        self._process(proc, 10, tmp_path / "gone", "dpvs")
        (proc / "self").symlink_to("7")
        (proc / "meminfo").write_text("")
        found = candidates.running(proc)
        assert [one.pid for one in found] == [7, 30]
        assert str(found[0]) == "7 renamed -x a?b"
        assert str(found[1]).endswith("... (in a container)")
        assert len(found[1].command) == candidates.MAX_COMMAND

    def test_advice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one = candidates.Candidate(5, "/usr/bin/dpvs", "", contained=False)
        monkeypatch.setattr(candidates, "running", lambda: [one])
        assert "5 /usr/bin/dpvs" in candidates.advice()
        monkeypatch.setattr(candidates, "running", list)
        assert "No DPVS runs" in candidates.advice()

    def test_on_this_host(self) -> None:
        assert os.getpid() not in [one.pid for one in candidates.running()]


def test_the_shipped_ones_do_not_claim_a_release_twice() -> None:
    releases: list[Any] = [release for name in Layout.shipped() for release in Layout.load(name).releases]
    assert len(set(releases)) == len(releases)
    assert not {"1.8.2", "1.8.4", "1.8.8"} & set(releases)  # these use the flag that marks copies
