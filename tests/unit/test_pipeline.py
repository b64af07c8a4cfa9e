# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated DPVS, collector, link and replica in one: whatever happened, the peer ends up with what DPVS holds."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from collector import record
from collector.collector import Collector, Settings
from collector.table import SessionTable
from replicator.link import LinkSettings, Receiver, Sender
from replicator.replica import Replicas
from replicator.wire import Hello, Role
from tests.unit.simulated_dpvs import MODES, WORKERS, SimulatedDpvs

N = 10
SLOTS = st.integers(0, N - 1)


class Pipeline(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.dpvs = SimulatedDpvs(N)
        self.b = Replicas(Hello("b", 1, Role.RECEIVER))
        self.runs = 0
        self.attach()

    def attach(self) -> None:
        """A new run of dpvs-probe at node a, on the same DPVS."""
        self.runs += 1
        self.table = SessionTable(N)
        rates = Settings(slice_slots=4, young_each_tick=3, drain_events=6)
        self.collector = Collector(
            self.dpvs, self.dpvs, self.table, modes=MODES, workers=WORKERS, lost=self.dpvs.lost, settings=rates
        )
        limits = LinkSettings(body_bytes=400, window_bytes=1500)
        self.sender = Sender(self.table, self.table.add_peer("b"), Hello("a", self.runs, slots=N), limits)
        self.receiver: Receiver | None = None
        self.down, self.up = b"", b""

    def _hashed(self, slot: int) -> bool:
        return bool(self.dpvs.conns["flags"][slot] & record.HASHED)

    @rule(slot=SLOTS, client=st.integers(0, 3), flags=st.sampled_from([0, 0, record.INJECTED, record.TEMPLATE]))
    def create(self, slot: int, client: int, flags: int) -> None:
        if not self._hashed(slot):
            self.dpvs.create(slot, client, flags=flags)

    @rule(slot=SLOTS)
    def free(self, slot: int) -> None:
        if self._hashed(slot):
            self.dpvs.free(slot)

    @rule(slot=SLOTS, state=st.integers(0, 10), delta=st.integers(0, 2))
    def packets(self, slot: int, state: int, delta: int) -> None:
        self.dpvs.conns["state"][slot] = state
        self.dpvs.conns["fnat_seq_delta"][slot] = delta
        self.dpvs.packet(slot)

    @rule(slot=SLOTS)
    def tear(self, slot: int) -> None:
        self.dpvs.torn.add(slot)

    @rule(losing=st.booleans())
    def lose_events(self, losing: bool) -> None:
        self.dpvs.losing = losing

    @rule(take=st.integers(1, 500))
    def work(self, take: int) -> None:
        """One round of node a, and some of the bytes that are on the way."""
        now = self.dpvs.clock(5_000_000)
        self.collector.tick(now)
        self.collector.scan(now)
        if self.receiver is None:
            return
        self.down += b"".join(bytes(f) for f in self.sender.outgoing(now))
        self.receiver.receive(self.down[:take], now)
        self.down = self.down[take:]
        self.up += b"".join(bytes(f) for f in self.receiver.outgoing(now))
        self.sender.receive(self.up[:take], now)
        self.up = self.up[take:]

    @rule()
    def connect(self) -> None:
        self.cut()
        self.sender.connected(self.dpvs.now_ns)
        self.receiver = Receiver(self.b, now_ns=self.dpvs.now_ns)

    @rule()
    def cut(self) -> None:
        self.sender.disconnected(self.dpvs.now_ns)
        if self.receiver is not None:
            self.receiver.disconnected(self.dpvs.now_ns)
        self.receiver, self.down, self.up = None, b"", b""

    @rule()
    def restart(self) -> None:
        self.cut()
        self.attach()

    @rule()
    def quiet(self) -> None:
        if self.receiver is None or self.sender.closed or self.receiver.closed:
            self.connect()
        self.dpvs.torn.clear()
        for _ in range(70):
            self.work(1 << 20)
        replica = self.b.get(self.sender.me.node_id)
        assert replica is not None
        wanted = self.dpvs.expected()
        wanted = wanted[record.replicable(wanted)]
        held = replica.sessions()
        assert held["slot"].tolist() == wanted["slot"].tolist()
        assert not record.changed(held, wanted).any()
        assert held.tobytes() == record.pick(self.table.records, self.table.shared).tobytes()
        assert replica.digest() == self.table.digest()
        assert replica.link_up
        assert list(self.b) == [replica]

    def teardown(self) -> None:
        self.quiet()


Pipeline.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPipeline = Pipeline.TestCase
