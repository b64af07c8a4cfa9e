# SPDX-License-Identifier: GPL-2.0-or-later
"""What a running attach does about stores: keeps its own, brings back what an earlier DPVS had, saves, restores.

Rules: a file that is not ours is never written over: that refuses the attach, before anything is touched. One that is
ours and cannot be used is said, put aside (``FILE.refused``), and a new one begun. Trouble with the file later ends the
storing, not the node.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from collector.record import Records
from collector.table import SessionTable
from probes.errors import DpvsProbeError
from replicator.promotion import Promotion
from replicator.store.format import ForeignStore, Head, StoreRefused, joined
from replicator.store.reader import Contents, boot_id, locked, now, read
from replicator.store.restored import Fit, Restored, fit
from replicator.store.writer import StoreUnusable, Writer
from replicator.wire import Hello

MARKS = "store"  # names of marks in the table; peers' are addresses
SAVE_MARKS = "snapshot"
AGE_NS = 1_000_000_000
PATIENCE_NS = 30_000_000_000  # so long restored sessions that DPVS refuses keep this node from being ready
PROGRESS_S = 0.01

log = logging.getLogger(__name__)


class Injector(Protocol):
    """What is asked of ``replicator.inject.Injector``."""

    promotion: Promotion
    stopped: DpvsProbeError | None

    def codes(self, replica: Any) -> npt.NDArray[np.uint8]: ...


class Keeper:
    """The store of one node, from the start of its attach to the end."""

    def __init__(self, path: Path | None, me: Hello, clock: Callable[[], int], *, flush_ns: int = 0) -> None:
        """``path``: where the store is; None: nothing is stored. ``me``: this run, as its peers know it."""
        self.path, self._me, self._clock, self._flush_ns = path, me, clock, flush_ns
        self._boot = boot_id()
        self._old_fd = -1
        self._old: Contents | None = None
        self._writer: Writer | None = None
        self._table: SessionTable | None = None
        self._injector: Injector | None = None
        self._failed = ""
        self._aged_ns = 0
        self._began_ns = clock()
        self._saving = False
        self.restored: list[Restored] = []

    # --- the start ---------------------------------------------------------------------------------------------------

    def look(self, table: SessionTable) -> None:
        """Before anything is touched: read what is there, take room for what is to come; ``table``: what will be
        stored, still empty. Raises StoreRefused, StoreUnusable.
        """
        self._table = table
        if self.path is not None:
            self._read(self.path)
            self._writer = self._make(self.path, MARKS, self._flush_ns)

    def _read(self, path: Path) -> None:
        if not path.parent.is_dir():
            raise StoreUnusable(f"there is no directory {path.parent} for a store")
        try:
            self._old_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            log.info("store %s is begun", path)
            return
        except OSError as error:
            raise StoreUnusable(f"{path} cannot be read: {error.strerror}") from error
        if locked(self._old_fd):
            raise StoreUnusable(f"{path} is written by another dpvs-probe", help_text="Give each attach its own.")
        try:
            old = read(path)
            old.require_node(self._me.node)
            found = self._fit(old)
            old.require_whole()
        except ForeignStore as error:
            raise ForeignStore(_named(error, path), help_text=error.help_text) from error
        except StoreRefused as error:
            aside = path.with_name(path.name + ".refused")
            os.replace(path, aside)
            log.error("no session comes back: %s; it is now %s", _named(error, path), aside)
            return
        self._old = old
        self._take(found, old)

    def begin(self, injector: Injector | None) -> None:
        """What can put sessions in, if anything can."""
        self._injector = injector

    def origins(self) -> Sequence[Restored]:
        """For the injector."""
        return self.restored

    def _fit(self, contents: Contents) -> Fit:
        return fit(contents, self._boot, now(), own=contents.head.instance != self._me.instance)

    def _take(self, found: Fit, contents: Contents) -> Restored | None:
        if len(found.records) == 0 and found.expired == 0:
            return None
        restored = Restored(found, contents, self._clock())
        self.restored.append(restored)
        if self._table is not None:
            self._table.hear(found.claim)
        log.info(
            "%d sessions of this node's earlier DPVS are to come back (%s); %d too old, %d of kinds not put in",
            len(found.records), contents.path, found.expired, found.unfit,
        )  # fmt: skip
        return restored

    def _make(self, path: Path, marks: str, flush_ns: int = 0) -> Writer:
        assert self._table is not None
        waiting = self.waiting()
        me = self._me
        head = Head(me.node, me.epoch, me.instance, self._table.slots, len(waiting), me.workers, now(), self._boot)
        return Writer(path, self._table, self._table.add_peer(marks), head, waiting, flush_ns=flush_ns)

    def waiting(self) -> Records:
        """Restored sessions that may still wait for a packet: a new file keeps them too."""
        return joined([restored.remaining() for restored in self.restored])

    # --- while it runs -----------------------------------------------------------------------------------------------

    def tick(self, now_ns: int, *, proven: bool) -> None:
        """A little of everything. ``proven``: what the table says may be told."""
        if self.restored and now_ns - self._aged_ns >= AGE_NS:
            self._aged_ns = now_ns
            for restored in self.restored:
                restored.age(now_ns)
            self.restored[:] = [one for one in self.restored if one.present.any()]
            if self._injector is not None and self.unsettled():
                self._injector.promotion.hurry(now_ns)
        if self._writer is not None and proven:
            try:
                self._writer.tick(now_ns, now())
            except OSError as error:
                self._fail(error)

    def unsettled(self) -> int:
        """Restored sessions that DPVS was not asked about yet, or refuses for now."""
        if self._injector is None or not self._injector.promotion.puts_in or self._injector.stopped:
            return 0
        return sum(restored.unsettled(self._injector.codes(restored)) for restored in self.restored)

    def why_not_ready(self, now_ns: int) -> str:
        """What keeps traffic from coming; "" if nothing does."""
        if not self.restored or now_ns - self._began_ns > PATIENCE_NS:
            return ""
        left = self.unsettled()
        return f"{left} sessions of this node's earlier DPVS are not back yet" if left else ""

    def end(self, *, ended: bool, proven: bool) -> None:
        """The last word: ``ended`` if DPVS is no more."""
        if self._writer is not None and proven:
            try:
                self._writer.end(now(), ended=ended)
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        """Let go of the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._old_fd >= 0:
            os.close(self._old_fd)
            self._old_fd = -1

    def report(self) -> dict[str, Any]:
        """For status and metrics."""
        said: dict[str, Any] = {"state": "off"}
        if self._failed:
            said = {"state": "failed", "why": self._failed}
        elif self._writer is not None:
            said = {"state": "kept" if self._writer.whole else "begun", **self._writer.report()}
        if self.restored:
            codes = [self._codes(restored) for restored in self.restored]
            said["restored"] = [one.report(code) for one, code in zip(self.restored, codes, strict=True)]
        return said

    def _codes(self, restored: Restored) -> npt.NDArray[np.uint8]:
        if self._injector is None:
            return np.zeros(restored.slots, np.uint8)
        return self._injector.codes(restored)

    def _fail(self, error: OSError) -> None:
        self._failed = f"{self.path}: {error.strerror}"
        log.error("sessions are stored no more: %s", self._failed)
        self.close()

    # --- what the command asks ---------------------------------------------------------------------------------------

    async def save(self, path: str) -> dict[str, Any]:
        """All own sessions into another file, as of now. Raises StoreRefused, StoreUnusable."""
        assert self._table is not None
        target = Path(path)
        if self._saving:
            raise StoreUnusable("another snapshot is being saved", help_text="Try again in a moment.")
        if not self._table.complete:
            raise StoreUnusable("the sessions of this DPVS are not all read yet", help_text="Try again in a moment.")
        if target.exists():
            await asyncio.to_thread(read, target)  # whatever else is there is not written over
            if self.path is not None and target.samefile(self.path):
                raise StoreUnusable(f"{target} is the store itself", help_text="Give another file.")
        self._saving = True
        writer: Writer | None = None
        try:
            writer = self._make(target, SAVE_MARKS)
            while not writer.whole:
                writer.tick(self._clock(), now())
                await asyncio.sleep(PROGRESS_S)
            return {**writer.report(), "node": self._me.node}
        except OSError as error:
            raise StoreUnusable(f"{target} cannot be written: {error.strerror}") from error
        finally:
            self._table.remove_peer(SAVE_MARKS)
            if writer is not None:
                writer.close()
            self._saving = False

    async def restore(self, path: str, wait_s: float, *, partly: bool, node: str | None) -> dict[str, Any]:
        """Bring back what a file has; waits up to ``wait_s`` for what DPVS refuses for now. Raises StoreRefused."""
        if self._injector is None or self._table is None:
            raise StoreRefused("sessions are not put into this DPVS", help_text="Attach with --listen or --store.")
        contents = await asyncio.to_thread(read, path)
        try:
            contents.require_node(node or self._me.node)
            if contents.head.instance == self._me.instance:
                raise StoreRefused("it is of the very DPVS that runs here, which has them", help_text="")
            if not partly:
                contents.require_whole()
            found = self._fit(contents)
        except StoreRefused as error:
            raise type(error)(_named(error, contents.path), help_text=error.help_text) from None
        restored = self._take(found, contents) or Restored(found, contents, self._clock())
        self._injector.promotion.hurry(self._clock())
        deadline = self._clock() + int(wait_s * 1e9)
        while self._clock() < deadline and restored.unsettled(self._codes(restored)) and not self._injector.stopped:
            if not self._injector.promotion.puts_in:
                break
            await asyncio.sleep(PROGRESS_S)
        return {**restored.report(self._codes(restored)), "role": self._injector.promotion.role}


def _named(error: StoreRefused, path: Path) -> str:
    text = str(error)
    return text if str(path) in text else f"{path} is refused: {text}"
