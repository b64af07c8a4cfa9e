# SPDX-License-Identifier: GPL-2.0-or-later
"""Getting the agent into a running DPVS, and making it a stub again.

Rules: everything that can refuse comes before the process is touched. The shared object goes in as a private copy with
its configuration written into it, through DPDK's control thread while that thread sleeps in ``epoll_wait``: the one
thread of the process that is never in the middle of anything. A process of its own does that (``borrow``). What then
happens in the process is agent.c's business, on the master lcore; here we only wait for the door to open and read what
it says.
"""

import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from probes.agent import abi
from probes.agent.borrow import Borrower, NotBorrowed
from probes.agent.client import NAME_PART, AgentClient, AgentError, Door, visible_pid
from probes.control import ControlSocket
from probes.layout import Layout
from probes.target import Target

LIBRARY = Path(__file__).with_name("agent.so")
TIME_LIMIT_MS = 5000
CHUNK_LIMIT_NS = 64_000  # the last few records of a chunk may take a little longer
WORKER_SHARE = 50  # percent
WATCHDOG_MS = 10_000
MSG_TYPE_WORK, MSG_TYPE_DONE = 0x44505052, 0x44505053  # free in every release: DPVS's own are below 1000
# epoll_wait, epoll_pwait, poll, ppoll, epoll_pwait2 on x86-64: a thread in one of these waits for the world.
WAITING_SYSCALLS = {232, 281, 7, 271, 441}
DIRECTORIES = ("run", "tmp", "var/tmp", "dev/shm")
PLACED = re.compile(re.escape(NAME_PART) + r"[0-9a-f]{16}-\w{8}\.so")
LEFT_S = 300.0  # nothing is being loaded for so long


class AgentNotLoaded(AgentError):
    """The agent could not be brought in; the process is as it was, but for a library it does not use."""


def our_version() -> str:
    """The version of this package, as the agent reports it."""
    try:
        return version("dpvs-probe")
    except PackageNotFoundError:
        return "0+unknown"


def digest_of(layout: Layout) -> int:
    """64 bits that name all that the agent takes from a layout."""
    return int(_of_layout(layout)["digest"])


def _of_layout(layout: Layout) -> Any:
    """``struct agent_config`` with what the agent takes from a layout, and the digest of that."""
    config = np.zeros((), abi.CONFIG)
    config["sockopt_version"] = layout.sockopt_version
    config["sockopt_set_conn"] = layout.sockopt_id("SOCKOPT_SET_CONN")
    config["sockopt_get_conn_min"] = layout.sockopt_id("SOCKOPT_GET_CONN_ALL")
    config["sockopt_get_conn_max"] = layout.sockopt_id("SOCKOPT_GET_CONN_SPECIFIED")
    config["udp_waits"] = layout.udp_waits
    config["offsets"] = 0xFFFF
    for i, (struct, field) in enumerate(abi.fields()):
        if field is None:
            config["offsets"][i] = layout.size(struct)
        elif (struct, field) not in abi.OPTIONAL or layout.has(struct, field):
            config["offsets"][i] = layout.offset(struct, field)
    config["digest"] = int.from_bytes(blake2b(config.tobytes(), digest_size=8).digest(), "little")
    return config


def configured(
    library: bytes, layout: Layout, token: int, *, old: Door | None = None, start_retired: bool = False
) -> bytes:
    """A copy of the shared object with its configuration filled in (``struct agent_config``).

    ``old``: the door of the agent to take over from. ``start_retired``: to be there before DPVS, as a stub.
    """
    at = library.find(abi.CONFIG_MAGIC + abi.ABI.to_bytes(4, "little"))
    if at < 0 or library.find(abi.CONFIG_MAGIC + abi.ABI.to_bytes(4, "little"), at + 1) >= 0:
        raise AgentNotLoaded(
            "the agent's shared object is not one of ours", help_text="Reinstall dpvs-probe (scripts/setup)."
        )
    config = _of_layout(layout)
    config["magic"], config["abi"] = abi.CONFIG_MAGIC, abi.ABI
    config["filled"] = 1
    config["token"] = token
    config["version"] = our_version().encode()[:31]
    config["time_limit_ms"] = TIME_LIMIT_MS
    config["msg_type_work"], config["msg_type_done"] = MSG_TYPE_WORK, MSG_TYPE_DONE
    config["chunk_limit_ns"], config["worker_share"] = CHUNK_LIMIT_NS, WORKER_SHARE
    config["watchdog_ms"] = WATCHDOG_MS
    config["start_retired"] = start_retired
    if old is not None:
        config["old_door"], config["old_token"] = old.address, old.data["token"]
    filled: bytes = config.tobytes()
    return library[:at] + filled + library[at + abi.CONFIG.itemsize :]


def prepare(layout: Layout, path: Path) -> None:
    """Write an agent that goes into DPVS as it starts (``-d`` of DPDK, or LD_PRELOAD), and sleeps until an attach.

    It is found by its name, so that has to begin as it does. Raises AgentNotLoaded.
    """
    if not path.name.startswith(NAME_PART) or path.suffix != ".so":
        raise AgentNotLoaded(f"'{path.name}' is no name for it", help_text=f"Call it {NAME_PART}start.so or the like.")
    if not LIBRARY.exists():
        raise AgentNotLoaded("the agent is not built", help_text="Reinstall dpvs-probe (scripts/setup builds it).")
    content = configured(LIBRARY.read_bytes(), layout, secrets.randbits(64) | 1, start_retired=True)
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_bytes(content)
        fresh.chmod(0o500)
        fresh.replace(path)
    except OSError as error:
        raise AgentNotLoaded(f"cannot write {path}: {error.strerror}", help_text="Another directory?") from error


@contextmanager
def placed(target: Target, content: bytes, token: int) -> Iterator[tuple[str, Path]]:
    """The shared object in a place where the process can open it; yields the path as the process sees it, and as we do.

    Removed again at the end: a mapped file needs no name. Directories that are mounted noexec will not do.
    """
    root = Path(f"/proc/{target.pid}/root")
    for directory in DIRECTORIES:
        folder = root / directory
        try:
            if os.statvfs(folder).f_flag & os.ST_NOEXEC:
                continue
            sweep(folder)
            handle, name = tempfile.mkstemp(prefix=f"{NAME_PART}{token:016x}-", suffix=".so", dir=folder)
        except OSError:
            continue
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                os.fchmod(file.fileno(), 0o500)
            yield "/" + str(Path(name).relative_to(root)), Path(name)
        finally:
            Path(name).unlink(missing_ok=True)  # whoever loaded it has done so
        return
    raise AgentNotLoaded(
        f"found no directory where process {target.pid} could load a library from",
        help_text="Make one of " + ", ".join("/" + d for d in DIRECTORIES) + " writable and not mounted noexec.",
    )


def sweep(folder: Path) -> None:
    """Remove what was placed by somebody who was killed before it could be loaded. Raises OSError."""
    for path in folder.glob(f"{NAME_PART}*.so"):
        if PLACED.fullmatch(path.name):
            with suppress(FileNotFoundError):
                if path.lstat().st_mtime < time.time() - LEFT_S:
                    path.unlink()


def wait_until_quiet(target: Target, tid: int, limit_s: float) -> None:
    """Wait until the control thread sleeps in epoll_wait, so that nothing is interrupted."""
    deadline = time.monotonic() + limit_s
    path = Path(f"/proc/{target.pid}/task/{tid}/syscall")
    while True:
        try:
            now = path.read_text().split()
        except OSError as error:
            raise AgentNotLoaded(f"cannot watch thread {tid} of process {target.pid}: {error.strerror}") from error
        if now and now[0].isdigit() and int(now[0]) in WAITING_SYSCALLS:
            return
        if time.monotonic() > deadline:
            raise AgentNotLoaded(
                f"the control thread of process {target.pid} was never at rest within {limit_s:g} s",
                help_text="Is the machine overloaded, or the process stopped? Try again when it is calm.",
            )
        time.sleep(0.002)


def load(target: Target, layout: Layout, control: ControlSocket) -> AgentClient:
    """Bring the agent into the process and wait until it answers.

    One that is there already is used, or woken, if it is of this build and goes by this layout; one that is older, or
    goes by another layout, is taken over from. Raises AgentNotLoaded with the agent's own reason.
    """
    found = Door.find(target)
    old = found if found is not None and found.is_installed() else None
    if old is not None and is_ours(old, layout):
        return reuse(target, layout, control, old)
    return greeted(target, layout, control, bring_in(target, layout, old))


def bring_in(target: Target, layout: Layout, old: Door | None) -> Door:
    """Load the agent, to take over from the one behind ``old`` if there is one, and wait until it fills the slot.

    The agent in there judges for itself whether the slot is free, or the older one's. Raises AgentNotLoaded.
    """
    if not LIBRARY.exists():
        raise AgentNotLoaded("the agent is not built", help_text="Reinstall dpvs-probe (scripts/setup builds it).")
    tracer = tracer_of(target.pid)
    if tracer:
        raise AgentNotLoaded(
            f"process {target.pid} is being traced by process {tracer}", help_text="Detach the debugger and try again."
        )
    token = secrets.randbits(64) | 1
    content = configured(LIBRARY.read_bytes(), layout, token, old=old)
    tid = target.control_thread()
    with placed(target, content, token) as (path, file):
        try:
            with Borrower(tid, path, file) as borrower:
                wait_until_quiet(target, tid, 2.0)
                borrower.load()
        except NotBorrowed as error:
            raise AgentNotLoaded(f"process {target.pid} would not load the agent: {error}") from error
    return arrived(target, token, TIME_LIMIT_MS / 1000 + 1)


def arrived(target: Target, token: int, limit_s: float) -> Door:
    """The door of the agent that was loaded with this token, once it fills the slot. Raises AgentNotLoaded."""
    deadline = time.monotonic() + limit_s
    while True:
        door = next((d for d in Door.all(target) if int(d.data["token"]) == token), None)
        # Its state is set a moment before the slot is filled, which is the last thing it does.
        if door is not None and door.state in (abi.State.READY, abi.State.RETIRED) and door.is_installed():
            return door
        if door is not None and door.state == abi.State.FAILED:
            raise AgentNotLoaded(
                f"the agent in process {target.pid} refused to start: {door.error or 'no reason given'}"
            )
        if time.monotonic() > deadline:
            raise AgentNotLoaded(f"the agent in process {target.pid} does not come up")
        time.sleep(0.002)


def is_ours(door: Door, layout: Layout) -> bool:
    """Is the agent behind this door to be used as it is? False: ours takes its place. Raises AgentNotLoaded."""
    pid = door.target.pid
    if door.build > abi.BUILD and int(door.data["abi"]) != abi.ABI:
        raise AgentNotLoaded(
            f"process {pid} holds a newer agent ({door.version}, build {door.build}) than this one ({abi.BUILD})",
            help_text="Use the dpvs-probe that loaded it, or a newer one.",
        )
    if door.state == abi.State.POISONED:
        raise AgentNotLoaded(
            f"the agent in process {pid} has shut itself: {door.error}",
            help_text="Attach with --no-inject, and report this line: something in this DPVS is not as expected.",
        )
    if door.state not in (abi.State.READY, abi.State.RETIRED):
        raise AgentNotLoaded(f"the agent in process {pid} is {door.state.name.lower()}: try again")
    if door.build >= abi.BUILD and door.digest == digest_of(layout):
        return True
    if door.build > abi.BUILD:
        raise AgentNotLoaded(
            f"process {pid} holds a newer agent (build {door.build}) that goes by another layout than {layout.name}",
            help_text="Use the dpvs-probe that loaded it, or name the layout that it was loaded with (--layout).",
        )
    return False


def reuse(target: Target, layout: Layout, control: ControlSocket, door: Door) -> AgentClient:
    """Use the agent that is in the process already."""
    client = AgentClient(target, layout, control, door)
    if door.state == abi.State.RETIRED:
        client.revive()
    client.hello()
    return client


def greeted(target: Target, layout: Layout, control: ControlSocket, door: Door) -> AgentClient:
    """A client that has heard from the agent through DPVS's own socket."""
    if int(door.read().data["pid"]) != visible_pid(target):
        raise AgentNotLoaded(f"the door found in process {target.pid} is not its own")
    client = AgentClient(target, layout, control, door)
    client.hello()
    return client


def unload(client: AgentClient) -> None:
    """Make the agent a stub that refuses. It stays in the process: the slot must never be NULL again."""
    client.retire()


def tracer_of(pid: int) -> int:
    """The process that traces this one, 0 for none."""
    with open(f"/proc/{pid}/status", errors="replace", newline="\n") as status:  # it may be called anything
        for line in status:
            if line.startswith("TracerPid:"):
                return int(line.split()[1])
    return 0
