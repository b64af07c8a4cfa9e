# SPDX-License-Identifier: GPL-2.0-or-later
"""The Python mirror of agent_abi.h says what the C compiler says."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from collector.record import RECORD
from probes.agent import abi

STRUCTS = {
    "agent_config": abi.CONFIG,
    "agent_worker_stats": abi.WORKER,
    "agent_result": abi.RESULT,
    "agent_door": abi.DOOR,
    "agent_request": abi.REQUEST,
}


def compiled(tmp_path: Path, lines: list[str]) -> dict[str, int]:
    source = tmp_path / "print.c"
    source.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "agent_abi.h"\n'
        '#define C(x) printf("%s %ld\\n", #x, (long)(x))\n'
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    binary = tmp_path / "print"
    subprocess.run(["gcc", "-Wall", "-Werror", f"-I{abi.HEADER.parent}", "-o", binary, source], check=True)
    text = subprocess.run([binary], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines())}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_structs_and_numbers_are_the_compilers(tmp_path: Path) -> None:
    lines, expected = [], {}
    for struct, dtype in STRUCTS.items():
        assert dtype.names
        for name in dtype.names:
            lines.append(f"C(offsetof(struct {struct}, {name}));")
            expected[f"offsetof(struct {struct}, {name})"] = dtype.fields[name][1]  # type: ignore[index]
    whole = {**STRUCTS, "agent_record": RECORD}
    for struct, dtype in whole.items():
        lines.append(f"C(sizeof(struct {struct}));")
        expected[f"sizeof(struct {struct})"] = dtype.itemsize
    for prefix, enum in (("CODE_", abi.Code), ("AGENT_", abi.Op), ("AGENT_", abi.RecordOp), ("AGENT_", abi.State)):
        for member in enum:
            name = prefix + member.name
            if name == "AGENT_RETIRED":
                assert enum is abi.State
            lines.append(f"C({name});")
            expected[name] = int(member)
    for name in ("ABI", "BUILD", "MAX_RECORDS", "MAX_REQUESTS", "RESULTS", "MAX_WORKERS", "OFFSETS"):
        lines.append(f"C(AGENT_{name});")
        expected[f"AGENT_{name}"] = getattr(abi, name)
    assert compiled(tmp_path, lines) == expected


def test_record_offsets_match_the_header(tmp_path: Path) -> None:
    names = {
        "slot": "slot", "generation": "generation", "af": "af", "fwdmode": "fwdmode", "state": "state",
        "flags": "flags",
        "caddr": "caddr", "vaddr": "vaddr", "laddr": "laddr", "daddr": "daddr", "cport": "cport", "dport": "dport",
        "timeout_ms": "timeout_ms", "worker": "worker", "wscale_vs": "wscale_vs", "pp_version": "pp_version",
        "fnat.isn": "fnat_isn", "fnat.delta": "fnat_delta", "fnat.fdata_seq": "fnat_fdata_seq",
        "fnat.prev_delta": "fnat_prev_delta", "sp.isn": "sp_isn", "sp.prev_delta": "sp_prev_delta",
        "rs_end_seq": "rs_end_seq", "rs_end_ack": "rs_end_ack", "pp_sent": "pp_sent",
    }  # fmt: skip
    got = compiled(tmp_path, [f"C(offsetof(struct agent_record, {c}));" for c in names])
    for c, python in names.items():
        assert got[f"offsetof(struct agent_record, {c})"] == RECORD.fields[python][1], c  # type: ignore[index]


def test_field_list_is_read_from_the_header() -> None:
    fields = abi.fields()
    assert len(fields) == len(set(fields))
    assert len(fields) <= abi.OFFSETS
    assert fields[0] == ("dp_vs_conn", None)
    assert ("dpvs_sockopts", "set") in fields
    assert np.dtype("<u2").itemsize * abi.OFFSETS == abi.CONFIG.fields["offsets"][0].itemsize  # type: ignore[index]
