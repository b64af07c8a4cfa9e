# SPDX-License-Identifier: GPL-2.0-or-later
"""Members from a real etcd and a real DNS server: nodes find each other, share sessions, and nothing flaps."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from collector.record import digest, pick
from replicator.discovery import gateway, srv
from replicator.discovery.access import Access
from replicator.discovery.etcd import EtcdSource
from replicator.discovery.source import EtcdPlace, Myself, Place, SourceFailed, SrvPlace, parse
from replicator.placement import Placement
from replicator.transport.address import Address
from tests.lab.certificates import Authority
from tests.lab.net import inside
from tests.lab.pair import Pair
from tests.lab.process import wait_for
from tests.lab.servers import LOCALHOST, Dns, Etcd, free_port
from tests.unit.simulated_node import LiveDpvs, SimulatedNode, until

SLOTS = 1024
CONNECTIONS = 30
PREFIX = "/test/"

pytestmark = [pytest.mark.needs("members")]


class Cluster:
    """Node a has sessions, each of which one of the others holds."""

    def __init__(self, directory: Path, stack: AsyncExitStack, place: Place) -> None:
        self._directory, self._stack, self._place = directory, stack, place
        self.nodes: dict[str, SimulatedNode] = {}
        self.ports: dict[str, int] = {}

    async def start(self, name: str, *, share: int | None = None) -> SimulatedNode:
        dpvs = LiveDpvs(SLOTS)
        if name == "a":
            for slot in range(500):
                dpvs.create(slot, slot)
        self.ports.setdefault(name, free_port())
        node = SimulatedNode(name, self._directory, slots=SLOTS, dpvs=dpvs, share=share, port=self.ports[name],
                             places=(self._place,))  # fmt: skip
        self.nodes[name] = await self._stack.enter_async_context(node)
        return node

    def row(self, of: str, to: str) -> dict[str, Any] | None:
        """What node ``of`` says of its link to node ``to``."""
        rows = self.nodes[of].links.peers(0, injecting=False)
        where = f"{LOCALHOST}:{self.ports[to]}", f"localhost:{self.ports[to]}"
        return next((row for row in rows if row["direction"] == "to" and row["address"] in where), None)

    def shared_among(self, *names: str) -> bool:
        """These hold the sessions of a, each its share and no other."""
        a = self.nodes["a"]
        rows = {name: self.row("a", name) for name in names}
        if None in rows.values() or a.membership is None or len(a.membership.members) != len(names):
            return False
        keys = {name: str(row["address"]) for name, row in rows.items() if row is not None}
        placement = Placement(keys.values(), 1)
        sessions = pick(a.table.records, a.table.shared)
        for name, key in keys.items():
            replica = self.nodes[name].replica_of("a")
            if replica is None or not replica.synced:
                return False
            if replica.digest() != digest(pick(sessions, placement.held_by(key, sessions))):
                return False
        return a.table.digest() == a.truth()

    def dials(self) -> dict[tuple[str, str], int]:
        """How often each link was made: nothing flapped where that stays."""
        found = {}
        for of, node in self.nodes.items():
            for row in node.links.peers(0, injecting=False):
                if row["direction"] == "to" and row["state"] != "down":
                    found[of, row["address"]] = row["link"]["connections"]
        return found


@asynccontextmanager
async def cluster(directory: Path, place: Place) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        yield Cluster(directory, stack, place)


def test_nodes_meet_in_etcd(tmp_path: Path) -> None:
    async def story(etcd: Etcd) -> None:
        at = Address(LOCALHOST, etcd.port)
        async with cluster(tmp_path, EtcdPlace((at,), PREFIX)) as here:
            a = await here.start("a", share=1)
            b = await here.start("b")
            await until(lambda: here.shared_among("b"))  # both ways found, sessions there
            await until(lambda: here.row("b", "a") is not None)
            row = here.row("a", "b")
            assert row is not None
            assert row["source"] == "etcd /test/"
            await here.start("c")
            await until(lambda: here.shared_among("b", "c"))  # each session at one of the two, by the ring
            await until(lambda: len(here.dials()) == 6)  # everyone to everyone
            before = here.dials()

            # The key of a node that works is taken away: it is put again, and no link notices.
            await gateway.call(at, "/v3/kv/deleterange", {"key": gateway.encoded(f"{PREFIX}b")})
            async with asyncio.timeout(60):
                while not (await gateway.call(at, "/v3/kv/range", {"key": gateway.encoded(f"{PREFIX}b")})).get("kvs"):
                    await asyncio.sleep(0.01)
            # Nonsense and strangers' keys are passed over.
            for key, value in (("x", "{"), ("y", json.dumps({"address": "nowhere"})), ("z", json.dumps(7))):
                put = {"key": gateway.encoded(PREFIX + key), "value": gateway.encoded(value)}
                await gateway.call(at, "/v3/kv/put", put)

            # Somebody who registered and died: it moves no session, and goes with its lease.
            assert a.membership is not None
            assert a.sharing is not None
            lease = (await gateway.call(at, "/v3/lease/grant", {"TTL": "10"}))["ID"]
            value = gateway.encoded(json.dumps({"address": f"{LOCALHOST}:{free_port()}"}))
            ghost = {"key": gateway.encoded(f"{PREFIX}ghost"), "value": value, "lease": lease}
            await gateway.call(at, "/v3/kv/put", ghost)
            await until(lambda: a.membership is not None and len(a.membership.members) == 3)
            assert len(a.sharing.members) == 2
            await until(lambda: here.shared_among("b", "c"), 10)

            # etcd dies: what is known stays, sessions go on being replicated.
            etcd.kill()
            report = a.membership.report
            await until(lambda: report(0)["sources"]["etcd /test/"]["trouble"])
            for slot in range(600, 700):
                a.dpvs.create(slot, slot)
            await until(lambda: len(a.table) == 600 and here.shared_among("b", "c"))
            # ... and back, with what it knew.
            lists = report(0)["sources"]["etcd /test/"]["lists"]
            await asyncio.to_thread(etcd.start)
            await until(lambda: report(0)["sources"]["etcd /test/"]["lists"] > lists, 15)
            assert here.dials() == before
            assert here.shared_among("b", "c")
            assert a.membership.left == 1  # the ghost

            # A node that leaves gives its share back to those that stay.
            await b.die()
            await until(lambda: here.shared_among("c"), 10)
            assert a.membership.left == 2
            # And it may return.
            await here.start("b")
            await until(lambda: here.shared_among("b", "c"), 10)

    with Etcd(tmp_path / "etcd") as etcd:
        asyncio.run(story(etcd))


def test_nodes_meet_in_dns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_dpvs-probe._tcp.lb.test"
    monkeypatch.setattr(srv, "OFTEN_S", 0.2)
    monkeypatch.setattr(srv, "RETRY_S", 0.2)
    monkeypatch.setattr(srv, "ANSWER_S", 0.5)

    async def story(dns: Dns) -> None:
        async with cluster(tmp_path, SrvPlace(name, Address(LOCALHOST, dns.port))) as here:
            a, b = await here.start("a", share=1), await here.start("b")
            assert a.membership is not None
            report = a.membership.report
            await until(lambda: report(0)["sources"][f"dns+srv {name}"]["trouble"])  # there is no server yet
            dns.serve([here.ports["a"], here.ports["b"]])
            await until(lambda: here.shared_among("b"))  # and a did not take itself for a peer
            row = here.row("a", "b")
            assert row is not None
            assert row["source"] == f"dns+srv {name}"
            before = here.dials()
            failures = report(0)["sources"][f"dns+srv {name}"]["failures"]
            dns.serve([])  # the name does not exist: nobody believes it
            await until(lambda: report(0)["sources"][f"dns+srv {name}"]["failures"] > failures + 1)
            assert here.shared_among("b")
            await here.start("c")
            dns.serve([here.ports["a"], here.ports["c"]])  # c comes, b is forgotten but works
            await until(lambda: here.shared_among("b", "c"))
            assert a.membership.source_of(row["address"]) == f"dns+srv {name}, no longer listed"
            assert before.items() <= here.dials().items()
            await b.die()
            await until(lambda: here.shared_among("c"), 10)
            assert a.membership.left == 1

    with Dns(tmp_path / "dns", name) as dns:
        asyncio.run(story(dns))


@pytest.mark.needs("bpf", "twin", "agent")
def test_the_command_finds_its_peer(pair: Pair, tmp_path: Path) -> None:
    steady = pair.steady(CONNECTIONS)
    host = pair.sync_address("b").rpartition(":")[0]
    with inside(pair.network.path("b")), Etcd(tmp_path, host) as etcd:
        extra = ("--peers-from", f"etcd://{host}:{etcd.port}/lb")
        pair.b.probe("--listen", pair.sync_address("b"), *extra)
        refused = pair.a.command("attach", "--pid", str(pair.a.pid), "--insecure", "--listen", "*:7700", *extra)
        assert refused.returncode == 1
        assert "--advertise HOST:PORT" in refused.stderr
        probe = pair.a.probe("--listen", pair.sync_address("a"), *extra)
        wait_for("b has them", lambda: len(pair.b.sessions()) == CONNECTIONS, 20)

        def link() -> dict[str, Any]:
            (row,) = [row for row in probe.peers() if row["direction"] == "to"]
            return row

        wait_for("the link is live", lambda: link()["state"] == "live", 20)
        assert (link()["node"], link()["source"]) == ("b", "etcd /lb/")
        listing = pair.a.command("peers", check=True).stdout
        assert "SOURCE" in listing
        assert "etcd /lb/" in listing
        status = json.loads(pair.a.command("status", "--json", check=True).stdout)
        assert status["membership"]["sources"]["etcd /lb/"]["listed"] == 1
        pair.kill("a")
        pair.active("b")
        assert steady.finish()["alive"] == CONNECTIONS


def test_an_etcd_with_tls_and_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "ANSWER_S", 20.0)  # etcd makes a password's hash slow on purpose
    authority = Authority(tmp_path / "certificates")
    certificate, key = authority.sign("lb")
    password = tmp_path / "password"
    password.write_text("s3cret\n")
    password.chmod(0o600)
    query = f"ca={authority.file}&cert={certificate}&key={key}"

    async def story(etcd: Etcd) -> None:
        at = Address(LOCALHOST, etcd.port)
        way = gateway.Way(Access(True, str(authority.file), str(certificate), str(key)).context())

        async def tell(path: str, **body: Any) -> None:
            await gateway.call(at, path, body, way)

        place = parse(f"etcd+tls://{at}{PREFIX}?{query}&user=lb&password_file={password}")
        assert isinstance(place, EtcdPlace)
        for user, role in (("root", "root"), ("lb", "lb")):
            await tell("/v3/auth/user/add", name=user, password="s3cret")
            await tell("/v3/auth/role/add", name=role)
            await tell("/v3/auth/user/grant", user=user, role=role)
        edges = {"key": gateway.encoded(PREFIX), "range_end": gateway.encoded(gateway.after(PREFIX))}
        await tell("/v3/auth/role/grant", name="lb", perm={"permType": "READWRITE", **edges})
        await tell("/v3/auth/enable")
        with pytest.raises(
            SourceFailed, match=r"user name is empty|permission denied"
        ):  # who does not log in is told nothing
            await tell("/v3/kv/range", key=gateway.encoded(PREFIX))

        async with cluster(tmp_path, place) as here:
            a = await here.start("a", share=1)
            await here.start("b")
            await until(lambda: here.shared_among("b"), 15)
            await until(lambda: len(here.dials()) == 2)  # both ways
            before = here.dials()
            # etcd forgets who was logged in when it is started anew: they log in again, and no link notices.
            etcd.kill()
            assert a.membership is not None
            report = a.membership.report
            lists = report(0)["sources"]["etcd /test/"]["lists"]
            await asyncio.to_thread(etcd.start)
            await until(lambda: report(0)["sources"]["etcd /test/"]["lists"] > lists, 20)
            assert here.dials() == before
            assert here.shared_among("b")

        wrong = tmp_path / "wrong"
        wrong.write_text("guess\n")
        wrong.chmod(0o600)
        for text, why in (
            (f"etcd+tls://{at}{PREFIX}?{query}&user=lb&password_file={wrong}", "authentication failed"),
            (f"etcd+tls://{at}{PREFIX}?ca={authority.file}", "etcd at"),  # no certificate of ours
            (f"etcd+tls://{at}{PREFIX}", "no TLS with it: (unable|self.signed)"),
            (f"etcd://{at}{PREFIX}", "etcd at|400"),  # not encrypted
        ):
            place = parse(text)
            assert isinstance(place, EtcdPlace)
            source = EtcdSource(place, Myself("x", None, None))
            said: list[str] = []
            serving = asyncio.create_task(source.run(lambda _: None, said.append))
            await until(lambda said=said: bool(said), 10)  # type: ignore[misc]
            serving.cancel()
            assert re.search(why, said[0]), (text, said)
            assert "s3cret" not in said[0]

    with Etcd(tmp_path / "etcd", files=(authority.file, *authority.sign("server"))) as etcd:
        asyncio.run(story(etcd))
