# SPDX-License-Identifier: GPL-2.0-or-later
"""How a pair keeps sessions: many are made on node a, node a is killed, and each is looked for on node b."""

import json
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.available import ROOT
from tests.lab.net import inside
from tests.lab.pair import Pair
from tests.lab.process import LabError, wait_for

CHECK = ROOT / "scripts" / "check_session_loss.py"
FIRST_PORT, LAST_PORT = 10_000, 65_000
BURST, BREAK_S = 50, 0.005


@dataclass
class Outcome:
    """Of one such test. Times in seconds, from the first session on."""

    asked: int
    made: int = 0
    made_s: float = 0.0
    told_s: float = 0.0  # until all were in b's table
    put_in_s: float = 0.0  # until all were in b's DPVS
    digest: str = ""  # of a's table and of b's copy, which were equal
    loss: dict[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Nothing was lost."""
        return self.made == self.asked and self.loss.get("lost") == 0 and self.loss.get("kept") == self.asked


def create(pair: Pair, count: int) -> None:
    """``count`` UDP flows through the node that has the routes, one datagram each; what is lost is sent again."""
    if count > LAST_PORT - FIRST_PORT:
        raise LabError(f"at most {LAST_PORT - FIRST_PORT} sessions: a client address has no more ports")
    with inside(pair.network.path("client")):
        for turn in range(3):
            for number in range(count):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flow:
                    flow.bind((pair.plan.client, FIRST_PORT + number))
                    flow.sendto(b"flow", (pair.plan.vip, 53))
                if number % BURST == BURST - 1:
                    time.sleep(BREAK_S)
            try:
                wait_for("all flows are sessions", lambda: own(pair, "a") >= count, 5)
                return
            except LabError:
                if turn == 2:
                    raise


def own(pair: Pair, name: str) -> int:
    """Sessions of a node, as its dpvs-probe says."""
    return int(pair.nodes[name].attached[-1].status()["sessions"]["own"])


def of_a(pair: Pair) -> int:
    """Copies of a's sessions in b's table."""
    return int(pair.b.attached[-1].status()["sessions"]["of_peers"].get("a", 0))


def source(pair: Pair, name: str, node: str = "own") -> str:
    """An attach, as ``dpvs-probe diff`` names it."""
    return f"{pair.nodes[name].run_directory}/{pair.nodes[name].pid}.sock@{node}"


def fail_over(pair: Pair, count: int) -> Outcome:
    """The whole test; the pair is attached to, a sends to b."""
    done, began = Outcome(count), time.monotonic()
    create(pair, count)
    done.made, done.made_s = own(pair, "a"), time.monotonic() - began
    wait_for("all are in b's table", lambda: of_a(pair) >= count, 30)
    done.told_s = time.monotonic() - began
    compared = pair.a.command("diff", "--json", source(pair, "a"), source(pair, "b", "a"))
    if compared.returncode != 0:
        raise LabError(f"the tables differ: {compared.stdout}{compared.stderr}")
    done.digest = str(json.loads(compared.stdout)["digest"])
    wait_for("all are in b's DPVS", lambda: len(pair.b.sessions()) >= count, 60)
    done.put_in_s = time.monotonic() - began
    before = pair.directory / "before"
    with before.open("w") as file:
        exported = pair.a.command("diff", "--export", source(pair, "a"))
        if exported.returncode != 0:
            raise LabError(exported.stderr)
        file.write(exported.stdout)
    pair.kill("a")
    pair.active("b")
    done.loss = check(pair, before)
    return done


def check(pair: Pair, before: Path) -> dict[str, Any]:
    """What scripts/check_session_loss says of b's DPVS."""
    said = subprocess.run(
        [sys.executable, CHECK, "--json", str(before), f"dpvs:{pair.b.pid}"],
        capture_output=True, text=True, check=False,
        preexec_fn=pair.network.enter_in_child("b"),
    )  # fmt: skip
    if said.returncode not in (0, 1):
        raise LabError(said.stderr)
    answer: dict[str, Any] = json.loads(said.stdout)
    return answer
