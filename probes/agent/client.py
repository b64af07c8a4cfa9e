# SPDX-License-Identifier: GPL-2.0-or-later
"""Asking the agent: the proof that it is there, requests to it, and their results.

Rules: **nothing is ever sent to SOCKOPT_SET_CONN without proof** (a stock DPVS dies of it). The proof is read from the
process's own memory before each request: the door carries our magic and the token of its load, says READY or RETIRED,
and the reserved slot of DPVS's handler holds the very address of the agent's entry. A reply of DPVS to SET carries no
data, so results are read from the door too.
"""

import os
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from probes.agent import abi
from probes.control import SET_CONN_TOKEN, ControlBroken, ControlSocket
from probes.errors import DpvsProbeError
from probes.layout import Layout
from probes.target import Target

# DPVS 1.10.2, include/conf/common.h: what the agent answers with.
EDPVS_BUSY, EDPVS_DISABLED = -13, -18
NAME_PART = "dpvs-probe-agent-"
MIN_RECORDS = 256  # a request that small fits into any DPVS


class AgentError(DpvsProbeError):
    """The agent cannot be used."""


class AgentAbsent(AgentError):
    """There is no agent in the process, or what is there is not to be trusted: nothing was sent."""

    help_text = "Attach with injection first (dpvs-probe attach without --no-inject)."


class AgentRefused(AgentError):
    """The agent is there and refuses: retired, poisoned, or the request was not to its liking."""


class AgentBusy(AgentError):
    """All request slots of the agent are taken: ask again a little later."""


class Door:
    """The agent's door as read from the process's memory; a snapshot, refreshed by ``read()``."""

    def __init__(self, target: Target, address: int) -> None:
        self.target = target
        self.address = address
        self.data: Any = np.zeros((), abi.DOOR)
        self.read()

    @classmethod
    def find(cls, target: Target) -> "Door | None":
        """The door of the agent that answers in this process, or of one that failed; None when none was ever loaded.

        A door that a newer agent took over from is passed over: the newest one that fills the slot is the one.
        """
        doors = [d for d in cls.all(target) if int(d.data["state"]) != abi.State.REPLACED]
        filled = sorted((d for d in doors if d.is_installed()), key=lambda d: d.build)
        return filled[-1] if filled else doors[-1] if doors else None

    @classmethod
    def all(cls, target: Target) -> "list[Door]":
        """The doors of all agents that were ever loaded into this process.

        Looked for in the writable memory of every mapping of a file named like our agent.
        """
        doors = []
        for region in sorted(target.maps(), key=lambda r: r.start):
            if NAME_PART not in region.path or "w" not in region.perms:
                continue
            content = target.read(region.start, region.end - region.start)
            at = content.find(abi.DOOR_MAGIC)
            while at >= 0:
                if at % 8 == 0 and at + abi.DOOR.itemsize <= len(content):
                    doors.append(cls(target, region.start + at))
                at = content.find(abi.DOOR_MAGIC, at + 1)
        return doors

    def read(self) -> "Door":
        """Read the door again (3 KiB)."""
        self.data = np.frombuffer(self.target.read(self.address, abi.DOOR.itemsize), abi.DOOR)[0]
        return self

    @property
    def state(self) -> abi.State:
        """Raises AgentAbsent for what no agent says."""
        try:
            return abi.State(int(self.data["state"]))
        except ValueError:
            raise AgentAbsent(f"what looks like an agent in process {self.target.pid} is none") from None

    @property
    def version(self) -> str:
        return _printable(self.data["version"])

    @property
    def error(self) -> str:
        return _printable(self.data["error"])

    @property
    def build(self) -> int:
        """Which agent it is: a higher build takes over from a lower one."""
        return int(self.data["build"]) if int(self.data["abi"]) > 1 else 0

    @property
    def digest(self) -> int:
        """Of the layout that this agent goes by (``loading.digest_of``)."""
        return int(self.data["digest"])

    def is_installed(self) -> bool:
        """Does DPVS's reserved slot hold this agent's entry right now?"""
        slot, entry = int(self.data["slot"]), int(self.data["entry"])
        if not slot or not entry:
            return False
        return int.from_bytes(self.target.read(slot, 8), "little") == entry

    def prove(self) -> None:
        """Raise AgentAbsent unless SET_CONN is answered by this agent and nobody else."""
        self.read()
        if self.data["magic"] != abi.DOOR_MAGIC or int(self.data["abi"]) != abi.ABI:
            raise AgentAbsent(f"the agent in process {self.target.pid} speaks another version of its interface")
        if self.state == abi.State.REPLACED:
            raise AgentAbsent(f"a newer agent took over in process {self.target.pid}")
        if self.state in (abi.State.LOADING, abi.State.FAILED):
            raise AgentAbsent(f"the agent in process {self.target.pid} never came up: {self.error or 'still loading'}")
        if not self.is_installed():
            raise AgentAbsent(f"the reserved slot in process {self.target.pid} does not hold our agent")


class AgentClient:
    """Requests to the agent of one process. Not thread-safe; several clients of one agent may live side by side."""

    def __init__(self, target: Target, layout: Layout, control: ControlSocket, door: Door) -> None:
        self.target = target
        self.control = control
        self.door = door
        self._set_conn = layout.sockopt_id("SOCKOPT_SET_CONN")
        self._next_id = secrets.randbits(62) | 1
        self.max_records = abi.MAX_RECORDS  # less where DPVS has no room for so large a request

    def _send(self, op: abi.Op, *body: "bytes | memoryview", count: int = 0) -> int:
        self.door.prove()
        self._next_id += 1
        head = np.zeros((), abi.REQUEST)
        head["magic"], head["abi"], head["op"] = abi.REQUEST_MAGIC, abi.ABI, op
        head["token"] = self.door.data["token"]
        head["request_id"] = self._next_id
        head["count"], head["record_bytes"] = count, abi.RECORD_BYTES if count else 0
        try:
            errcode = self.control.set(self._set_conn, head.tobytes(), *body, allow_set_conn_token=SET_CONN_TOKEN)
        except ControlBroken:
            # DPVS hangs up without a word when its heap has no room for a request (ctrl.c: sockopt_msg_recv)
            self.max_records = min(self.max_records, max(MIN_RECORDS, count // 2))
            raise
        if errcode == EDPVS_BUSY:
            raise AgentBusy("the agent has no free request slot")
        if errcode:
            self.door.read()
            why = self.door.error or f"it answered {errcode}"
            state = self.door.state.name.lower()
            raise AgentRefused(f"the agent in process {self.target.pid} refused ({state}): {why}")
        return self._next_id

    @property
    def state(self) -> abi.State:
        """Read from the process now."""
        return self.door.read().state

    def hello(self) -> str:
        """Ask the agent whether it is there, through DPVS's own control socket; returns its version."""
        asked = self._send(abi.Op.HELLO)
        if int(self.door.read().data["hello_nonce"]) != asked:
            raise AgentAbsent(f"process {self.target.pid} answered SET_CONN, but not our agent")
        return self.door.version

    def submit(self, ops: npt.NDArray[np.uint8], records: npt.NDArray[np.void], *, trial: bool = False) -> int:
        """Hand n (1..4096) records over; returns at once with the request's id.

        ``ops``: (n,) uint8 of RecordOp; ``records``: (n,) ``collector.record.RECORD`` (144 bytes each). Records of one
        worker are worked on in this order. Of a ``trial`` one record at most is put in, the others that could be are
        answered with BUSY. AgentBusy when 8 requests are outstanding, AgentRefused when it will not take any.
        """
        n = len(ops)
        if not 0 < n <= abi.MAX_RECORDS or len(records) != n or records.dtype.itemsize != abi.RECORD_BYTES:
            raise ValueError(f"1 to {abi.MAX_RECORDS} records of {abi.RECORD_BYTES} bytes, one op each")
        padding = b"\0" * (-n % 8)
        whole = np.ascontiguousarray(records).view(np.uint8).data  # no copy of what may be 590 KiB before the last one
        return self._send(abi.Op.TRIAL if trial else abi.Op.BATCH, ops.tobytes(), padding, whole, count=n)

    def results(self, request_id: int) -> npt.NDArray[np.uint8] | None:
        """The codes (uint8, one a record) of a request; None while it is under way.

        AgentAbsent if the agent does not know the request (any more: it keeps the last 64).
        """
        at, head = self._head(request_id)
        count = int(head["count"])
        if int(head["done"]) != count:
            if self.state == abi.State.POISONED:
                raise AgentRefused(f"the agent in process {self.target.pid} has shut itself: {self.door.error}")
            return None
        first = int(self.door.data["results"]) + abi.RESULT_HEADS_BYTES
        codes = np.frombuffer(self.target.read(first + at * abi.MAX_RECORDS, count), np.uint8)
        self._head(request_id)  # still the same request's
        return codes

    def tried(self, request_id: int) -> int:
        """Address of the session that a trial made or updated; 0 if it did neither."""
        return int(self._head(request_id)[1]["conn"])

    def _head(self, request_id: int) -> tuple[int, Any]:
        raw = self.target.read(int(self.door.data["results"]), abi.RESULT_HEADS_BYTES)
        table = np.frombuffer(raw, abi.RESULT)
        at = np.flatnonzero(table["request_id"] == request_id)
        if not len(at) or int(table[at[0]]["count"]) > abi.MAX_RECORDS:
            raise AgentAbsent(f"the agent in process {self.target.pid} does not know request {request_id:#x}")
        return int(at[0]), table[at[0]]

    def retire(self) -> None:
        """Make it a stub that refuses; what is under way ends with RETIRED. The slot stays filled."""
        self._send(abi.Op.RETIRE)

    def revive(self) -> None:
        """Make a retired agent work again."""
        self._send(abi.Op.REVIVE)

    def counters(self) -> Mapping[str, Any]:
        """What the agent did since it was loaded: requests, records by code, and time spent on each worker."""
        d = self.door.read().data
        workers = []
        mask = int(d["worker_mask"])
        lcores = [i for i in range(64) if mask >> i & 1]
        for lcore, w in zip(lcores, d["workers"][: len(lcores)], strict=True):
            workers.append({"lcore": lcore} | {k: int(w[k]) for k in abi.WORKER.names or ()})
        return {
            "state": self.door.state.name.lower(),
            "version": self.door.version,
            "build": self.door.build,
            "error": self.door.error,
            "requests": int(d["requests"]),
            "malformed": int(d["malformed"]),
            "wrong_token": int(d["wrong_token"]),
            "busy": int(d["busy"]),
            "refused": int(d["refused"]),
            "outstanding": int(d["outstanding"]),
            "records": {c.name.lower(): int(d["by_code"][c]) for c in abi.Code if int(d["by_code"][c])},
            "workers": workers,
        }


def _printable(text: bytes) -> str:
    return "".join(c if c.isprintable() else "?" for c in bytes(text).decode(errors="replace"))


def code_name(code: int) -> str:
    """The lower-case name of a result code."""
    try:
        return abi.Code(code).name.lower()
    except ValueError:
        return f"code_{code}"


def visible_pid(target: Target) -> int:
    """The process's id as it sees itself (its innermost pid namespace), which is what the door carries."""
    with open(f"/proc/{target.pid}/status", errors="replace", newline="\n") as status:
        for line in status:
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return target.pid if os.path.exists(f"/proc/{target.pid}") else 0
