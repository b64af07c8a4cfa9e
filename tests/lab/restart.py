# SPDX-License-Identifier: GPL-2.0-or-later
"""DPVS is stopped and started anew on one node, with live connections through it, and its sessions come back.

The order is that of a real restart: the routes are withdrawn (here the switch lets nothing through), DPVS ends, a new
one starts and gets its addresses and services, dpvs-probe attaches to it and puts the sessions back, and when it says
that it is ready the routes return. A segment that arrives before its session does would be reset.
"""

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab.node import Attached, Node
from tests.lab.pair import Pair
from tests.lab.process import LabError, wait_for

READY_S = "180"


@dataclass
class Restart:
    """What one restart took, in seconds from the withdrawal of the routes, and what came back."""

    ended: float = 0.0  # the old DPVS
    up: float = 0.0  # the new one has its services
    ready: float = 0.0  # and its sessions: routes return
    restored: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"DPVS ended after {self.ended:.2f} s, the new one had its services after {self.up:.2f} s",
            f"{self.restored.get('in_dpvs', 0)} of {self.restored.get('sessions', 0)} sessions were back and the routes"
            f" returned after {self.ready:.2f} s",
        ]


def stores(node: Node) -> Path:
    """The file that a node's sessions are kept in."""
    return node.directory / "own.store"


def attach(node: Node, *options: str) -> Attached:
    """dpvs-probe with a store."""
    return node.probe("--store", str(stores(node)), *options)


def stored(node: Node) -> int:
    """How many sessions are in the store, as the attach says; -1 while it is not whole."""
    said = node.attached[-1].status()["store"]
    return int(said["sessions"]) if said.get("whole") and not said["behind"] else -1


def restart(
    pair: Pair, name: str = "a", *, how: int = signal.SIGTERM, crash: bool = False, options: tuple[str, ...] = ()
) -> Restart:
    """Stop the DPVS of a node by a signal, start another, attach as before; ``crash``: dpvs-probe is killed as well."""
    node = pair.nodes[name]
    done, began = Restart(), time.monotonic()
    pair.network.gate(is_open=False)
    assert node.process is not None
    old = node.attached[-1]
    if crash:
        old.process.kill()
    node.process.signal(how)
    node.process.wait(20)
    if old.process.wait(20) != 3 and not crash:
        raise LabError(f"the attach ended with {old.process.status}: {old.process.tail()}")
    done.ended = time.monotonic() - began
    pair.start(name)
    done.up = time.monotonic() - began
    new = attach(node, *options)
    ready = node.command("ready", "--wait", READY_S)
    if ready.returncode != 0:
        raise LabError(f"{ready.stdout}{ready.stderr}{new.process.tail()}")
    done.ready = time.monotonic() - began
    pair.network.gate(is_open=True)
    done.restored = (new.status()["store"].get("restored") or [{}])[0]
    return done


def wait_until_stored(node: Node, count: int, timeout: float = 20) -> None:
    """All sessions are in the store."""
    wait_for(f"{count} sessions are stored", lambda: stored(node) >= count, timeout)
