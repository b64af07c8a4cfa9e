# SPDX-License-Identifier: GPL-2.0-or-later
"""Which parts of the machine are there: each check gives None, or the reason why not."""

import ctypes
import importlib
import importlib.util
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from tests.vm import machine

ROOT = Path(__file__).resolve().parents[1]
TWIN = ROOT / "build" / "twin" / "dpvs-twin"
ETCD = ROOT / "build" / "etcd" / "usr" / "bin" / "etcd"
SYS_BPF = 321
BPF_MAP_CREATE = 0
BPF_MAP_TYPE_ARRAY = 2


def _root() -> str | None:
    return None if os.geteuid() == 0 else "needs root"


def netns() -> str | None:
    if reason := _root():
        return reason
    child = os.fork()
    if child == 0:
        new_net = 0x40000000
        os._exit(0 if ctypes.CDLL(None).unshare(new_net) == 0 else 1)
    return None if os.waitpid(child, 0)[1] == 0 else "network namespaces cannot be made here"


def bpf() -> str | None:
    if reason := _root():
        return reason
    try:
        importlib.import_module("bcc")
    except (ImportError, OSError) as error:
        return f"bcc cannot be imported: {error}"
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = ctypes.create_string_buffer(struct.pack("=IIII", BPF_MAP_TYPE_ARRAY, 4, 8, 1), 128)
    descriptor = libc.syscall(SYS_BPF, BPF_MAP_CREATE, attributes, ctypes.sizeof(attributes))
    if descriptor < 0:
        return f"bpf() is refused: {os.strerror(ctypes.get_errno())}"
    os.close(descriptor)
    return None


def twin() -> str | None:
    if reason := _root():
        return reason
    return None if os.access(TWIN, os.X_OK) else "the twin is not built: ./scripts/setup"


def agent() -> str | None:
    if reason := _root():
        return reason
    return None if (ROOT / "probes/agent/agent.so").exists() else "the agent is not compiled: ./scripts/setup"


def vm() -> str | None:
    return None if machine.IN_GUEST in os.environ else machine.not_ready()


def dpvs() -> str | None:
    if reason := _root():
        return reason
    from tests.lab.process import LabError
    from tests.lab.real import binary

    try:
        return None if binary() else "DPVS_BIN and DPVS_TOOLS name no real DPVS"
    except LabError as error:
        return str(error)


def members() -> str | None:
    if not os.access(ETCD, os.X_OK):
        return "etcd is not there: ./scripts/setup"
    return None if shutil.which("dnsmasq") else "dnsmasq is not installed: ./scripts/setup"


def fuzz() -> str | None:
    return None if importlib.util.find_spec("atheris") else "atheris is not there for this Python: ./scripts/setup"


def keepalived() -> str | None:
    return None if os.access("/usr/sbin/keepalived", os.X_OK) else "keepalived is not installed: ./scripts/setup"


def prometheus() -> str | None:
    from tests.lab.prometheus import is_there

    return None if is_there() else "Prometheus is not fetched: ./scripts/setup"


CHECKS: dict[str, Callable[[], str | None]] = {
    "netns": netns,
    "bpf": bpf,
    "twin": twin,
    "agent": agent,
    "vm": vm,
    "dpvs": dpvs,
    "fuzz": fuzz,
    "members": members,
    "keepalived": keepalived,
    "prometheus": prometheus,
}
