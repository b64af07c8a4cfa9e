# SPDX-License-Identifier: GPL-2.0-or-later
"""The store of a node's own sessions: what was written is read, whenever the writing ended, and nothing else."""

import os
import random
import resource
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from collector import record
from collector.record import RECORD, Records, digest, identity
from collector.table import SessionTable
from probes.agent import abi
from replicator.store.format import (
    CHECK,
    FIRST_BLOCK,
    PAGE,
    PER_BLOCK,
    ForeignStore,
    Head,
    Instant,
    Stamp,
    StoreRefused,
    newest_stamp,
    pack_head,
    pack_stamp,
    parse_head,
)
from replicator.store.keeper import Keeper
from replicator.store.reader import age_ns, boot_id, now, read
from replicator.store.restored import Restored, fit
from replicator.store.writer import StoreUnusable, Writer
from replicator.wire import Hello
from tests.unit.session_records import sessions

SLOTS = 300
S = 1_000_000_000
BOOT = b"0123456789abcdef"
NOTHING_WAITS: Records = np.empty(0, RECORD)


def a_head(slots: int = SLOTS, waiting: int = 0, node: str = "a", instance: int = 7) -> Head:
    return Head(node, 1234, instance, slots, waiting, 2, now(), boot_id())


def a_table(records: Records, slots: int = SLOTS) -> SessionTable:
    table = SessionTable(slots)
    put(table, records)
    table.complete = True
    return table


def put(table: SessionTable, records: Records, *, valid: bool = True) -> None:
    table.apply(records["slot"].astype(np.int64), records, np.full(len(records), valid), 1)


def a_writer(path: Path, table: SessionTable, *, waiting: Records = NOTHING_WAITS, head: Head | None = None) -> Writer:
    return Writer(path, table, table.add_peer("store"), head or a_head(table.slots, len(waiting)), waiting)


def drained(writer: Writer, now_ns: int = S) -> None:
    writer.tick(now_ns, now())
    while writer.behind or not writer.whole:
        now_ns += S
        writer.tick(now_ns, now())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.store"


@pytest.fixture
def stored(path: Path) -> Path:
    """A store of 100 sessions."""
    writer = a_writer(path, a_table(sessions(100)))
    drained(writer)
    writer.close()
    return path


class TestWhatIsWritten:
    def test_is_read(self, path: Path) -> None:
        rng = np.random.default_rng(1)
        table = a_table(sessions(40))
        writer = a_writer(path, table)
        assert not path.exists(), "it has no name before it is whole"
        drained(writer)
        for step in range(60):
            slots = rng.permutation(SLOTS)[: rng.integers(1, 80)]
            some = sessions(SLOTS)[slots]
            some["state"] = rng.integers(1, 8, len(some))
            put(table, some, valid=bool(rng.random() < 0.6))
            drained(writer, (step + 2) * S)
            found = read(path)
            assert digest(found.own) == table.digest()
            assert len(found.own) == table.count
            assert (found.interrupted, found.damaged) == (0, [])
        writer.end(now(), ended=True)
        writer.close()
        last = read(path)
        assert last.stamp.ended
        assert last.stamp.sessions == table.count
        assert (last.head.node, last.head.slots, last.head.workers) == ("a", SLOTS, 2)

    def test_all_sessions_are_in_it_before_it_gets_its_name(self, path: Path) -> None:
        """Also where they were found after the file was begun, and are more than are written at once."""
        table = SessionTable(20_000)
        writer = a_writer(path, table)
        for first in range(0, 20_000, 1000):
            put(table, sessions(1000, first=first))
        table.complete = True
        for step in range(1, 100):
            writer.tick(step * S, now())
            if path.exists():
                break
        assert len(read(path).own) == 20_000
        writer.close()

    def test_an_old_file_stands_until_the_new_one_is_whole(self, stored: Path) -> None:
        table = a_table(sessions(5, first=200))
        table.complete = False
        writer = a_writer(stored, table)
        writer.tick(S, now())
        assert len(read(stored).own) == 100
        table.complete = True
        drained(writer, 2 * S)
        assert len(read(stored).own) == 5
        writer.close()

    def test_one_that_is_never_whole_leaves_nothing(self, path: Path) -> None:
        table = a_table(sessions(5))
        table.complete = False
        writer = a_writer(path, table)
        writer.end(now(), ended=False)
        writer.close()
        assert list(path.parent.iterdir()) == []

    def test_waiting_sessions_are_kept_beside_the_pool(self, path: Path) -> None:
        waiting = sessions(33, first=1000)
        writer = a_writer(path, a_table(sessions(SLOTS)), waiting=waiting)
        drained(writer)
        writer.close()
        found = read(path)
        assert len(found.own) == SLOTS
        assert sorted(identity(found.waiting).tolist()) == sorted(identity(waiting).tolist())

    def test_a_change_costs_one_block(self, path: Path) -> None:
        table = a_table(sessions(SLOTS))
        writer = a_writer(path, table)
        drained(writer)
        before = writer.written
        changed = sessions(3, first=56)
        changed["state"] = record.FIN_WAIT
        put(table, changed)
        drained(writer, 5 * S)
        assert writer.written == before + 1
        writer.close()

    def test_a_disk_without_room_refuses_at_the_start(self, path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, hard))
        try:
            with pytest.raises(StoreUnusable, match="cannot be made"):
                a_writer(path, a_table(sessions(1)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(path.parent.iterdir()) == []

    def test_two_writers_of_one_file(self, path: Path) -> None:
        first = a_writer(path, a_table(sessions(1)))
        with pytest.raises(StoreUnusable, match="another dpvs-probe"):
            a_writer(path, a_table(sessions(1)))
        first.close()


class TestCutOff:
    """Whenever the writing ends, every block says what it said before or what it was to say."""

    def test_at_each_word_of_a_page(self, path: Path) -> None:
        table = a_table(sessions(PER_BLOCK), PER_BLOCK)
        writer = a_writer(path, table)
        drained(writer)
        before = path.read_bytes()
        changed = sessions(PER_BLOCK)
        changed["state"] = record.CLOSE_WAIT
        put(table, changed)
        writer._write(1000)
        after = path.read_bytes()
        (page,) = {at // PAGE for at in range(0, len(before), 8) if before[at : at + 8] != after[at : at + 8]}
        writer.close()
        for cut in range(0, PAGE, 8):
            at = page * PAGE + cut
            path.write_bytes(after[:at] + before[at:])
            found = read(path)
            assert found.damaged == []
            states = set(found.own["state"].tolist())
            assert len(found.own) == PER_BLOCK
            assert states in ({record.ESTABLISHED}, {record.CLOSE_WAIT}), cut
            assert found.interrupted == (1 if cut > 0 and states == {record.ESTABLISHED} else 0), cut

    def test_of_a_stamp(self) -> None:
        old, new = (pack_stamp(Stamp(n, Instant(n, n), 5, False), 9) for n in (1, 2))
        for cut in range(0, PAGE // 8 + 1):
            torn = np.zeros_like(new)
            torn[0, :cut] = new[0, :cut]
            assert newest_stamp(np.concatenate((old, torn)), 9).generation in (1, 2)
        with pytest.raises(StoreRefused, match="stamps"):
            newest_stamp(np.concatenate((old, new)), 8)

    def test_by_a_kill(self, tmp_path: Path) -> None:
        """A child writes as fast as it can, all sessions of a block alike; kill -9 at any moment."""
        chance = random.Random(3)
        for number in range(8):
            path = tmp_path / f"{number}.store"
            child = os.fork()
            if child == 0:
                write_for_ever(path)
                os._exit(1)
            deadline = time.monotonic() + 20
            while not path.exists():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(chance.random() * 0.08)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found = read(path)
            assert found.damaged == []
            assert found.interrupted <= 1, "it can have been in one block only"
            blocks = found.own["slot"] // PER_BLOCK
            for block in np.unique(blocks):
                assert len(np.unique(found.own["fnat_delta"][blocks == block])) == 1
            assert len(found.own) == SLOTS


def write_for_ever(path: Path) -> None:
    table = a_table(sessions(SLOTS))
    writer = a_writer(path, table)
    rows = sessions(SLOTS)
    number = 0
    while True:
        number += 1
        rows["fnat_delta"] = number
        put(table, rows)
        writer.tick(number * S, now())


class TestRefused:
    def overwrite(self, path: Path, at: int, data: bytes) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(data)

    def test_any_bit_of_the_head(self, stored: Path) -> None:
        whole = stored.read_bytes()
        for byte in [*range(0, 320), 1000, PAGE - 1]:
            self.overwrite(stored, byte, bytes([whole[byte] ^ 0x10]))
            with pytest.raises(StoreRefused) as caught:
                read(stored)
            assert str(stored) in str(caught.value)
            self.overwrite(stored, byte, whole[byte : byte + 1])
        assert len(read(stored).own) == 100

    def test_other_files(self, tmp_path: Path) -> None:
        for name, data, words in (
            ("empty", b"", "it has 0 bytes"),
            ("text", b"hello\n" * 4000, "no store"),
            ("zeros", bytes(64 * PAGE), "no store"),
        ):
            path = tmp_path / name
            path.write_bytes(data)
            path.chmod(0o600)
            with pytest.raises(ForeignStore, match=words):
                read(path)
        with pytest.raises(StoreRefused, match="No such file"):
            read(tmp_path / "none")
        with pytest.raises(ForeignStore, match="no file"):
            read("/dev/null")

    def test_one_that_was_cut_short_or_added_to(self, stored: Path) -> None:
        whole = stored.read_bytes()
        for data in (whole[:-PAGE], whole[:-1], whole + bytes(PAGE)):
            stored.write_bytes(data)
            with pytest.raises(StoreRefused, match="cut short or added to"):
                read(stored)

    def test_one_that_others_may_write(self, stored: Path) -> None:
        stored.chmod(0o602)
        with pytest.raises(ForeignStore, match="others may write"):
            read(stored)
        stored.chmod(0o600)
        with pytest.raises(ForeignStore, match="belongs to uid"):
            read(stored, owner=os.geteuid() + 1)

    def test_a_later_version_or_another_shape(self) -> None:
        page = pack_head(a_head())
        raw = page.view(np.uint8)[0]
        raw[64 + 16] = 2
        with pytest.raises(StoreRefused, match="version 2"):
            parse_head(page, a_head().size)

    def test_a_block_with_nothing_whole(self, stored: Path) -> None:
        table = a_table(sessions(100))  # both places of block 1 are written
        writer = a_writer(stored, table)
        drained(writer)
        changed = sessions(PER_BLOCK, first=PER_BLOCK)
        changed["state"] = record.FIN_WAIT
        put(table, changed)
        drained(writer, 9 * S)
        writer.close()
        for place in (0, 1):
            self.overwrite(stored, (FIRST_BLOCK + 2 + place) * PAGE + 700 + place, b"\xff\xfe\xfd")
        found = read(stored)
        assert found.damaged == [1]
        assert len(found.own) == 100 - PER_BLOCK
        with pytest.raises(StoreRefused, match="1 of its 11 blocks are damaged"):
            found.require_whole()

    def test_a_page_from_elsewhere(self, stored: Path) -> None:
        """Whole, and not where it belongs: it was another block's, or another run's."""
        data = stored.read_bytes()
        block_2 = data[(FIRST_BLOCK + 4) * PAGE :][:PAGE]
        self.overwrite(stored, FIRST_BLOCK * PAGE, block_2)
        assert read(stored).interrupted == 1
        assert 0 not in read(stored).own["slot"]


def contents_of(
    path: Path, own: Records, waiting: Records = NOTHING_WAITS, *, age_s: float = 0, instance: int = 7
) -> Path:
    """A store whose stamp is ``age_s`` old."""
    table = a_table(own)
    writer = a_writer(path, table, waiting=waiting, head=a_head(SLOTS, len(waiting), instance=instance))
    drained(writer)
    at = now()
    writer.end(Instant(at.boot_ns - int(age_s * S), at.real_ns - int(age_s * S)), ended=True)
    writer.close()
    return path


class TestWhatComesBack:
    def test_the_time_that_is_left(self, path: Path) -> None:
        own = sessions(4)
        own["timeout_ms"] = (5_000, 20_000, 90_000, 9_000)
        found = fit(read(contents_of(path, own, age_s=10)), boot_id(), now())
        assert found.expired == 2
        left = sorted(found.records["timeout_ms"].tolist())
        assert 8_000 <= left[0] <= 10_000
        assert 78_000 <= left[1] <= 80_000

    def test_kinds_that_are_not_put_in(self, path: Path) -> None:
        own = sessions(5)
        own["state"] = (record.ESTABLISHED, record.SYN_RECV, record.TIME_WAIT, record.FIN_WAIT, record.CLOSE)
        found = fit(read(contents_of(path, own)), boot_id(), now())
        assert (len(found.records), found.unfit) == (2, 3)

    def test_waiting_ones_count_from_the_beginning_of_the_file_and_come_after(self, path: Path) -> None:
        own, waiting = sessions(3), sessions(5, first=1)
        waiting["timeout_ms"] = 40_000
        contents = read(contents_of(path, own, waiting))
        created = contents.head.created
        contents.head = contents.head._replace(created=Instant(created.boot_ns - 30 * S, created.real_ns))
        found = fit(contents, boot_id(), now())
        assert identity(found.records)[:3].tolist() == identity(own).tolist()
        assert identity(found.records)[3:].tolist() == identity(waiting)[2:].tolist(), "1 and 2 had their first packet"
        assert (found.records["timeout_ms"][3:] <= 10_000).all()
        same_dpvs = fit(contents, boot_id(), now(), own=False)
        assert len(same_dpvs.records) == 5

    def test_ages(self) -> None:
        then, here = Instant(5 * S, 100 * S), Instant(9 * S, 50 * S)
        assert age_ns(then, BOOT, here, BOOT) == 4 * S, "the wall clock was put back: who cares"
        with pytest.raises(StoreRefused, match="put back"):
            age_ns(then, BOOT, here, b"another boot....")
        assert age_ns(Instant(900 * S, 100 * S), b"another boot....", Instant(3 * S, 160 * S), BOOT) == 60 * S

    def test_an_origin_that_ages(self, path: Path) -> None:
        own = sessions(3)
        own["timeout_ms"] = (4_000, 50_000, 60_000)
        own["flags"] = record.INJECTED
        contents = read(contents_of(path, own))
        found = fit(contents, boot_id(), now())
        assert found.claim == 1, "the table stamps what has been carried on"
        restored = Restored(found, contents, 100 * S)
        assert restored.pending.pending == 3
        assert not restored.records["claim"].any()
        assert not record.carried(restored.records).any()
        codes = np.array([abi.Code.PENDING, abi.Code.NO_SERVICE, abi.Code.CREATED], np.uint8)
        assert restored.unsettled(codes) == 2
        restored.age(105 * S)
        assert restored.present.tolist() == [False, True, True]
        assert len(restored.remaining()) == 2
        assert restored.unsettled(codes) == 1
        said = restored.report(np.array([abi.Code.FOREIGN, abi.Code.NO_SERVICE, abi.Code.LIVE], np.uint8))
        assert (said["in_dpvs"], said["refused"]) == (1, {"foreign": 1, "no_service": 1})
        assert restored.pending.pending == 3, "time ends copies, we do not"


class TestKeeper:
    @pytest.fixture
    def me(self) -> Hello:
        return Hello("a", 99, slots=SLOTS, instance=8)

    def keeper(self, path: Path | None, me: Hello) -> Keeper:
        return Keeper(path, me, time.monotonic_ns)

    def test_sessions_of_an_earlier_dpvs(self, stored: Path, me: Hello) -> None:
        keeper = self.keeper(stored, me)
        table = SessionTable(SLOTS)
        keeper.look(table)
        (restored,) = keeper.origins()
        assert int(restored.present.sum()) == 100
        keeper.begin(None)
        put(table, sessions(2, first=250))
        keeper.tick(S // 2, proven=True)
        assert len(read(stored).own) == 100, "what DPVS has is not all read yet"
        table.complete = True
        keeper.tick(S, proven=False)
        assert len(read(stored).own) == 100, "nothing is told before the layout is proven"
        for step in (2, 3):
            keeper.tick(step * S, proven=True)
        found = read(stored)
        assert (len(found.own), len(found.waiting)) == (2, 100), "the next start brings them back as well"
        assert keeper.report()["state"] == "kept"
        keeper.close()

    def test_the_same_dpvs_has_them(self, stored: Path, me: Hello) -> None:
        keeper = self.keeper(stored, Hello("a", 99, slots=SLOTS, instance=7))
        keeper.look(SessionTable(SLOTS))
        assert keeper.origins() == []
        keeper.close()

    def test_another_nodes_file_is_left_alone(self, stored: Path) -> None:
        before = stored.read_bytes()
        keeper = self.keeper(stored, Hello("b", 99, slots=SLOTS, instance=8))
        with pytest.raises(ForeignStore, match="it is of node 'a', this is 'b'"):
            keeper.look(SessionTable(SLOTS))
        keeper.close()
        assert stored.read_bytes() == before

    def test_a_damaged_one_is_put_aside(self, stored: Path, me: Hello) -> None:
        data = bytearray(stored.read_bytes())
        struct.pack_into("<Q", data, CHECK * 8, 0)
        stored.write_bytes(data)
        keeper = self.keeper(stored, me)
        keeper.look(SessionTable(SLOTS))
        assert keeper.origins() == []
        keeper.close()
        assert [path.name for path in stored.parent.iterdir()] == ["a.store.refused"], "what was begun is not left"

    def test_one_that_is_in_use(self, path: Path, me: Hello) -> None:
        writer = a_writer(path, a_table(sessions(1)))
        drained(writer)
        keeper = self.keeper(path, me)
        with pytest.raises(StoreUnusable, match="another dpvs-probe"):
            keeper.look(SessionTable(SLOTS))
        keeper.close()
        writer.close()

    def test_no_directory(self, tmp_path: Path, me: Hello) -> None:
        with pytest.raises(StoreUnusable, match="no directory"):
            self.keeper(tmp_path / "none" / "x", me).look(SessionTable(SLOTS))

    def test_off(self, me: Hello) -> None:
        keeper = self.keeper(None, me)
        keeper.look(SessionTable(SLOTS))
        keeper.begin(None)
        keeper.tick(S, proven=True)
        assert keeper.report() == {"state": "off"}
        keeper.close()


@pytest.fixture(autouse=True)
def _children() -> Iterator[None]:
    before = _alive()
    yield
    assert _alive() <= before


def _alive() -> set[str]:
    """Children of this process; other tests may have left some to a fixture that lasts longer."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_an_empty_record_has_the_size_of_a_block() -> None:
    assert (PER_BLOCK, RECORD.itemsize * PER_BLOCK + 64) == (28, PAGE)
