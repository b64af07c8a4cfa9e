# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes joined by links without sockets: two engines a link, wires that a test holds, cuts and disturbs, and crashes.

``Cluster`` knows what is true (each node's DPVS, everything a table ever said) and looks after each step whether what
the peers hold follows from it; ``quiet`` heals everything, lets time pass, and looks whether they hold exactly it.

Rules, checked while anything happens:
- A frame says what the table says at the moment it is made.
- A replica holds only what its origin's table said in that run, word for word; what it holds of a slot never goes back,
  to an earlier generation or to an earlier state, nor does an ended generation come again.
- A session that the origin has and a replica holds stays there, as long as the link is up or the timeout not passed.
- An earlier run never takes the place of a later one.
- Marks, frames in flight and what waits for the injector are bounded; counters do not fall.

A step is a name and a number that all choices of the step are drawn from. So any part of a history is a history.
"""

import random
from collections import deque
from collections.abc import Callable
from functools import cache

import numpy as np

from collector import record
from collector.record import RECORD, Bools, Records, pick
from collector.table import SessionTable
from replicator import codec, placement
from replicator.link import LinkSettings, Receiver, Sender, State
from replicator.placement import Placement
from replicator.replica import Replicas
from replicator.sharing import Sharing
from replicator.wire import Hello, Opcode, Role
from tests.unit.cluster_rules import Ledger, Watch, check_marks, demand
from tests.unit.session_records import sessions

MS, SECOND = 1_000_000, 1_000_000_000
SLOTS = (10, 14, 7)
CLIENTS = 24  # tuples that sessions are made of
EOF = b""
ROOM_BYTES = 1500  # a wire that stands still takes that much
LOST_NS = 3 * SECOND  # a transport that gets rid of nothing for so long gives up
ALL = 1 << 30
AGE_S = 91  # longer than any session's timeout

placement._ring = cache(placement._ring)  # to make one takes milliseconds; three peers have seven
_POOL = sessions(CLIENTS)
_POOL[::4] = sessions(CLIENTS, ipv6=True)[::4]
_POOL["timeout_ms"] = np.arange(CLIENTS) % 3 * 30_000 + 5_000


@cache
def _placed(members: frozenset[str], replicas: int) -> Placement:
    return Placement(members, replicas)


class Connection:
    """Two streams of frames on their way, a receiver at the far end; either end may be gone without the other."""

    def __init__(self, receiver: Receiver, began: int, now_ns: int) -> None:
        self.receiver = receiver
        self.began = began
        self.moved_ns = now_ns
        self.down: deque[bytes] = deque()  # to the receiver
        self.up: deque[bytes] = deque()
        self.past: deque[bytes] = deque(maxlen=6)  # frames that have gone down
        self.started = {"down": 0, "up": 0}  # bytes of the first frame that have arrived
        self.near = self.far = True  # whose ends are there
        self.stalled = False

    @property
    def blocked(self) -> bool:
        """It takes nothing from the sender."""
        return self.stalled and sum(map(len, self.down)) > ROOM_BYTES


class Link:
    """From one node to another: one sender for ever, the connections it had."""

    def __init__(self, origin: "Node", peer: "Node") -> None:
        self.origin, self.peer = origin, peer
        self.connections: list[Connection] = []
        self.renew()

    def renew(self) -> None:
        """The origin begins a new run."""
        origin = self.origin
        self.since_ns = 0
        self.dirty = origin.table.add_peer(self.peer.name)
        self.sender = Sender(origin.table, self.dirty, origin.hello, origin.settings)
        self.ledger = Ledger(origin.table.slots)
        self.counters = dict(self.sender.counters)

    @property
    def current(self) -> Connection | None:
        """The one that the sender is at."""
        return self.connections[-1] if self.connections and self.connections[-1].near else None

    @property
    def address(self) -> str:
        return self.peer.name

    def down_ns(self, now_ns: int) -> int | None:
        return now_ns - self.since_ns if self.current is None or self.sender.peer is None else None

    def wanted(self) -> Bools:
        """Which slots hold a session that the peer has to have."""
        table, sharing = self.origin.table, self.origin.sharing
        if sharing is None:
            return table.shared
        placed = _placed(frozenset({*sharing.members, self.address}), sharing.replicas)
        return table.shared & placed.held_by(self.address, table.records)

    def check(self) -> None:
        """What need not be looked at in each step."""
        sender, settings = self.sender, self.sender.settings
        demand(all(sender.counters[n] >= c for n, c in self.counters.items()), "a counter of a sender fell")
        self.counters = dict(sender.counters)
        check_marks(self.dirty)
        demand(sender.in_flight <= settings.window_frames + 12, f"{sender.in_flight} frames in flight")
        most = settings.window_bytes + settings.body_bytes + 1000
        demand(sender._flight_bytes <= most, f"{sender._flight_bytes} bytes in flight")


class Node:
    """One node: its DPVS, the table that follows it, its replicas of the others. The links belong to the cluster."""

    def __init__(self, name: str, settings: LinkSettings) -> None:
        self.name, self.settings = name, settings
        self.epoch = self.last_epoch = self.instance = 0
        self.up = False
        self.loses_events = False
        self.sharing: Sharing | None = None
        self.watches: dict[int, Watch] = {}
        self.newest: dict[int, int] = {}  # run of each origin that counts
        self.boot(SLOTS[0])

    def boot(self, slots: int) -> None:
        """A new DPVS process."""
        self.instance += 1
        self.rows: Records = np.zeros(slots, RECORD)
        self.live: Bools = np.zeros(slots, np.bool_)

    def start(self, epoch: int) -> None:
        """A new run of dpvs-probe."""
        self.up, self.epoch = True, epoch
        self.last_epoch = max(self.last_epoch, epoch)
        slots = len(self.rows)
        self.table = SessionTable(slots)
        self.loses_events = False
        self.hello = Hello(self.name, epoch, Role.SENDER, slots, instance=self.instance)
        self.replicas = Replicas(Hello(self.name, epoch, Role.RECEIVER, instance=self.instance))
        self.watches.clear()
        self.newest.clear()

    def put(self, slot: int, row: Records, now_ns: int, *, renewed: bool = False) -> None:
        """A session in a slot of the DPVS, where it ends wherever else its tuple stood."""
        same = np.flatnonzero(self.live & (record.identity(self.rows) == record.identity(row)))
        for other in same.tolist():
            if other != slot:
                self.end([other], now_ns)
        self.rows[slot : slot + 1] = row
        self.live[slot] = True
        self._look(np.array([slot]), now_ns, renewed=renewed)

    def end(self, slots: list[int], now_ns: int) -> None:
        self.live[slots] = False
        self._look(np.array(slots, np.int64), now_ns)

    def scan(self, now_ns: int) -> None:
        """The collector has seen all of the pool."""
        self.loses_events = False
        self._look(np.arange(len(self.rows)), now_ns)
        self.table.complete = True

    def _look(self, slots: "np.ndarray[tuple[int], np.dtype[np.int64]]", now_ns: int, *, renewed: bool = False) -> None:
        if self.up and not self.loses_events and len(slots):
            again = np.full(len(slots), renewed)
            self.table.apply(slots, pick(self.rows, slots), self.live[slots], now_ns, renewed=again)


class Cluster:
    """Nodes that all replicate to each other: all their sessions, or each to ``replicas`` peers."""

    def __init__(self, count: int, seed: int = 0, replicas: int | None = None) -> None:
        rng = random.Random(seed)
        self.now_ns = 1000 * SECOND
        self.steps = self._serial = 0
        self._epochs, self._backs = 1000, 0
        self.nodes = [Node(name, _settings(rng)) for name in "abc"[:count]]
        self._replicas = replicas
        self._ledgers: dict[tuple[str, str, int], Ledger] = {}
        for node in self.nodes:
            node.start(self._next_epoch())
            node.table.complete = rng.random() < 0.5
        self.links = [Link(a, b) for a in self.nodes for b in self.nodes if a is not b]
        for node in self.nodes:
            self._share(node)
        self._write()

    def step(self, name: str, seed: int) -> None:
        """Do one thing, and see that the rules hold."""
        self.steps += 1
        STEPS[name](self, random.Random(seed))
        if self.steps % 8 == 0:
            self.check()

    # --- what may happen: sessions -----------------------------------------------------------------------------------

    def sessions_come(self, rng: random.Random) -> None:
        """New ones, or other states of those that are there."""
        self._sessions_come(rng.choice(self.nodes), rng)

    def _sessions_come(self, node: Node, rng: random.Random) -> None:
        for _ in range(rng.choice((1, 1, 3, 8))):
            slot = rng.randrange(len(node.rows))
            row = pick(node.rows, np.array([slot])) if node.live[slot] and rng.random() < 0.5 else _new_row(rng)
            self._serial += 1  # no state of a session comes twice, or the rules could not tell which one it is
            row["fnat_delta"] = self._serial
            row["state"] = rng.randrange(1, 8)
            node.put(slot, row, self.now_ns)
        self._write(node)

    def sessions_end(self, rng: random.Random) -> None:
        node = rng.choice(self.nodes)
        slots = [slot for slot in np.flatnonzero(node.live).tolist() if rng.random() < 0.4]
        node.end(list(range(len(node.rows))) if rng.random() < 0.05 else slots, self.now_ns)
        self._write(node)

    def a_slot_is_used_again(self, rng: random.Random) -> None:
        """At once, by the same tuple or another."""
        node = rng.choice(self.nodes)
        slots = np.flatnonzero(node.live).tolist()
        if slots:
            slot = rng.choice(slots)
            row = pick(node.rows, np.array([slot])) if rng.random() < 0.5 else _new_row(rng)
            node.put(slot, row, self.now_ns, renewed=True)
            self._write(node)

    def a_tuple_moves(self, rng: random.Random) -> None:
        """A session ends and one of the same tuple begins in another slot."""
        node = rng.choice(self.nodes)
        slots = np.flatnonzero(node.live).tolist()
        if slots:
            row = pick(node.rows, np.array([rng.choice(slots)]))
            node.put(rng.randrange(len(node.rows)), row, self.now_ns)
            self._write(node)

    def events_are_lost(self, rng: random.Random) -> None:
        rng.choice(self.nodes).loses_events = True

    def scan(self, rng: random.Random) -> None:
        node = rng.choice(self.nodes)
        if node.up:
            node.scan(self.now_ns)
            self._write(node)

    # --- links -------------------------------------------------------------------------------------------------------

    def dial(self, rng: random.Random) -> None:
        """Perhaps while another connection is there, and busy."""
        link = rng.choice(self.links)
        for connection in link.connections:
            self._pump_near(link, connection)
        self._dial(link)
        for connection in link.connections[-1:]:
            for _ in range(rng.randrange(3)):
                self._pump_near(link, connection)
                self._deliver(link, connection, "down")
                self._pump_far(connection)
                self._deliver(link, connection, "up")

    def cut(self, rng: random.Random) -> None:
        """Both ends, the sender's or the receiver's learn of it; what was on its way may arrive, or not."""
        connection, link = self._any_connection(rng)
        if connection is None:
            return
        for _ in range(rng.randrange(4)):
            self._exchange(link)
        if rng.random() < 0.7:  # in the middle of something
            self._pump_near(link, connection)
            self._deliver(link, connection, "down", rng.choice((100, ALL)))
            self._pump_far(connection)
        which = rng.choice(("both", "near", "far"))
        if which != "far":
            self._leave(link, connection, say=rng.random() < 0.3)
        if which != "near":
            self._leave_far(connection, say=rng.random() < 0.3)
        if which == "both":
            connection.down.clear()
            connection.up.clear()

    def stall(self, rng: random.Random) -> None:
        connection, _ = self._any_connection(rng)
        if connection is not None:
            connection.stalled = not connection.stalled

    def resync(self, rng: random.Random) -> None:
        link = rng.choice(self.links)
        if link.origin.up:
            link.sender.resync()

    def talk(self, rng: random.Random) -> None:
        """One end says what it has to say."""
        self._pass(rng.choice((0, 1, 20, 150)) * MS)
        link = rng.choice(self.links)
        for connection in link.connections:
            if rng.random() < 0.7:
                self._pump_near(link, connection)
            if rng.random() < 0.7:
                self._pump_far(connection)

    def some_bytes_arrive(self, rng: random.Random) -> None:
        connection, link = self._any_connection(rng)
        if connection is not None:
            self._deliver(link, connection, rng.choice(("down", "up")), rng.choice((1, 15, 17, 130, 400, ALL, ALL)))

    def exchange(self, rng: random.Random) -> None:
        """A link works for a moment, perhaps one that was thought gone."""
        link = rng.choice(self.links)
        if link.current is None and rng.random() < 0.7:
            self._dial(link)
        for _ in range(rng.choice((1, 2, 4))):
            if rng.random() < 0.4:
                self._sessions_come(link.origin, rng)
            self._pass(rng.choice((1, 20, 120)) * MS)
            self._exchange(link)

    def time_passes(self, rng: random.Random) -> None:
        """Everybody talks and nothing arrives; or we all sleep for very long."""
        if rng.random() < 0.3:
            self._pass(rng.choice((2, 10, 40, AGE_S)) * SECOND)
        else:
            for _ in range(rng.choice((2, 7, 8))):
                self._pass(SECOND // 2)
                for link in self.links:
                    for connection in link.connections:
                        self._pump_near(link, connection)
                        self._pump_far(connection)
        for node in self.nodes:
            self._tick(node)

    def frames_are_lost(self, rng: random.Random) -> None:
        self._disturb(rng, lambda frames, at: frames.pop(at))

    def a_frame_comes_twice(self, rng: random.Random) -> None:
        self._disturb(rng, lambda frames, at: frames.insert(rng.randint(at, len(frames)), frames[at]))

    def a_frame_comes_late(self, rng: random.Random) -> None:
        """One that has arrived long ago comes once more."""
        connection, _ = self._any_connection(rng)
        if connection is not None and connection.past and not connection.started["down"]:
            connection.down.appendleft(rng.choice(connection.past))

    def frames_change_places(self, rng: random.Random) -> None:
        self._disturb(rng, lambda frames, at: frames.insert(rng.randint(at, len(frames)), frames.pop(at)))

    # --- nodes -------------------------------------------------------------------------------------------------------

    def crash(self, rng: random.Random) -> None:
        """A node's dpvs-probe is gone, its DPVS perhaps with it; peers learn of it or not."""
        node = rng.choice(self.nodes)
        if not node.up:
            return
        node.up = False
        say = rng.random() < 0.5
        for link in self.links:
            for connection in link.connections:
                if link.origin is node and connection.near:
                    connection.near = False
                    if say:
                        connection.down.append(EOF)
                if link.peer is node and connection.far:
                    connection.far = False
                    if say:
                        connection.up.append(EOF)
        if rng.random() < 0.4:
            node.boot(rng.choice(SLOTS))
        if rng.random() < 0.6:
            self._start(node)

    def start(self, rng: random.Random) -> None:
        """A node that was gone comes back; perhaps its clock has gone back meanwhile."""
        for node in self.nodes:
            if not node.up:
                self._start(node, back=rng.random() < 0.3)

    def inject(self, rng: random.Random) -> None:
        for watch in rng.choice(self.nodes).watches.values():
            watch.inject(rng.choice((1, 5, 100)))

    # --- and after all of it -----------------------------------------------------------------------------------------

    def quiet(self) -> None:
        """Heal everything; then every replica is its origin's table, and there are no others."""
        for node in self.nodes:
            if not node.up or node.epoch < node.last_epoch:
                node.up = False
                for link in self.links:
                    for connection in link.connections:
                        if link.origin is node:
                            connection.near = False
                        if link.peer is node:
                            connection.far = False
                self._start(node)
            node.scan(self.now_ns)
            self._write(node)
        for link in self.links:
            for connection in link.connections:
                connection.stalled = False
        began = self.now_ns
        for _ in range(300):
            for link in self.links:
                if link.current is None:
                    self._dial(link)
                self._exchange(link)
            for node in self.nodes:
                self._tick(node)
            if self.now_ns > began + 4 * SECOND and self._calm():
                break
            self._pass(900 * MS if self._calm() else 50 * MS)
        else:
            demand(False, f"no quiet: {[link.sender.report() for link in self.links if not link.sender.settled]}")
        self.check()
        for link in self.links:
            self._check_equal(link)
        self._pass(AGE_S * SECOND)
        for node in self.nodes:
            self._tick(node)
            demand(len(list(node.replicas)) == len(self.nodes) - 1, "a replica of a run that is no more")

    def check(self) -> None:
        """What need not be looked at in each step."""
        for link in self.links:
            link.check()
        for node in self.nodes:
            for watch in node.watches.values():
                watch.check()

    def _calm(self) -> bool:
        return all(
            link.sender.settled and not any(connection.down or connection.up for connection in link.connections)
            for link in self.links
        )

    def _check_equal(self, link: Link) -> None:
        origin, what = link.origin, f"{link.origin.name} at {link.peer.name}"
        demand((origin.table.present == origin.live).all(), f"{origin.name}: the table is not the DPVS")
        demand(link.sender.state is State.LIVE, what)
        replica = link.peer.replicas.get(origin.hello.node_id)
        demand(replica is not None and replica.epoch == origin.epoch and replica.link_up, f"{what}: not in step")
        assert replica is not None
        wanted = origin.table.shared
        if self._replicas is not None:
            peers = [node.name for node in self.nodes if node is not origin]
            wanted = wanted & Placement(peers, self._replicas).held_by(link.peer.name, origin.table.records)
        theirs = pick(origin.table.records, wanted)
        demand(replica.sessions().tobytes() == theirs.tobytes(), f"{what}: other sessions")
        demand(replica.digest() == record.digest(theirs) and replica.count == len(theirs), f"{what}: digest or count")
        watch = link.peer.watches[id(replica)]
        watch.inject(1000)
        unlike = {slot for slot, copy in watch.copies.items() if not replica.present[slot]}
        demand(not unlike and len(watch.copies) == replica.count, f"{what}: the injector was not told of all")
        copies = np.frombuffer(b"".join(watch.copies[slot] for slot in sorted(watch.copies)), RECORD)
        demand(not record.changed(copies, theirs).any(), f"{what}: the injector has other sessions")

    # --- how ---------------------------------------------------------------------------------------------------------

    def _next_epoch(self) -> int:
        self._epochs += 1000
        return self._epochs

    def _start(self, node: Node, *, back: bool = False) -> None:
        self._backs += 1  # no two runs of one epoch
        node.start(node.last_epoch - self._backs if back else self._next_epoch())
        for link in self.links:
            if link.origin is node:
                link.renew()
        self._share(node)
        self._write(node)

    def _share(self, node: Node) -> None:
        if self._replicas is not None:
            links = [link for link in self.links if link.origin is node]
            for link in links:
                link.since_ns = self.now_ns
            node.sharing = Sharing(node.table, links, self._replicas)

    def _pass(self, ns: int) -> None:
        self.now_ns += ns

    def _write(self, changed: Node | None = None) -> None:
        """Tables have changed: into the ledgers with it."""
        for link in self.links:
            if changed in (None, link.origin) and link.origin.up:
                self._ledgers[link.origin.name, link.peer.name, link.origin.epoch] = link.ledger
                link.ledger.write(link.origin.table, link.wanted(), self.steps)

    def _any_connection(self, rng: random.Random) -> tuple[Connection | None, Link]:
        link = rng.choice(self.links)
        if link.connections and rng.random() < 0.7:
            return link.connections[-1], link
        return (rng.choice(link.connections) if link.connections else None), link

    def _dial(self, link: Link) -> None:
        if not (link.origin.up and link.peer.up):
            return
        if link.current is not None:
            self._leave(link, link.current, say=True)
        link.connections = [c for c in link.connections if c.near or c.far][-3:]
        receiver = Receiver(link.peer.replicas, link.peer.settings, now_ns=self.now_ns)
        link.connections.append(Connection(receiver, self.steps, self.now_ns))
        link.sender.connected(self.now_ns)

    def _leave(self, link: Link, connection: Connection, *, say: bool) -> None:
        """The sender's end is gone."""
        if connection.near:
            connection.near = False
            link.since_ns = self.now_ns
            link.sender.disconnected(self.now_ns)
            if say:
                connection.down.append(EOF)

    def _leave_far(self, connection: Connection, *, say: bool) -> None:
        if connection.far:
            connection.far = False
            connection.receiver.disconnected(self.now_ns)
            if say:
                connection.up.append(EOF)

    def _pump_near(self, link: Link, connection: Connection) -> None:
        if not connection.near:
            return
        if connection.blocked:
            if self.now_ns - connection.moved_ns > LOST_NS:
                self._leave(link, connection, say=False)
            return
        connection.moved_ns = self.now_ns
        frames = [bytes(frame) for frame in link.sender.outgoing(self.now_ns)]
        for frame in frames:
            self._check_said(link, frame)
        connection.down.extend(frames)
        connection.past.extend(frame for frame in frames if frame[3] > Opcode.REFUSE)
        if link.sender.closed:
            self._leave(link, connection, say=True)

    def _pump_far(self, connection: Connection) -> None:
        if connection.far:
            connection.up.extend(bytes(frame) for frame in connection.receiver.outgoing(self.now_ns))
            if connection.receiver.closed:
                self._leave_far(connection, say=True)

    def _deliver(self, link: Link, connection: Connection, way: str, limit: int = ALL) -> None:
        """Some bytes come out of the wire."""
        queue = connection.down if way == "down" else connection.up
        if connection.stalled or not queue:
            return
        connection.moved_ns = self.now_ns
        data, ended = b"", False
        while queue and len(data) < limit and not ended:
            start = connection.started[way]
            piece = queue[0][start : start + limit - len(data)]
            ended = queue[0] == EOF
            data += piece
            connection.started[way] += len(piece)
            if connection.started[way] == len(queue[0]):
                queue.popleft()
                connection.started[way] = 0
        if way == "down" and connection.far:
            if data:
                connection.receiver.receive(data, self.now_ns)
            if ended:
                self._leave_far(connection, say=False)
            self._follow(link, connection)
        elif way == "up" and connection.near:
            if data:
                link.sender.receive(data, self.now_ns)
            if ended:
                self._leave(link, connection, say=False)

    def _exchange(self, link: Link) -> None:
        for connection in list(link.connections):
            self._pump_near(link, connection)
            self._deliver(link, connection, "down")
            self._pump_far(connection)
            self._deliver(link, connection, "up")
            while connection.receiver.next_event() is not None:
                pass
        while link.sender.next_event() is not None:
            pass

    def _disturb(self, rng: random.Random, what: "Callable[[list[bytes], int], object]") -> None:
        connection, link = self._any_connection(rng)
        if connection is None:
            return
        self._pump_near(link, connection)
        self._pump_far(connection)
        way = rng.choice(("down", "down", "up"))
        queue = connection.down if way == "down" else connection.up
        first = 1 if connection.started[way] else 0
        last = len(queue) - (1 if queue and queue[-1] == EOF else 0)
        if first < last:
            frames = list(queue)[first:last]
            what(frames, rng.randrange(len(frames)))
            kept = [*list(queue)[:first], *frames, *list(queue)[last:]]
            queue.clear()
            queue.extend(kept)

    def _tick(self, node: Node) -> None:
        """What a node does about once a second."""
        if node.up:
            node.replicas.age(self.now_ns)
            for watch in node.watches.values():
                watch.follow(0, aged=True)
            if node.sharing is not None:
                node.sharing.tick(self.now_ns)
                self._write(node)

    def _follow(self, link: Link, connection: Connection) -> None:
        peer = link.peer
        replica = connection.receiver.replica
        if replica is None:
            return
        if id(replica) not in peer.watches:
            ledger = self._ledgers[link.origin.name, peer.name, replica.epoch]
            peer.watches[id(replica)] = Watch(replica, ledger)
        peer.watches[id(replica)].follow(connection.began)
        counts = peer.replicas.get(replica.node_id)
        if counts is not None:
            demand(counts.epoch >= peer.newest.get(replica.node_id, 0), "an earlier run took over")
            peer.newest[replica.node_id] = counts.epoch

    @staticmethod
    def _check_said(link: Link, frame: bytes) -> None:
        """A frame, just made: it must say what the table says."""
        table, opcode, body = link.origin.table, frame[3], frame[16:]
        wanted = link.wanted()
        if opcode == Opcode.DELETE:
            slots, generations = codec.parse_deletes(body, table.slots)
            demand(not wanted[slots].any(), "a session that is there is told to have ended")
            ahead = table.generation[slots] - generations
            demand((ahead == table.shared[slots]).all(), "the end of another generation")
        elif opcode in (Opcode.CREATE, Opcode.UPDATE):
            records = codec.parse_records(body, table.slots)
            slots = records["slot"].astype(np.int64)
            demand(wanted[slots].all(), "a session is told that is not there")
            demand(records.tobytes() == table.rows(slots).tobytes(), "a session is told as it is not")


def _new_row(rng: random.Random) -> Records:
    row = pick(_POOL, np.array([rng.randrange(CLIENTS)]))
    if rng.random() < 0.1:
        row["flags"] |= record.ONE_PACKET  # not for peers
    return row


def _settings(rng: random.Random) -> LinkSettings:
    return LinkSettings(
        batch_changes=rng.choice((1, 4, 32)),
        body_bytes=rng.choice((120, 300, 1000, 64 << 10)),
        window_bytes=rng.choice((200, 1200, 4 << 20)),
        window_frames=rng.choice((1, 2, 5, 1024)),
        compress=rng.choice((None, None, True, False)),
    )


STEPS: dict[str, Callable[[Cluster, random.Random], None]] = {
    step.__name__: step
    for step in (
        Cluster.sessions_come, Cluster.sessions_end, Cluster.a_slot_is_used_again, Cluster.a_tuple_moves,
        Cluster.events_are_lost, Cluster.scan, Cluster.dial, Cluster.cut, Cluster.stall, Cluster.resync, Cluster.talk,
        Cluster.some_bytes_arrive, Cluster.exchange, Cluster.time_passes, Cluster.frames_are_lost,
        Cluster.a_frame_comes_twice, Cluster.a_frame_comes_late, Cluster.frames_change_places, Cluster.crash,
        Cluster.start, Cluster.inject,
    )
}  # fmt: skip
WEIGHTS = {
    "sessions_come": 6, "sessions_end": 3, "a_slot_is_used_again": 2, "a_tuple_moves": 2, "exchange": 14, "talk": 5,
    "some_bytes_arrive": 5, "scan": 2, "cut": 2, "frames_are_lost": 2, "a_frame_comes_late": 2,
}  # fmt: skip  # of steps that are more than 1
