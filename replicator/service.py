# SPDX-License-Identifier: GPL-2.0-or-later
"""One process of dpvs-probe from its start to its end: one attach, or one after the other as DPVS is started anew.

Rules
- With ``pid`` the end of that process is the end. With a pid file or a name a DPVS is waited for, and the next one
  when it has ended: a new attach with an epoch of its own. What peers hold of the old one they keep, as after any end
  of a link.
- A DPVS that has just started is not yet all there: for a minute whatever is missing is tried again, quietly. After
  that, and at once where waiting would not help, an error ends the process.
- The metrics, the service manager and the log are told of what is, with and without a DPVS.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from collector.rows import require_compiled
from probes.candidates import advice
from probes.errors import DpvsProbeError, NeedRoot
from probes.proof import LayoutDisproved
from probes.target import NoSuchProcess
from replicator import systemd
from replicator.attach import Attachment, BadNodeName, Options
from replicator.exporter import Exporter
from replicator.keyfiles import KeysError
from replicator.node import TARGET_ENDED, Node
from replicator.rundir import AlreadyAttached, BadRunDir
from replicator.store.format import ForeignStore
from replicator.store.writer import StoreUnusable
from replicator.transport.interface import CannotListen

LOOK_S = 0.2  # between two looks for a DPVS
STARTING_S = 60.0  # that a DPVS takes at most until all is there
AGAIN_S = 0.5  # between two attempts at one that is starting
# Where a DPVS that gets ready would change nothing.
HOPELESS = (
    NeedRoot, LayoutDisproved, KeysError, BadNodeName, AlreadyAttached, BadRunDir, CannotListen, ForeignStore,
    StoreUnusable,
)  # fmt: skip

log = logging.getLogger(__name__)


class ManyProcesses(DpvsProbeError):
    """More than one process has the name."""

    help_text = "Name one of them with --pid or --pid-file."


def run(options: Options) -> int:
    """Attach, stay attached, detach; the exit status. Raises DpvsProbeError when it cannot be done."""
    require_compiled()
    return asyncio.run(Service(options).run())


def find(options: Options) -> int | None:
    """The process that is meant, if it is there; it may turn out to be no DPVS. Raises ManyProcesses."""
    if options.pid:
        return options.pid
    if options.pid_file is not None:
        return of_file(Path(options.pid_file))
    found = of_name(options.process_name or "")
    if len(found) > 1:
        text = f"{len(found)} processes are called {options.process_name}: {', '.join(map(str, found))}"
        raise ManyProcesses(text, help_text=f"{ManyProcesses.help_text} {advice()}")
    return found[0] if found else None


def found_now(options: Options) -> Options:
    """The same for a process that is there; raises NoSuchProcess."""
    pid = find(options)
    if pid is None:
        raise NoSuchProcess(f"there is no {wanted(options)} now")
    return replace(options, pid=pid)


def wanted(options: Options) -> str:
    """Which DPVS is meant, in words."""
    if options.pid:
        return f"process {options.pid}"
    return f"DPVS of {options.pid_file}" if options.pid_file is not None else f"process called {options.process_name}"


def of_file(path: Path) -> int | None:
    """The process that a pid file names, if it is there."""
    try:
        text = path.read_text(errors="replace").strip()
    except OSError:
        return None
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1 << 22):
        return None
    return int(text) if Path(f"/proc/{text}").exists() else None


def of_name(name: str) -> list[int]:
    """The processes whose program, or first word of the command line, is called so; ascending."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            program = os.path.basename(os.readlink(entry / "exe")).removesuffix(" (deleted)")
            first = os.path.basename((entry / "cmdline").read_bytes().split(b"\0", 1)[0].decode(errors="replace"))
            if name in (program, first):
                found.append(int(entry.name))
    return sorted(found)


def age_s(pid: int) -> float:
    """For how long a process has been there; 0 when it is not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, up_s - int(fields[19]) / os.sysconf("SC_CLK_TCK"))


class Service:
    """``run`` serves until it is told to stop."""

    def __init__(self, options: Options, *, exporter: Exporter | None = None) -> None:
        self._options = options
        self._exporter = exporter or (Exporter(options.metrics) if options.metrics else None)
        self._attachment: Attachment | None = None
        self._node: Node | None = None
        self._stopping = False
        self._woken = asyncio.Event()
        self._said = ""
        self.attaches = 0

    async def run(self) -> int:
        """The exit status: 0 after a signal or ``detach``, 3 when the DPVS has ended that was named by its pid."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        watchdog = asyncio.create_task(self._watchdog())
        try:
            if self._exporter is not None:
                await self._exporter.start()
            return await self._serve()
        finally:
            watchdog.cancel()
            systemd.notify("STOPPING=1")
            if self._exporter is not None:
                await self._exporter.close()

    async def _serve(self) -> int:
        again = not self._options.pid
        while not self._stopping:
            pid = find(self._options)
            if pid is None:
                self._say(f"waiting for a {wanted(self._options)}")
                await self._pause(LOOK_S)
                continue
            try:
                status = await self._attach(pid)
            except DpvsProbeError as error:
                self._attachment = None
                if not again or isinstance(error, HOPELESS) or age_s(pid) > STARTING_S:
                    raise
                self._say(f"pid {pid} is not ready: {error}")
                await self._pause(AGAIN_S)
                continue
            if status != TARGET_ENDED or not again:
                return status
            gc.unfreeze()  # what the node froze was its own, and is free now
        return 0

    async def _attach(self, pid: int) -> int:
        self._attachment = Attachment(replace(self._options, pid=pid), self._on_node)
        try:
            return await self._attachment.run()
        finally:
            self._on_node(None)
            self._attachment = None

    def _on_node(self, node: Node | None) -> None:
        """A node runs from now on, or none does."""
        if node is not None:
            self.attaches += 1
            self._said = ""
            assert self._attachment is not None
            systemd.ready(f"attached to pid {self._attachment.pid}")
            systemd.common.update(DPVS_PID=self._attachment.pid, DPVS_PROBE_NODE=node.name)
        else:
            systemd.common.pop("DPVS_PID", None)
        self._node = node
        if self._exporter is not None:
            self._exporter.node, self._exporter.attaches = node, self.attaches

    def _say(self, what: str) -> None:
        """Once, not at each look. A service that waits is up."""
        if what != self._said:
            self._said = what
            log.info("%s", what)
            systemd.ready(what)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()

    def _on_signal(self, name: str) -> None:
        log.info("%s: stopping", name)
        self._stopping = True
        self._woken.set()
        if self._attachment is not None:
            self._attachment.stop()

    # --- SIGHUP ------------------------------------------------------------------------------------------------------

    def _reload(self) -> None:
        """Configuration and keys."""
        systemd.reloading()
        if self._options.source is not None:
            self._options = reload_settings(self._options, self._attachment.use if self._attachment else None)
        if self._attachment is not None:
            self._attachment.reload_keys()
        systemd.ready(self._said or "attached")

    # --- the watchdog ------------------------------------------------------------------------------------------------

    async def _watchdog(self) -> None:
        """The service manager hears of us as long as the loop turns, and the node in it."""
        within_s = systemd.watchdog_s()
        if within_s is None:
            return
        before = -1
        while True:
            ticks = self._node.ticks if self._node is not None else -1
            if self._node is None or ticks != before:
                systemd.notify("WATCHDOG=1")
            before = ticks
            await asyncio.sleep(within_s / 3)


def reload_settings(options: Options, use: Callable[[Options], None] | None) -> Options:
    """Read the settings again, say what has changed, hand it on to ``use``; what is in force then."""
    source = options.source
    assert source is not None
    try:
        changes = source.reload()
    except DpvsProbeError as error:
        log.error("SIGHUP: the configuration stays as it was: %s", error)
        return options
    for change in changes:
        what = f"{change.key} is {change.after or 'not given'} now, it was {change.before or 'not given'}"
        if change.live:
            log.info("SIGHUP: %s", what)
        else:
            log.warning("SIGHUP: %s; that needs a restart", what)
    if not changes:
        log.info("SIGHUP: no setting has changed")
    after = source.options()
    if use is not None:
        use(after)
    return after
