# SPDX-License-Identifier: GPL-2.0-or-later
"""A real conntrackd for comparison: two of them in network namespaces, FTFW over UDP, as the package comes.

The sessions are connection tracking entries that are put into the first namespace's kernel by netlink, as traffic would
do. Both daemons run with FIFO 99, which its manual recommends. What is started here is ended by its process id.
"""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import numpy as np
import numpy.typing as npt

NODES = ("a", "b")
LISTENER_PRIORITY = 50  # the daemons have 99
PACKAGE = "conntrackd"
PATIENCE_S = 60.0
QUIET_S = 2.0  # without any progress: what is missing by then was lost
EXTERNAL, INTERNAL = "external", "internal"
CONF = """
Sync {{
    Mode FTFW {{
        ResendQueueSize 1048576
        DisableExternalCache {direct}
    }}
    UDP {{
        IPv4_address 10.99.0.{own}
        IPv4_Destination_Address 10.99.0.{peer}
        Port 3780
        Interface {interface}
        SndSocketBuffer 16777216
        RcvSocketBuffer 16777216
        Checksum on
    }}
}}
General {{
    Scheduler {{
        Type FIFO
        Priority 99
    }}
    HashSize 1048576
    HashLimit 4194304
    LogFile {log}
    Syslog off
    LockFile {directory}/{node}.lock
    UNIX {{
        Path {directory}/{node}.ctl
    }}
    NetlinkBufferSize 67108864
    NetlinkBufferSizeMaxGrowth 268435456
    NetlinkOverrunResync off
    Filter From Userspace {{
        Protocol Accept {{
            TCP
        }}
    }}
}}
"""
# linux/netfilter/nfnetlink_conntrack.h
_NEW, _GROUP_NEW = 0x0100, 1
_REQUEST, _CREATE, _EXCL = 0x1, 0x400, 0x200
_ORIG, _REPLY, _STATUS, _PROTOINFO, _TIMEOUT, _MARK = 1, 2, 3, 4, 7, 8
_NESTED = 0x8000
_BATCH = 128  # entries in one message
UNITS = {"lost": "sessions", "offered": "a second"}  # of rows that only these figures have
SYSCTL = Path("/proc/sys/net/netfilter")


class Unavailable(Exception):
    """Why there are no figures of conntrackd."""


def require(*, install: bool) -> None:
    """Raises Unavailable."""
    if os.geteuid() != 0:
        raise Unavailable("it takes root to run it in network namespaces")
    if not Path("/proc/net/nf_conntrack").exists() and not SYSCTL.joinpath("nf_conntrack_max").exists():
        raise Unavailable("this kernel has no connection tracking")
    if shutil.which(PACKAGE) is None and install:
        subprocess.run(["apt-get", "install", "-y", "-q", PACKAGE], check=False, stdout=subprocess.DEVNULL)
    if shutil.which(PACKAGE) is None:
        raise Unavailable("it is not installed; --install does that with apt")


# --- entries ---------------------------------------------------------------------------------------------------------


def _attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("<HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _nest(kind: int, *inner: bytes) -> bytes:
    return _attribute(kind | _NESTED, b"".join(inner))


def _tuple(kind: int, source: bytes, target: bytes, ports: tuple[bytes, bytes]) -> bytes:
    addresses = _nest(1, _attribute(1, source), _attribute(2, target))
    proto = _nest(2, _attribute(1, b"\x06"), _attribute(2, ports[0]), _attribute(3, ports[1]))
    return _nest(kind, addresses, proto)


def messages(first: int, count: int, mark: int = 0, *, create: bool = True) -> bytes:
    """Netlink requests that make (or change) established TCP entries, one for each number."""
    client, server = b"CCCC", b"\xc0\x00\x02\x01"
    body = (
        struct.pack("<BBH", socket.AF_INET, 0, 0)
        + _tuple(_ORIG, client, server, (b"PP", b"\x00\x50"))
        + _tuple(_REPLY, server, client, (b"\x00\x50", b"PP"))
        + _attribute(_STATUS, struct.pack(">I", 0x4 | 0x8 | 0x2))  # assured, confirmed, seen a reply
        + _attribute(_TIMEOUT, struct.pack(">I", 3600))
        + _attribute(_MARK, struct.pack(">I", mark))
        + _nest(_PROTOINFO, _nest(1, _attribute(1, b"\x03"), _attribute(4, b"\x0a\x0a"), _attribute(5, b"\x0a\x0a")))
    )
    flags = _REQUEST | (_CREATE | _EXCL if create else 0)
    one = struct.pack("<IHHII", 16 + len(body), _NEW, flags, 0, 0) + body
    numbers = np.arange(first, first + count, dtype=np.uint32)
    all_of_them = np.tile(np.frombuffer(one, np.uint8), (count, 1))
    addresses = (np.uint32(0x0B000000) + (numbers >> 14)).astype(">u4").view(np.uint8).reshape(count, 4)
    ports = (1024 + (numbers & 0x3FFF)).astype(">u2").view(np.uint8).reshape(count, 2)
    for pattern, values in ((client, addresses), (b"PP", ports)):
        for found in re.finditer(re.escape(pattern), one):
            all_of_them[:, found.start() : found.end()] = values
    return all_of_them.tobytes()


def number_of(event: bytes) -> int:
    """Which entry a notification is about: the first address and port in it, at fixed places."""
    at = 16 + 4 + 4 + 4  # headers, the tuple, its addresses
    address, port = event[at + 4 : at + 8], event[at + 16 + 4 + 8 + 4 : at + 16 + 4 + 8 + 6]
    return ((int.from_bytes(address) - 0x0B000000) << 14) + int.from_bytes(port) - 1024


class Injector:
    """Puts entries into a namespace's kernel."""

    def __init__(self, namespace: str) -> None:
        self._socket = netlink(namespace)

    def put(self, data: bytes, count: int) -> None:
        """Requests made by ``messages``."""
        size = len(data) // count * _BATCH
        for start in range(0, len(data), size):
            self._socket.send(data[start : start + size])
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(1 << 16, socket.MSG_DONTWAIT):
                raise Unavailable("the kernel does not take our entries")


def netlink(namespace: str, groups: int = 0) -> socket.socket:
    """A netfilter socket in a namespace."""
    from pyroute2 import netns

    netns.pushns(namespace)
    try:
        opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)  # NETLINK_NETFILTER
    finally:
        netns.popns()
    opened.setsockopt(socket.SOL_SOCKET, 33, 256 << 20)  # SO_RCVBUFFORCE
    opened.bind((0, groups))
    return opened


# --- daemons ---------------------------------------------------------------------------------------------------------


def sh(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()[:200]}")
    return done.stdout


@contextmanager
def namespaces(sessions: int) -> Iterator[str]:
    """Two, with a wire between them; their common prefix."""
    prefix = f"dpb{os.getpid():x}"
    with ExitStack() as undo:
        for name, least in (("nf_conntrack_max", 2 * sessions), ("nf_conntrack_buckets", 1 << 20)):
            path = SYSCTL / name
            before = path.read_text()
            if int(before) < least:
                path.write_text(str(least))
                undo.callback(path.write_text, before)
        for node in NODES:
            sh("ip", "netns", "add", f"{prefix}{node}")
            undo.callback(sh, "ip", "netns", "del", f"{prefix}{node}")
        names = {node: f"{prefix}{node}" for node in NODES}
        sh(
            "ip",
            "link",
            "add",
            "wire",
            "netns",
            names["a"],
            "type",
            "veth",
            "peer",
            "name",
            "wire",
            "netns",
            names["b"],
        )
        for number, name in enumerate(names.values(), 1):
            sh("ip", "-n", name, "address", "add", f"10.99.0.{number}/24", "dev", "wire")
            sh("ip", "-n", name, "link", "set", "wire", "up")
            sh("ip", "-n", name, "link", "set", "lo", "up")
            # 2, the default: entries that are older than the daemon tell nobody of their changes.
            sh("ip", "netns", "exec", name, "sh", "-c", "echo 1 >/proc/sys/net/netfilter/nf_conntrack_events")
        yield prefix


class Daemon:
    """One conntrackd."""

    def __init__(self, prefix: str, node: str, directory: Path, *, direct: bool) -> None:
        own = NODES.index(node) + 1
        self._conf, self._control = directory / f"{node}.conf", directory / f"{node}.ctl"
        self._log = directory / f"{node}.log"
        self._conf.write_text(
            CONF.format(
                directory=directory, node=node, own=own, peer=3 - own, interface="wire", log=self._log,
                direct="On" if direct else "Off",
            )
        )  # fmt: skip
        self.namespace = f"{prefix}{node}"
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, PACKAGE, "-C", str(self._conf)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + PATIENCE_S
        while not self._control.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = self._log.read_text() if self._log.exists() else ""
                raise Unavailable(f"it does not start: {log.strip()[-200:]}")
            time.sleep(0.02)

    def tell(self, *options: str) -> str:
        """What its own command says."""
        return sh(PACKAGE, "-C", str(self._conf), *options)

    def cache(self, which: str, line: str = "current active connections") -> int:
        """A number of the statistics of a cache."""
        section = self.tell("-s").partition(f"cache {which}")[2]
        found = re.search(rf"{line}:\s+(\d+)", section)
        return int(found[1]) if found else 0

    @property
    def rss(self) -> int:
        """Bytes of memory."""
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def sent_bytes(self) -> int:
        """On the wire between the namespaces, with all headers."""
        links = sh("ip", "netns", "exec", self.namespace, "cat", "/proc/net/dev")
        return int(links.partition("wire:")[2].split()[8])

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def pair(prefix: str, directory: Path, *, direct: bool = False) -> Iterator[tuple[Daemon, Daemon]]:
    """Two daemons. ``direct``: what comes goes into the kernel at once, without an external cache."""
    with ExitStack() as undo:
        daemons = []
        for node in NODES:
            daemon = Daemon(prefix, node, directory, direct=direct)
            undo.callback(daemon.close)
            daemons.append(daemon)
        yield daemons[0], daemons[1]


def reached(now: Callable[[], int], wanted: int, pause_s: float = 0.01) -> tuple[int, float]:
    """How far a count comes, and the moment it got there: it is there, or stands still."""
    best, at = now(), time.perf_counter()
    while best < wanted and time.perf_counter() - at < QUIET_S:
        time.sleep(pause_s)
        count = now()
        if count > best:
            best, at = count, time.perf_counter()
    return best, at


# --- measures --------------------------------------------------------------------------------------------------------

Figures = dict[str, float]


def syncs(sessions: int, directory: Path, *, partial: bool) -> Figures:
    """A full sync into the peer's external cache, asked for by the peer; and what changed while the wire was cut."""
    with namespaces(sessions) as prefix:
        Injector(f"{prefix}a").put(messages(0, sessions), sessions)
        with pair(prefix, directory) as (a, b):
            empty = b.rss
            reached(lambda: a.cache(INTERNAL), sessions, 0.1)
            bytes_before, began = a.sent_bytes, time.perf_counter()
            b.tell("-n")
            count, at = reached(lambda: b.cache(EXTERNAL), sessions)
            figures = {
                f"full sync of {sessions}": at - began,
                "on the wire": (a.sent_bytes - bytes_before) / max(1, count),
                "memory, sender": (a.rss - empty) / sessions,
                "memory, receiver": (b.rss - empty) / max(1, count),
                "full sync, lost": sessions - count,
            }
            if partial:
                changed = sessions // 100
                sh("ip", "-n", a.namespace, "link", "set", "wire", "down")
                Injector(a.namespace).put(messages(0, changed, mark=7, create=False), changed)
                time.sleep(0.5)
                before = b.cache(EXTERNAL, "connections updated")
                sh("ip", "-n", a.namespace, "link", "set", "wire", "up")
                began = time.perf_counter()
                count, at = reached(lambda: b.cache(EXTERNAL, "connections updated") - before, changed)
                if count >= changed:
                    figures[f"incremental, {changed} of {sessions}"] = at - began
            return figures


def sustained(sessions: int, directory: Path) -> Figures:
    """New entries as fast as the kernel takes them."""
    with namespaces(sessions) as prefix, pair(prefix, directory) as (_, b):
        data = messages(0, sessions)
        injector = Injector(f"{prefix}a")
        began = time.perf_counter()
        injector.put(data, sessions)
        count, at = reached(lambda: b.cache(EXTERNAL), sessions)
        return {"sustained changes": count / (at - began), "sustained, lost": sessions - count}


def latencies(rate: int, seconds: float, directory: Path) -> Figures:
    """From the entry in one kernel to the notification of it by the other."""
    count = int(rate * seconds)
    data = messages(0, count)
    size = len(data) // count
    with namespaces(count) as prefix, pair(prefix, directory, direct=True):
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        listener = multiprocessing.get_context("spawn").Process(
            target=listen, args=(f"{prefix}b", count, theirs), daemon=True
        )
        listener.start()
        ours.recv()
        injector = Injector(f"{prefix}a")
        due = time.monotonic_ns() + 10_000_000 + np.cumsum(
            np.random.default_rng(1).exponential(1e9 / rate, count)
        ).astype(np.int64)  # fmt: skip
        put_at = np.zeros(count, np.int64)
        with favoured():
            for number, when in enumerate(due.tolist()):
                while (now := time.monotonic_ns()) < when:
                    if when - now > 200_000:
                        time.sleep((when - now - 100_000) / 1e9)
                put_at[number] = now
                injector._socket.send(data[number * size : (number + 1) * size])
        numbers, times = ours.recv()
        listener.join()
    waits = (times - put_at[numbers]) / 1e6
    what = f"event to peer's table, {rate}/s"
    figures: Figures = {f"{what}, lost": count - len(waits), f"{what}, offered": count / (put_at[-1] - put_at[0]) * 1e9}
    if len(waits):
        figures |= {f"{what}, p{percent}": float(np.percentile(waits, percent)) for percent in (50, 99)}
    return figures


@contextmanager
def favoured() -> Iterator[None]:
    """Before all other work of the machine, but for real time."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def listen(namespace: str, count: int, pipe: Pipe) -> None:
    """A process: note which entries come up in a namespace, and when."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(LISTENER_PRIORITY))
    notices = netlink(namespace, 1 << (_GROUP_NEW - 1))
    notices.settimeout(QUIET_S)
    seen: list[tuple[int, bytes]] = []
    pipe.send(True)
    with contextlib.suppress(TimeoutError):
        while len(seen) < count:
            data = notices.recv(1 << 16)
            seen.append((time.monotonic_ns(), data))
    if not seen:
        pipe.send((np.empty(0, np.int64), np.empty(0, np.int64)))
        return
    numbers: npt.NDArray[np.int64] = np.array([number_of(data) for _, data in seen], np.int64)
    inside = (numbers >= 0) & (numbers < count)
    pipe.send((numbers[inside], np.array([at for at, _ in seen], np.int64)[inside]))
