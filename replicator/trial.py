# SPDX-License-Identifier: GPL-2.0-or-later
"""The trial session: before many sessions are put into a DPVS, one is, and is looked at from all sides.

Rules
- The session is the first that is to be put in anyway: invented ones would need a service, a real server and a local
  address, and a client that nobody is. What is real is refused where it does not belong, as any other.
- The agent puts in one of a batch at most and says where it is. That piece of memory, and DPVS's own word for the same
  session (GET_CONN_SPECIFIED), must say what the record says. Then the session is taken out again, and must be gone
  from both. Only then the batch goes in.
- Where nothing can be put in because all of it is here already, the first session that is to be made to wait is the
  trial: it has to be what the record names, and to wait. It is not taken out. No copy is claimed before a trial.
- It disturbs nobody. It waits as any copy does, and ends as silently. Should its traffic arrive in this moment, DPVS
  makes it an established session, and then it stays.
- A difference names its field, and nothing more is put in by this attach.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from collector.conns import from_conns
from collector.record import (
    AF_INET,
    HASHED,
    INACTIVE,
    INJECTED,
    SYNPROXY,
    TCP,
    TEMPLATE,
    UDP,
    UNKNOWN_MODE,
    Records,
    waiting,
)
from probes.agent import abi
from probes.agent.client import AgentClient, AgentRefused, code_name
from probes.control import ControlSocket
from probes.layout import SESSION, Layout
from probes.memory import SessionPool, session_dtype
from probes.target import Target

ANSWER_S = 15.0  # more than the agent's own watchdog gives a worker
PAUSE_S = 0.001
LOOK_S = 2.0  # between two looks at what is not proven yet
FULLNAT = 5
TUPLE = ("caddr", "vaddr", "laddr", "daddr", "cport", "vport", "lport", "dport")
FIELDS = (
    "af", "af_out", "proto", *TUPLE, "wscale_vs", "wscale_rs", "pp_version", "pp_sent",
    *(f"{of}_{part}" for of in ("fnat", "sp") for part in ("isn", "delta", "fdata_seq", "prev_delta")),
    "rs_end_seq", "rs_end_ack",
)  # fmt: skip
MOVING = {f"{of}_{part}" for of in ("fnat", "sp") for part in ("fdata_seq", "prev_delta")} | {
    "rs_end_seq",
    "rs_end_ack",
}
PUT_IN = (abi.Code.CREATED, abi.Code.UPDATED)
CHANGES = (abi.RecordOp.UPSERT, abi.RecordOp.YIELD, abi.RecordOp.CLAIM)
CLIENT_SIDE = ("af", "proto", "caddr", "vaddr", "cport", "vport")

log = logging.getLogger(__name__)
Codes = npt.NDArray[np.uint8]


class TrialFailed(AgentRefused):
    """A session that the agent put in is not what it should be."""

    help_text = "Attach with --no-inject, and report this line: something in this DPVS is not as expected."


class Client(Protocol):
    """What the trial asks of ``probes.agent.client.AgentClient``."""

    @property
    def max_records(self) -> int: ...
    def submit(self, ops: Codes, records: Records, *, trial: bool = False) -> int: ...
    def results(self, request_id: int) -> Codes | None: ...
    def tried(self, request_id: int) -> int: ...


class Witness(Protocol):
    """What can be known of a session in DPVS without the agent (``Inspector``)."""

    def differences(self, address: int, record: Records) -> list[str]: ...
    def restless(self, address: int, record: Records) -> list[str]: ...
    def remains(self, address: int, record: Records) -> list[str]: ...


class Missing(Protocol):
    """Names of the fields that are not proven yet, of those that putting sessions in takes."""

    def __call__(self, *, fullnat: bool) -> tuple[str, ...]: ...


class Trial:
    """An agent, as the injector wants one, that begins with a trial session. Used from one thread."""

    def __init__(
        self,
        client: Client,
        witness: Witness,
        clock: Callable[[], float] = time.monotonic,
        missing: "Missing | None" = None,
    ) -> None:
        self._client = client
        self._missing = missing
        self._proven = set[bool]() if missing else {False, True}  # for sessions with and without a local address
        self._look_at = 0.0
        self._kept: dict[int, Codes] = {}  # answers of ours, by request
        self._witness = witness
        self._clock = clock
        self.passed = False

    @property
    def max_records(self) -> int:
        return self._client.max_records

    def submit(self, ops: Codes, records: Records) -> int:
        """As ``AgentClient.submit``; raises TrialFailed as well. The first that changes something takes a little."""
        if (ops == abi.RecordOp.UPSERT).any() and not self._may(records):
            return self._not_yet(ops)
        if not self.passed and np.isin(ops, CHANGES).any():
            request = self._client.submit(ops, records, trial=True)
            codes = self._answer(request)
            made = (ops == abi.RecordOp.UPSERT) & np.isin(codes, PUT_IN)
            made |= (ops == abi.RecordOp.YIELD) & (codes == abi.Code.YIELDED)
            if not made.any():
                return request  # nothing could be put in: these are the answers
            at = int(np.flatnonzero(made)[0])
            self._judge(self._client.tried(request), records[at : at + 1], abi.Code(int(codes[at])))
            self.passed = True
            log.info("a trial session is as it should be")
        return self._client.submit(ops, records)

    def results(self, request_id: int) -> Codes | None:
        if request_id in self._kept:
            return self._kept.pop(request_id)
        return self._client.results(request_id)

    def _may(self, records: Records) -> bool:
        """Whether all fields that putting these in takes are proven; looked at now and then until they are."""
        fullnat = bool((records["fwdmode"] == FULLNAT).any())
        if fullnat in self._proven or self._missing is None:
            return True
        if self._clock() < self._look_at:
            return False
        missing = self._missing(fullnat=fullnat)
        if not missing:
            self._proven |= {fullnat, False}
            return True
        if not self._look_at:
            log.warning("nothing is put in yet, not proven: %s", ", ".join(missing))
        self._look_at = self._clock() + LOOK_S
        return False

    def _not_yet(self, ops: Codes) -> int:
        """An answer of our own: what would be made is tried again later, all else is not there."""
        request = -1 - len(self._kept)
        while request in self._kept:
            request -= 1
        puts = ops == abi.RecordOp.UPSERT
        self._kept[request] = np.where(puts, int(abi.Code.NO_SERVICE), int(abi.Code.ABSENT)).astype(np.uint8)
        return request

    def _judge(self, address: int, record: Records, code: abi.Code) -> None:
        look = self._witness.restless if code == abi.Code.YIELDED else self._witness.differences
        wrong = look(address, record)
        if code == abi.Code.CREATED:  # a copy of an earlier attach stays
            delete = np.array([abi.RecordOp.DELETE], np.uint8)
            ended = int(self._answer(self._client.submit(delete, record))[0])
            if ended == abi.Code.DELETED:
                wrong += self._gone(address, record)
            elif ended != abi.Code.LIVE:
                wrong.append(f"it could not be taken out again ({code_name(ended)})")
        if wrong:
            raise TrialFailed(f"a trial session is not what was asked for: {'; '.join(wrong)}")

    def _gone(self, address: int, record: Records) -> list[str]:
        """Where it remains; a template ends by its timer, a moment later."""
        deadline = self._clock() + (ANSWER_S if int(record["flags"][0]) & TEMPLATE else 0)
        while (left := self._witness.remains(address, record)) and self._clock() < deadline:
            time.sleep(PAUSE_S)
        return left

    def _answer(self, request: int) -> Codes:
        deadline = self._clock() + ANSWER_S
        while (codes := self._client.results(request)) is None:
            if self._clock() > deadline:
                raise TrialFailed(f"the agent did not answer within {ANSWER_S:g} s")
            time.sleep(PAUSE_S)
        return codes


class Inspector:
    """Reads a session from the process's memory and asks DPVS for it."""

    def __init__(
        self, target: Target, layout: Layout, pool: SessionPool, control: ControlSocket, modes: Mapping[int, int]
    ) -> None:
        self._target, self._pool, self._control = target, pool, control
        self._modes = modes
        self._dtype, self._size = session_dtype(layout), layout.size(SESSION)

    def differences(self, address: int, record: Records) -> list[str]:
        """What memory and DPVS say of the session at ``address`` that ``record``, (1,) RECORD, does not."""
        if self._pool.slot_of(np.array([address], np.uint64))[0] < 0:
            return [f"{address:#x} is no session of DPVS's pool"]
        return [*self._in_memory(address, record), *self._in_answer(record)]

    def restless(self, address: int, record: Records) -> list[str]:
        """Why the session at ``address`` is not that of ``record``, seen from the client, or does not wait for it."""
        if self._pool.slot_of(np.array([address], np.uint64))[0] < 0:
            return [f"{address:#x} is no session of DPVS's pool"]
        seen = from_conns(self._read(address), np.zeros(1, np.int64), self._modes)
        wrong = [
            _difference(f"{name} in memory", seen[name][0], record[name][0])
            for name in CLIENT_SIDE
            if not _same(name, seen, record)
        ]
        flags = int(seen["flags"][0])
        if flags & (HASHED | INJECTED) != HASHED | INJECTED:
            wrong.append(_difference("flags in memory", hex(flags), hex(HASHED | INJECTED)))
        waits = bool(waiting(seen)[0])  # else its next packet has come in this very moment
        if waits and not flags & TEMPLATE and abs(int(seen["timeout_ms"][0]) - int(record["timeout_ms"][0])) > 1000:
            wrong.append(_difference("timeout in memory", seen["timeout_ms"][0], record["timeout_ms"][0]))
        if not flags & TEMPLATE and self._listed(record) is None:
            wrong.append("DPVS does not know it")
        return wrong

    def remains(self, address: int, record: Records) -> list[str]:
        """Where a session that was taken out can still be seen."""
        left = []
        if int(self._read(address)["flags"][0]) & HASHED:
            left.append("its memory says that it still stands")
        if not int(record["flags"][0]) & TEMPLATE and self._listed(record) is not None:
            left.append("DPVS still knows it")
        return left

    def _read(self, address: int) -> Records:
        raw = self._target.read(address, self._size)
        return np.frombuffer(raw.ljust(self._dtype.itemsize, b"\0"), self._dtype)

    def _in_memory(self, address: int, record: Records) -> list[str]:
        seen = from_conns(self._read(address), np.zeros(1, np.int64), self._modes)
        flags = int(seen["flags"][0])
        template = int(record["flags"][0]) & TEMPLATE
        live = not waiting(seen)[0] or not flags & INACTIVE  # its traffic came in this very moment
        wrong = [
            _difference(f"{name} in memory", seen[name][0], record[name][0])
            for name in FIELDS
            if not (live and name in MOVING) and not _same(name, seen, record)
        ]
        if seen["fwdmode"][0] not in (record["fwdmode"][0], UNKNOWN_MODE):
            wrong.append(_difference("forwarding mode in memory", seen["fwdmode"][0], record["fwdmode"][0]))
        if not live and abs(int(seen["timeout_ms"][0]) - int(record["timeout_ms"][0])) > 1000:
            wrong.append(_difference("timeout in memory", seen["timeout_ms"][0], record["timeout_ms"][0]))
        need = HASHED | INJECTED | template | (0 if template else int(record["flags"][0]) & SYNPROXY)
        if flags & (HASHED | INJECTED | TEMPLATE | SYNPROXY) != need:
            wrong.append(_difference("flags in memory", hex(flags), hex(need)))
        return wrong

    def _in_answer(self, record: Records) -> list[str]:
        if int(record["flags"][0]) & TEMPLATE:
            return []  # DPVS lists templates apart
        row = self._listed(record)
        if row is None:
            return ["DPVS does not know it"]
        one = record[0]
        inner, outer = (4 if one[af] == AF_INET else 16 for af in ("af", "af_out"))
        wrong = [
            _difference(f"{name} in DPVS's answer", row[there], one[name])
            for name, there in (("af", "in_af"), ("af_out", "out_af"), ("proto", "proto"))
            if int(row[there]) != int(one[name])
        ]
        for name in TUPLE:
            size = inner if name in ("caddr", "vaddr") else outer
            same = bytes(row[name][:size]) == bytes(one[name][:size]) if "addr" in name else row[name] == one[name]
            if not same:
                wrong.append(_difference(f"{name} in DPVS's answer", row[name], one[name]))
        state = bytes(row["state"]).split(b"\0")[0]
        waits = state == {TCP: b"SYNACK", UDP: b"UDP_NONE"}.get(int(one["proto"]), b"SCTP_NONE")
        if waits and abs(int(row["timeout"]) * 1000 - int(one["timeout_ms"])) > 1000:
            wrong.append(_difference("timeout in DPVS's answer", int(row["timeout"]) * 1000, one["timeout_ms"]))
        return wrong

    def _listed(self, record: Records) -> "np.void | None":
        one = record[0]
        size = 4 if one["af"] == AF_INET else 16
        row = self._control.session(
            int(one["af"]), int(one["proto"]), one["caddr"][:size].tobytes(), int(one["cport"]),
            one["vaddr"][:size].tobytes(), int(one["vport"]),
        )  # fmt: skip
        return None if row is None else row  # type: ignore[return-value]


def tried_first(  # noqa: PLR0917 - what the inspector takes, and one more
    client: AgentClient,
    layout: Layout,
    pool: SessionPool,
    control: ControlSocket,
    modes: Mapping[int, int],
    missing: Missing | None = None,
) -> Trial:
    """The agent of a process behind its trial."""
    return Trial(client, Inspector(client.target, layout, pool, control, modes), missing=missing)


def _same(name: str, seen: Records, record: Records) -> bool:
    if name in ("caddr", "vaddr", "laddr", "daddr"):
        size = 4 if record["af" if name in ("caddr", "vaddr") else "af_out"][0] == AF_INET else 16
        return bytes(seen[name][0][:size]) == bytes(record[name][0][:size])
    return bool(seen[name][0] == record[name][0])


def _difference(name: str, got: object, wanted: object) -> str:
    def text(value: object) -> str:
        return value.tobytes().hex() if isinstance(value, np.ndarray) else str(value)

    return f"{name} is {text(got)}, not {text(wanted)}"
