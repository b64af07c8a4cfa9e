# SPDX-License-Identifier: GPL-2.0-or-later
"""A real keepalived on each node of a pair: who has the virtual address on the sync link has the routes.

The configuration is that of ``docs/examples/keepalived``, with the laboratory's addresses in it. What routers do
elsewhere, the notify script does here: it moves the routes of the client and the server, after ``dpvs-probe notify``
has returned.
"""

import re
import subprocess

from tests.available import ROOT
from tests.lab.node import COMMAND, Node
from tests.lab.pair import Pair
from tests.lab.process import Process

EXAMPLE = ROOT / "docs" / "examples" / "keepalived" / "keepalived.conf"
KEEPALIVED = "/usr/sbin/keepalived"
VIRTUAL = 100  # last byte of the address that moves
NOTIFY = """\
#!/bin/sh
export DPVS_PROBE_RUNDIR={run_dir}
{command} notify "$@" >>{log} 2>&1
if [ "$3" = MASTER ]; then
    ip -n {client} route replace {vips} via {address}
    ip -n {server} route replace {locals} via {address}
    echo "routes to {name}" >>{log}
fi
"""


class Keepalived:
    """keepalived on one node."""

    def __init__(self, pair: Pair, node: Node, priority: int) -> None:
        plan, network, other = pair.plan, pair.network, "b" if node.name == "a" else "a"
        self.node, self.pair = node, pair
        self.address = plan.at(8, VIRTUAL)
        self.log = node.directory / "notify.log"
        script = node.directory / "dpvs-notify"
        script.write_text(
            NOTIFY.format(
                run_dir=node.run_directory, command=COMMAND, log=self.log, name=node.name,
                client=network.name("client"), server=network.name("server"),
                vips=f"{plan.at(1, 0)}/24", locals=f"{plan.at(2, 0)}/24", address=plan.node(node.name),
            )
        )  # fmt: skip
        script.chmod(0o700)
        ready = node.directory / "dpvs-ready"
        ready.write_text(f"#!/bin/sh\nexec env DPVS_PROBE_RUNDIR={node.run_directory} {COMMAND} ready\n")
        ready.chmod(0o700)
        text = EXAMPLE.read_text()
        for old, new in (
            ("/usr/bin/dpvs-probe ready", str(ready)),
            ("/etc/keepalived/dpvs-notify", str(script)),
            ("interface eth1", "interface s0"),
            ("priority 100", f"priority {priority}"),
        ):
            if text.count(old) != 1:
                raise AssertionError(f"{EXAMPLE} has {text.count(old)} times {old!r}")
            text = text.replace(old, new)
        addresses = {"1": plan.sync(node.name), "2": plan.sync(other), str(VIRTUAL): self.address}
        text = re.sub(r"\b10\.0\.8\.(\d+)\b", lambda found: addresses[found[1]], text)
        self.conf = node.directory / "keepalived.conf"
        self.conf.write_text(text)
        self.process: Process | None = None

    def check(self) -> tuple[int, str]:
        """What keepalived itself says of the configuration: exit status, and complaints."""
        done = subprocess.run(
            [KEEPALIVED, "--config-test", "-f", str(self.conf)],
            capture_output=True, text=True, timeout=120, check=False,
            preexec_fn=self.pair.network.enter_in_child(self.node.name),
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def start(self) -> None:
        """In the node's namespace; it ends with the pair at the latest."""
        self.process = self.pair.spawn(
            self.node.name, f"keepalived-{self.node.name}", KEEPALIVED, "--vrrp", "-n", "-l", "-D",
            "-f", self.conf, "-p", self.node.directory / "keepalived.pid", "-r", self.node.directory / "vrrp.pid",
        )  # fmt: skip

    def has_address(self) -> bool:
        """Whether the virtual address is on this node."""
        with self.pair.network.netlink(self.node.name) as handle:
            return any(dict(row["attrs"]).get("IFA_ADDRESS") == self.address for row in handle.get_addr())

    def said(self) -> str:
        """What its notify script printed."""
        return self.log.read_text() if self.log.exists() else ""
