# SPDX-License-Identifier: GPL-2.0-or-later
"""Making a layout: out of a debug build of DPVS, or out of its source tree and the headers of its DPDK.

Rules: of a tree only headers are used: a file that includes them is compiled with debug information, and never run or
linked. The result is what a layout file holds, with the options that it was made with; which structs and requests
belong in it is what the newest shipped layout has.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from probes import dwarf
from probes.errors import DpvsProbeError
from probes.layout import FORMAT, LOOKUP, UDP_STATES, Layout, Struct

MODEL = "1.10.2"
SOCKOPT_VERSION = 0x10000  # SOCKOPT_VERSION, include/conf/sockopts.h or ctrl.h; the same from 1.7 to 1.10
HEADERS = (
    "ipvs/conn.h", "ipvs/service.h", "ipvs/dest.h", "ipvs/laddr.h", "ipvs/redirect.h", "ipvs/proto.h",
    "ipvs/proto_udp.h", "sa_pool.h", "inetaddr.h", "ctrl.h", "timer.h", "conf/conn.h", "conf/sockopts.h",
    "conf/service.h", "conf/laddr.h",
)  # fmt: skip
SOURCES = ("src/ipvs/ip_vs_laddr.c",)  # struct dp_vs_laddr is in no header
FLAG = "DPVS_CONN_F_"
UDP_STATE = "DPVS_UDP_S_"
# The function that finds services, by the arguments that it has in releases: what is on the stack then, and its size.
LOOKUP_ARGUMENTS = (
    "int, uint16_t, const union inet_addr *, uint16_t, uint32_t, const struct rte_mbuf *, const struct dp_vs_match *"
)
LOOKUPS = {
    "lcoreid_t": Struct(LOOKUP, 24, {"match": (8, 8), "cid": (16, 1)}),
    "bool *, lcoreid_t": Struct(LOOKUP, 32, {"match": (8, 8), "outwall": (16, 8), "cid": (24, 1)}),
}
_UDP_NAMES = [UDP_STATE + name for name in UDP_STATES]
OURS = "INJECTED"  # our own flag: DPVS must have none of that value
STOCK = ("-DDPVS_MAX_SOCKET=2", "-DDPVS_MAX_LCORE=64", "-DCONFIG_DPVS_LOG", "-DCONFIG_DPVS_PDUMP", "-D__DPVS__")


class CannotMake(DpvsProbeError):
    help_text = "See docs/layouts.md for what a layout is made of."


def of_tree(tree: Path, includes: Sequence[Path], flags: Sequence[str], releases: Sequence[str]) -> dict[str, Any]:
    """The content of a layout file for a source tree. ``includes``: directories of DPDK's headers; ``flags``: compiler
    options (-D...) beyond those of a stock build. Raises CannotMake with what the compiler says."""
    include = tree / "include"
    if not (include / "ipvs" / "conn.h").is_file():
        raise CannotMake(f"{tree} is not a source tree of DPVS: it has no include/ipvs/conn.h")
    model = _model()
    headers = [name for name in HEADERS if (include / name).is_file()]
    wanted = [*model["dpvs"]["structs"], *model["dpdk"]["structs"]]
    flag_names = [FLAG + name for name in model["dpvs"]["flags"] if name != OURS]
    ids = list(model["dpvs"]["sockopt_ids"])
    source = "\n".join(
        [
            "#define _GNU_SOURCE", "#if !__has_include(<rte_kni.h>)", "#define CONFIG_KNI_VIRTIO_USER", "#endif",
            "#include <rte_config.h>", "#include <rte_version.h>", "#include <rte_mempool.h>",
            "#include <rte_memzone.h>", *(f'#include "{name}"' for name in headers),
            "unsigned probe_year = RTE_VER_YEAR, probe_month = RTE_VER_MONTH;",
            *(f"#ifdef {n}\nenum {{ probe_{n} = {n} }};\n#endif" for n in (*flag_names, *ids, "SOCKOPT_VERSION")),
            *(f'#include "{tree / name}"' for name in SOURCES if (tree / name).is_file()),
            *(f"struct {name} *probe_{name};" for name in wanted),
            *(
                f"enum {{ probe_lookup_{n} = __builtin_types_compatible_p(__typeof__({LOOKUP}),"
                f" struct dp_vs_service *({LOOKUP_ARGUMENTS}, {rest})) }};"
                for n, rest in enumerate(LOOKUPS)
            ),
        ]
    )  # fmt: skip
    options = [
        *STOCK, *flags, f"-I{include}", *(f"-I{path}" for path in includes), "-DALLOW_EXPERIMENTAL_API",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory, "probe.c")
        place.write_text(source)
        built = place.with_suffix(".o")
        _compile([*options, "-g", "-O0", "-c", "-fno-eliminate-unused-debug-types", str(place), "-o", str(built)])
        version = _compile([*options, "-E", "-P", str(place)])
        lookups = [f"probe_lookup_{n}" for n in range(len(LOOKUPS))]
        names = [*flag_names, *ids]
        values = [*names, *_UDP_NAMES, *(f"probe_{n}" for n in (*names, "SOCKOPT_VERSION")), *lookups]
        found = dwarf.read(built, wanted, values)
        for name, struct in zip(lookups, LOOKUPS.values(), strict=True):
            if found.values.get(name):
                found.structs[LOOKUP] = struct
    year, month = (re.search(rf"probe_{part} = ([0-9]+)", version) for part in ("year", "month"))
    dpdk = f"{int(year[1]):02}.{int(month[1]):02}" if year and month else "unknown"
    return _content(found, releases, dpdk, [*STOCK, *flags])


def of_debug_build(path: Path, releases: Sequence[str]) -> dict[str, Any]:
    """The content of a layout file for a program with debug information, or for the debug file of one."""
    model = _model()
    wanted = [*model["dpvs"]["structs"], *model["dpdk"]["structs"]]
    flags = [FLAG + name for name in model["dpvs"]["flags"] if name != OURS]
    names = [*flags, *model["dpvs"]["sockopt_ids"], *_UDP_NAMES]
    return _content(dwarf.read(path, wanted, names), releases, "unknown", ["as built"])


def _content(found: dwarf.Found, releases: Sequence[str], dpdk: str, flags: Sequence[str]) -> dict[str, Any]:
    model = _model()
    values = {**found.values, **{n.removeprefix("probe_"): v for n, v in found.values.items() if n[:6] == "probe_"}}
    content: dict[str, Any] = {
        "format": FORMAT,
        "comment": "Offsets and sizes in bytes (x86-64): field -> [offset, size]; made by dpvs-probe layout generate",
        "dpvs": {
            "releases": list(releases),
            "built_with": list(flags),
            "sockopt_version": values.get("SOCKOPT_VERSION", SOCKOPT_VERSION),
            "sockopt_ids": {name: values[name] for name in model["dpvs"]["sockopt_ids"] if name in values},
            "flags": _flags(model["dpvs"]["flags"], values),
            **({"udp_states": states} if (states := _udp_states(values)) else {}),
            "structs": _structs(found, model["dpvs"]["structs"]),
        },
        "dpdk": {"release": dpdk, "structs": _structs(found, model["dpdk"]["structs"])},
    }
    for struct in ("dp_vs_conn", "rte_mempool"):
        if struct not in content["dpvs"]["structs"] and struct not in content["dpdk"]["structs"]:
            raise CannotMake(f"struct {struct} was not found")
    Layout.parse("made", content)
    return content


def _structs(found: dwarf.Found, wanted: Sequence[str]) -> dict[str, Any]:
    return {
        name: {"size": struct.size, "fields": {member: list(at) for member, at in struct.fields.items()}}
        for name in wanted
        if (struct := found.structs.get(name)) is not None
    }


def _flags(model: dict[str, str], values: dict[str, int]) -> dict[str, str]:
    flags = {name: f"{values[FLAG + name]:#06x}" for name in model if FLAG + name in values}
    if model[OURS] in flags.values():
        raise CannotMake(f"this DPVS uses the flag {model[OURS]}, which dpvs-probe marks copies with")
    return {**flags, OURS: model[OURS]}


def _udp_states(values: dict[str, int]) -> dict[str, int]:
    return {name: values[UDP_STATE + name] for name in UDP_STATES if UDP_STATE + name in values}


def _compile(options: Sequence[str]) -> str:
    command = ["cc", "-std=gnu11", "-march=native", "-w", "-include", "rte_config.h", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotMake(f"cannot run a C compiler: {error.strerror}", help_text="apt install gcc") from None
    if done.returncode:
        raise CannotMake(f"the headers do not compile:\n{done.stderr[-1500:]}")
    return done.stdout


def _model() -> dict[str, Any]:
    text = resources.files("probes").joinpath("layouts", f"{MODEL}.json").read_text()
    model: dict[str, Any] = json.loads(text)
    return model


def write(content: dict[str, Any], path: Path) -> None:
    """Write a layout file: a line a struct, so that a person can compare two of them."""
    bare = {part: {**content[part], "structs": {}} for part in ("dpvs", "dpdk")}
    lines = json.dumps({**content, **bare}, indent=1)
    for part in ("dpvs", "dpdk"):
        structs = ",\n".join(
            f"   {json.dumps(name)}: {json.dumps(body)}" for name, body in content[part]["structs"].items()
        )
        lines = lines.replace('"structs": {}', '"structs": {\n' + structs + "\n  }", 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines + "\n")
