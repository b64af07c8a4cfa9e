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
from probes.control import SET_CONN_TOKEN, ControlSocket
from probes.errors import DpvsProbeError
from probes.layout import Layout
from probes.target import Target

# DPVS 1.10.2, include/conf/common.h: what the agent answers with.
EDPVS_BUSY, EDPVS_DISABLED = -13, -18
NAME_PART = "dpvs-probe-agent-"


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
        """The door of an agent in this process; None when no agent was ever loaded into it.

        Looked for in the writable memory of every mapping of a file named like our agent, and in the anonymous memory
        right behind it (its .bss). With several agents in the process the one whose entry fills the slot is the one.
        """
        regions = sorted(target.maps(), key=lambda r: r.start)
        doors = []
        for i, region in enumerate(regions):
            if NAME_PART not in region.path or "w" not in region.perms:
                continue
            follows = regions[i + 1] if i + 1 < len(regions) else None
            end = region.end
            if follows and follows.start == end and not follows.path and "w" in follows.perms:
                end = follows.end
            content = target.read(region.start, end - region.start)
            at = content.find(abi.DOOR_MAGIC)
            while at >= 0:
                if at % 8 == 0 and at + abi.DOOR_BYTES <= len(content):
                    doors.append(cls(target, region.start + at))
                at = content.find(abi.DOOR_MAGIC, at + 1)
        filled = [d for d in doors if d.is_installed()]
        return filled[-1] if filled else doors[-1] if doors else None

    def read(self) -> "Door":
        """Read the door again (16 KiB less the results)."""
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
        self._results = door.address + abi.DOOR.itemsize

    def _send(self, op: abi.Op, body: bytes = b"", count: int = 0) -> int:
        self.door.prove()
        self._next_id += 1
        head = np.zeros((), abi.REQUEST)
        head["magic"], head["abi"], head["op"] = abi.REQUEST_MAGIC, abi.ABI, op
        head["token"] = self.door.data["token"]
        head["request_id"] = self._next_id
        head["count"], head["record_bytes"] = count, abi.RECORD_BYTES if count else 0
        errcode = self.control.set(self._set_conn, head.tobytes() + body, allow_set_conn_token=SET_CONN_TOKEN)
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

    def submit(self, ops: npt.NDArray[np.uint8], records: npt.NDArray[np.void]) -> int:
        """Hand n (1..512) records over; returns at once with the request's id.

        ``ops``: (n,) uint8 of RecordOp; ``records``: (n,) ``collector.record.RECORD`` (144 bytes each). Records of one
        worker are worked on in this order. AgentBusy when 16 requests are outstanding, AgentRefused when it will not
        take any.
        """
        n = len(ops)
        if not 0 < n <= abi.MAX_RECORDS or len(records) != n or records.dtype.itemsize != abi.RECORD_BYTES:
            raise ValueError(f"1 to {abi.MAX_RECORDS} records of {abi.RECORD_BYTES} bytes, one op each")
        padding = b"\0" * (-n % 8)
        return self._send(abi.Op.BATCH, ops.tobytes() + padding + records.tobytes(), n)

    def results(self, request_id: int) -> npt.NDArray[np.uint8] | None:
        """The codes (uint8, one a record) of a request; None while it is under way.

        AgentAbsent if the agent does not know the request (any more: it keeps the last 64).
        """
        raw = self.target.read(self._results, abi.RESULTS * abi.RESULT.itemsize)
        table = np.frombuffer(raw, abi.RESULT)
        at = np.flatnonzero(table["request_id"] == request_id)
        if not len(at):
            raise AgentAbsent(f"the agent in process {self.target.pid} does not know request {request_id:#x}")
        row = table[at[0]]
        if int(row["done"]) != int(row["count"]):
            return None
        codes: npt.NDArray[np.uint8] = row["codes"][: int(row["count"])].copy()
        return codes

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
