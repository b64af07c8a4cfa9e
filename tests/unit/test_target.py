# SPDX-License-Identifier: GPL-2.0-or-later
"""probes/target.py on small programs compiled here: symbols, code, memory, threads, and every refusal."""

import os
import shutil
import struct
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from probes.errors import DpvsProbeError, NeedRoot
from probes.target import (
    REQUIRED,
    Image,
    NoSuchProcess,
    NotDpvs,
    ProcessGone,
    ReadFailed,
    SymbolMissing,
    Target,
    UnsupportedBinary,
    _content,
    ipc_argument,
    parse_maps,
)

SOURCE = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>
%(functions)s
static int hidden(int x) { return x * 3; }
int (*keep)(int) = hidden;
unsigned int g_version = 0x00010a02;
char *dpvs_ipc_file;
static __thread int per_thread;
static unsigned int named;
static void *worker(void *name)
{
	prctl(PR_SET_NAME, name);
	per_thread = 1;
	__atomic_add_fetch(&named, 1, __ATOMIC_SEQ_CST);
	for (;;) pause();
}
int main(int argc, char **argv)
{
	static char *names[] = {"dpdk-worker1", "lcore-slave-12", "lcore-worker-3", "dpdk-intr", "other"};
	pthread_t thread;
	setvbuf(stdout, NULL, _IONBF, 0);
	if (argc > 1) dpvs_ipc_file = argv[argc - 1];
	for (unsigned i = 0; i < 5; i++) pthread_create(&thread, NULL, worker, names[i]);
	while (__atomic_load_n(&named, __ATOMIC_SEQ_CST) < 5) usleep(1000);
	puts("ready");
	getchar();
	return 0;
}
"""
FUNCTIONS = "\n".join(f"void {name}(void *x) {{ *(volatile int *)x = {i}; }}" for i, name in enumerate(REQUIRED))
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compile a stand-in for dpvs once per set of options."""
    directory = tmp_path_factory.mktemp("programs")

    def build(*options: str, functions: str = FUNCTIONS, strip: bool = False) -> Path:
        path = directory / f"p{abs(hash((options, functions, strip)))}"
        if not path.exists():
            source = path.with_suffix(".c")
            source.write_text(SOURCE % {"functions": functions})
            command = ["cc", "-O2", "-w", "-pthread", "-rdynamic", *options, "-o", str(path), str(source)]
            subprocess.run(command, check=True, capture_output=True)
            if strip:
                subprocess.run(["strip", str(path)], check=True)
        return path

    return build


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def run(path: Path, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(path), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=cwd
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in running:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


@pytest.mark.parametrize("options", [("-pie", "-fPIE"), ("-no-pie", "-fno-pie")])
@pytest.mark.parametrize("strip", [False, True])
class TestRunning:
    def test_symbols_code_and_memory(
        self, program: Callable[..., Path], start: Start, options: tuple[str, ...], strip: bool
    ) -> None:
        path = program(*options, strip=strip)
        process = start(path)
        with Target.open(process.pid) as target:
            assert target.pid == process.pid
            assert target.exe == str(path)
            assert target.is_pie is (options[0] == "-pie")
            assert (target.load_base == 0) is not target.is_pie
            assert len(target.build_id) == 40
            assert target.global_u32("g_version") == 0x00010A02
            assert target.global_u32("no_such_variable") is None
            for name in REQUIRED:
                address, code = target.function(name)
                assert address == target.symbol(name)
                assert len(code) < 64
                assert target.read(address, len(code)) == code
                assert target.is_code(address)
                assert path.read_bytes()[target.file_offset(address) :][: len(code)] == code
            assert not target.is_code(target.symbol("g_version"))
            assert (target.find("hidden") is None) is strip  # static: only in .symtab
            assert target.find("per_thread") is None  # an offset in thread-local storage is no address
            with pytest.raises(SymbolMissing):
                target.symbol("no_such_function")
            with pytest.raises(SymbolMissing):
                target.function("no_such_function")
            inside = [r for r in target.maps() if r.start <= target.symbol(REQUIRED[0]) < r.end]
            assert [r.path for r in inside] == [str(path)]
            assert "x" in inside[0].perms


class TestProcess:
    def test_threads(self, program: Callable[..., Path], start: Start) -> None:
        process = start(program())
        with Target.open(process.pid) as target:
            names = target.threads()
            assert len(names) == 6
            workers = {names[tid]: lcore for tid, lcore in target.workers().items()}
            assert workers == {"dpdk-worker1": 1, "lcore-slave-12": 12, "lcore-worker-3": 3}
            assert names[target.control_thread()] == "dpdk-intr"

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [([], "/root/var/run/dpvs.ipc"), (["/tmp/x/y.ipc"], "/root/tmp/x/y.ipc"), (["rel.ipc"], "/cwd/rel.ipc")],
    )
    def test_control_socket(
        self, program: Callable[..., Path], start: Start, arguments: list[str], expected: str
    ) -> None:
        process = start(program(), *arguments)
        with Target.open(process.pid) as target:
            assert target.ipc_path == f"/proc/{process.pid}{expected}"

    def test_control_socket_by_the_command_line(self, program: Callable[..., Path], start: Start) -> None:
        without = FUNCTIONS + "\n#define dpvs_ipc_file other_name\n"
        process = start(program(functions=without), "-c", "/etc/dpvs.conf", "--ipc-file=/run/a.ipc", "--", "-x", "no")
        with Target.open(process.pid) as target:
            assert target.find("dpvs_ipc_file") is None
            assert target.ipc_name == "/run/a.ipc"

    def test_the_end_is_seen(self, program: Callable[..., Path], start: Start) -> None:
        process = start(program())
        with Target.open(process.pid) as target:
            address = target.symbol("g_version")
            assert target.alive()
            process.kill()
            end = time.monotonic() + 5
            while target.alive() and time.monotonic() < end:
                time.sleep(0.01)
            assert not target.alive()  # a zombie, not waited for yet
            with pytest.raises(ProcessGone):
                target.read(address, 4)
            process.wait()
            for ask in (target.threads, target.maps, lambda: target.read_many(np.array([address], np.uint64), 4)):
                with pytest.raises(ProcessGone):
                    ask()
        assert not target.alive()

    def test_the_program_file_may_be_gone(self, program: Callable[..., Path], start: Start, tmp_path: Path) -> None:
        path = tmp_path / "dpvs"
        shutil.copy(program(), path)
        process = start(path)
        path.write_bytes(b"") if not _busy(path) else path.unlink()
        with Target.open(process.pid) as target:
            assert target.function(REQUIRED[0])[1] == target.read(*_span(target, REQUIRED[0]))

    def test_reading_many(self, program: Callable[..., Path], start: Start) -> None:
        process = start(program())
        with Target.open(process.pid) as target:
            base = target.symbol("main")
            addresses = (base + np.arange(2500, dtype=np.uint64) % 7).astype(np.uint64)
            rows = target.read_many(addresses, 16)
            code = target.read(base, 32)
            assert rows.shape == (2500, 16)
            assert all(rows[i].tobytes() == code[i % 7 : i % 7 + 16] for i in (0, 1, 6, 1023, 1024, 2499))
            assert target.read_many(np.empty(0, np.uint64), 8).shape == (0, 8)
            with pytest.raises(ReadFailed, match="0x10"):
                target.read(0x10, 8)
            with pytest.raises(ReadFailed):
                target.read_many(np.array([base, 0x10], np.uint64), 8)

    def test_strings(self, program: Callable[..., Path], start: Start) -> None:
        process = start(program(), "/tmp/some.ipc")
        with Target.open(process.pid) as target:
            pointer = int.from_bytes(target.read(target.symbol("dpvs_ipc_file"), 8), "little")
            assert target.read_string(pointer) == "/tmp/some.ipc"
            assert target.read_string(pointer, 4) == "/tmp"


class TestRefusals:
    def test_no_descriptor_is_left_behind(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for pid in (os.getpid(), 0, -5, 2**22 + 5, 2**40):
            with pytest.raises(DpvsProbeError):
                Target.open(pid)
        assert len(os.listdir("/proc/self/fd")) == before

    @pytest.mark.parametrize("pid", [0, -1, 2**22 + 7, 2**33])
    def test_no_such_process(self, pid: int) -> None:
        with pytest.raises(NoSuchProcess) as error:
            Target.open(pid)
        assert error.value.help_text

    def test_a_thread_is_no_process(self, program: Callable[..., Path], start: Start) -> None:
        process = start(program())
        thread = next(int(t) for t in os.listdir(f"/proc/{process.pid}/task") if int(t) != process.pid)
        with pytest.raises(DpvsProbeError):
            Target.open(thread)

    def test_python_is_not_dpvs(self) -> None:
        with pytest.raises(NotDpvs, match="python"):
            Target.open(os.getpid())

    def test_a_dpvs_that_lacks_a_function(self, program: Callable[..., Path], start: Start) -> None:
        functions = FUNCTIONS.replace("dp_vs_laddr_unbind", "dp_vs_laddr_untie")
        process = start(program(functions=functions))
        with pytest.raises(NotDpvs, match=r"dp_vs_laddr_unbind\(\)"):
            Target.open(process.pid)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
    def test_another_user(self, program: Callable[..., Path], start: Start) -> None:
        process = start(program())
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            try:
                Target.open(process.pid)
            except NeedRoot:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0

    @pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF\x01\x01\x01" + bytes(60)])
    def test_what_is_no_program(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(UnsupportedBinary):
            Image(str(path))

    def test_a_section_s_name_cannot_write_to_the_terminal(self) -> None:
        section = SimpleNamespace(compressed=True, name="\x10\x1b[2J")
        with pytest.raises(UnsupportedBinary, match="compressed") as error:
            _content(None, section)
        assert str(error.value).isprintable()

    def test_an_address_outside_the_file(self, program: Callable[..., Path]) -> None:
        image = Image(str(program()))
        with pytest.raises(UnsupportedBinary):
            image.file_offset(1 << 60)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("dpvs", None),
        ("dpvs -x /a", "/a"),
        ("dpvs -x/a", "/a"),
        ("dpvs --ipc-file /a", "/a"),
        ("dpvs --ipc-file=/a", "/a"),
        ("dpvs --ipc /a", "/a"),
        ("dpvs --i=/a", "/a"),
        ("dpvs -c /conf -p /pid -x /a", "/a"),
        ("dpvs -c -x -p /pid", None),  # -x is the name of the configuration file
        ("dpvs -x /a -x /b", "/b"),
        ("dpvs -- -x /a", None),
        ("dpvs -x /a -- -x /b --file-prefix=c", "/a"),
        ("dpvs -x", None),
        ("dpvs --ipc-file", None),
    ],
)
def test_ipc_argument(arguments: str, expected: str | None) -> None:
    assert (ipc_argument(arguments.split()) or None) == expected


def test_maps_lines() -> None:
    text = (
        "100200000-100400000 rw-s 00200000 00:2a 55399086                         /mnt/huge/a b_0 (deleted)\n"
        "7ffc1000-7ffc2000 rw-p 00000000 00:00 0                                  [stack]\n"
        "7ffd1000-7ffd2000 ---p 00000000 00:00 0 \n"
    )
    huge, stack, hole = parse_maps(text)
    assert (huge.start, huge.end, huge.offset, huge.inode) == (0x100200000, 0x100400000, 0x200000, 55399086)
    assert huge.path == "/mnt/huge/a b_0 (deleted)"
    assert huge.shared
    assert huge.size == 0x200000
    assert not stack.shared
    assert (hole.path, hole.perms) == ("", "---p")


@pytest.mark.parametrize("name", ["a\x0bb", "a\rb", "a\x85b", "a\u2028b", "a\x1cb", "\\012", "a b  c", "\ufffd"])
def test_any_name_of_a_file_is_part_of_its_line(name: str) -> None:
    line = "100200000-100400000 rw-s 00200000 00:2a 55399086                         /mnt/huge/"
    first, second = parse_maps(f"{line}{name}\n{line}b\n")
    assert first.path == f"/mnt/huge/{name}"
    assert second.path == "/mnt/huge/b"


@pytest.mark.parametrize("text", ["x", "1-2", "2-1 rw-s 0 0:0 1 /a", "1-g rw-s 0 0:0 1", "1-2 rw-s 0 0:0 x", "\0"])
def test_what_is_no_line_of_a_memory_map(text: str) -> None:
    with pytest.raises(ReadFailed):
        parse_maps(text)


def test_names_of_threads_are_any_bytes(program: Callable[..., Path], start: Start) -> None:
    odd = '__attribute__((constructor)) static void odd(void) { prctl(PR_SET_NAME, "\\xff\\xfe\\r"); }'
    process = start(program(functions=f"{FUNCTIONS}\n{odd}"))
    with Target.open(process.pid) as target:
        assert target.threads()[process.pid].startswith("\ufffd\ufffd")
        assert sorted(target.workers().values()) == [1, 3, 12]


def damaged(content: bytes, where: str, fields: dict[str, int]) -> bytes:
    """An ELF file with other numbers in the header of the section that ``where`` names the type of."""
    out = bytearray(content)
    (at,), (count,) = struct.unpack_from("<Q", out, 40), struct.unpack_from("<H", out, 60)
    for position in range(at, at + 64 * count, 64):
        if struct.unpack_from("<I", out, position + 4)[0] == {"dynsym": 11, "strtab": 3, "note": 7}[where]:
            for name, value in fields.items():
                offset, shape = {"type": (4, "<I"), "flags": (8, "<Q"), "offset": (24, "<Q"), "size": (32, "<Q")}[name]
                struct.pack_into(shape, out, position + offset, value)
    return bytes(out)


@pytest.mark.parametrize(
    ("where", "fields"),
    [
        ("dynsym", {"size": (1 << 64) - 1}),
        ("dynsym", {"size": 1 << 40}),
        ("dynsym", {"flags": 0x800}),
        ("dynsym", {"offset": (1 << 64) - 1}),
        ("strtab", {"type": 8, "size": 1 << 60}),
        ("strtab", {"size": 0}),
        ("note", {"size": 1 << 40}),
    ],
)
def test_a_damaged_program(program: Callable[..., Path], tmp_path: Path, where: str, fields: dict[str, int]) -> None:
    path = tmp_path / "file"
    path.write_bytes(damaged(program().read_bytes(), where, fields))
    tracemalloc.start()
    with suppress(UnsupportedBinary):
        Image(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * path.stat().st_size + (1 << 20)


def test_notes_of_others_are_no_build_id(program: Callable[..., Path], tmp_path: Path) -> None:
    content = program("-Wl,--build-id=sha1").read_bytes()
    path = tmp_path / "file"
    path.write_bytes(content)
    assert len(Image(str(path)).build_id) == 40
    note = struct.pack("<III", 4, 20, 3)
    assert content.count(note + b"GNU\0") == 1
    path.write_bytes(content.replace(note + b"GNU\0", note + b"sdt\0"))
    assert Image(str(path)).build_id == ""


@pytest.mark.parametrize(("at", "value"), [(58, 0), (58, 1), (60, 0), (60, 0xFFFF), (62, 0xFFFF), (54, 0), (40, 7)])
def test_a_damaged_header(program: Callable[..., Path], tmp_path: Path, at: int, value: int) -> None:
    content = bytearray(program().read_bytes())
    struct.pack_into("<H", content, at, value)
    path = tmp_path / "file"
    path.write_bytes(content)
    with suppress(UnsupportedBinary):
        Image(str(path))


def _busy(path: Path) -> bool:
    try:
        path.open("r+b").close()
    except OSError:
        return True
    return False


def _span(target: Target, name: str) -> tuple[int, int]:
    address, code = target.function(name)
    return address, len(code)


def test_root_is_not_told_to_become_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "sudo" in NeedRoot("no").help_text
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "CAP_SYS_PTRACE" in NeedRoot("no").help_text
    assert NeedRoot("no", help_text="this").help_text == "this"


def test_a_program_that_is_being_started(
    program: Callable[..., Path], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In execve, the file of the new program is known before its entry."""
    process, read, left = start(program()), Path.read_bytes, [3]

    def early(path: Path) -> bytes:
        if path.name != "auxv" or not left[0]:
            return read(path)
        left[0] -= 1
        return bytes(32)

    monkeypatch.setattr(Path, "read_bytes", early)
    with Target.open(process.pid) as target:
        assert target.is_code(target.symbol(REQUIRED[0]))
    assert left == [0]
    left[0] = 1 << 30
    monkeypatch.setattr("probes.target.STARTING_S", 0.01)
    with pytest.raises(NotDpvs, match="no entry address"):
        Target.open(process.pid)
