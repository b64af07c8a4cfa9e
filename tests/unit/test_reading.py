# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine code is followed rightly, and what is not understood is forgotten."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from probes.reading import ELEMENT, Access, Reader

pytestmark = pytest.mark.skipif(shutil.which("as") is None, reason="no assembler")
S = ("s",)


@pytest.fixture
def found(tmp_path: Path) -> Any:
    """What is found in assembler text (Intel's syntax, without prefixes) that begins at address 0 with s in rdi."""

    def read(text: str, frame: str | None = None, **named: Any) -> set[Access]:
        built, raw = tmp_path / "a.o", tmp_path / "a.bin"
        source = f".intel_syntax noprefix\n{text}\n"
        subprocess.run(["as", "-o", built, "-"], input=source, text=True, check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", built, raw], check=True)
        code = raw.read_bytes()
        reader = Reader(lambda address: code[address : address + 512] if 0 <= address < len(code) else b"", **named)
        reader.follow(0, {0: "s", 2: "third"}, frame)
        return reader.found

    return read


def test_widths_and_pointers(found: Any) -> None:
    assert found("mov rax, [rdi+336]\nmov ecx, [rax+8]\nmov word ptr [rdi+2], 1\nret") == {
        (S, 336, 8), ((*S, 336), 8, 4), (S, 2, 2),
    }  # fmt: skip


def test_both_branches_and_no_further_than_the_end(found: Any) -> None:
    text = "test esi, esi\nje 1f\nmov al, [rdi+1]\nret\n1: mov al, [rdi+2]\nret\nmov al, [rdi+3]\nret"
    assert found(text) == {(S, 1, 1), (S, 2, 1)}


@pytest.mark.parametrize("spoil", ["xor edi, edi", "mov edi, edi", "imul rdi, rsi", "pop rdi", "mov rdi, rsi"])
def test_a_register_that_is_written_is_forgotten(found: Any, spoil: str) -> None:
    assert found(f"{spoil}\nmov rax, [rdi+8]\nret") == set()


def test_arithmetic_that_is_understood(found: Any) -> None:
    assert found("lea rax, [rdi+16]\nadd rax, 8\nsub rax, 4\nmov cl, [rax]\nret") == {(S, 20, 1)}


def test_the_stack_keeps_what_is_put_there(found: Any) -> None:
    text = "push rbx\nsub rsp, 32\nmov [rsp+8], rdi\nxor edi, edi\nmov rbx, [rsp+8]\nmov ax, [rbx+6]\nret"
    assert found(text) == {(S, 6, 2)}


def test_calls_are_followed_and_what_they_may_clobber_is_forgotten(found: Any) -> None:
    text = "mov rbx, rdi\ncall 1f\nmov al, [rdi+1]\nmov al, [rbx+2]\nret\n1: mov al, [rdi+3]\nret"
    assert found(text) == {(S, 0, 0), (("third",), 0, 0), (S, 2, 1), (S, 3, 1)}


def test_a_call_back_into_itself_ends(found: Any) -> None:
    assert (S, 4, 4) in found("mov eax, [rdi+4]\nadd rdi, 64\ncall 0\nret")


def test_what_a_function_returns(found: Any) -> None:
    text = "call 1f\nmov cl, [rax+5]\nret\n1: mov rax, [rdi+24]\nret"
    assert ((*S, 24), 5, 1) in found(text)
    assert (("other",), 5, 1) in found("call 1f\nmov cl, [rax+5]\nret\n.org 32\n1: ret", returns={32: "other"})


def test_elements_of_an_array(found: Any) -> None:
    assert found("mov rax, [rdi+8]\nmovzx esi, si\nmov cx, [rax+rsi*8+2]\nret") == {
        (S, 8, 8), ((*S, 8, ELEMENT), 2, 2),
    }  # fmt: skip


@pytest.mark.parametrize("way", ["call", "jmp"])
def test_what_is_given_to_a_named_function(found: Any, way: str) -> None:
    text = f"add rdi, 264\n{way} 1f\nret\n.org 32\n1: ret"
    assert ((*S, "timer"), 264, 0) in found(text, takes={32: "timer"})
    assert ((*S, "timer"), 264, 0) not in found(f"xor edi, edi\n{text}", takes={32: "timer"})


def test_where_an_argument_is_stored(found: Any) -> None:
    assert found("mov rax, rdx\nmov [rdi+16], rax\nmov [rdi+24], rsi\nret") == {
        (S, 16, 8), ((*S, "=third"), 16, 8), (S, 24, 8),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("begin", "at"),
    [("", "rsp+16"), ("push rbx\npush rbp\nsub rsp, 40", "rsp+72"), ("push rbp\nmov rbp, rsp\nsub rsp, 64", "rbp+24"),
     ("lea r10, [rsp+8]\nand rsp, -32", "r10+8")],
    ids=["bare", "saved registers", "frame pointer", "aligned"],
)  # fmt: skip
def test_arguments_on_the_stack(found: Any, begin: str, at: str) -> None:
    """Its own, not those of what it calls; and without a name, none."""
    called = {(S, 0, 0), (S, 1, 1), (("third",), 0, 0)}
    text = f"{begin}\nmovzx eax, byte ptr [{at}]\ncall 1f\nret\n1: mov rax, [rsp+24]\nmov al, [rdi+1]\nret"
    assert found(text, frame="f") == {(("f",), 16, 1), *called}
    assert found(text) == called


def test_code_that_is_none(found: Any) -> None:
    assert found(".byte 6, 6, 6") == set()
    assert found("jmp 0x100000") == set()
    assert found("jmp rax\nmov al, [rdi]") == set()
