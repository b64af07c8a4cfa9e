# SPDX-License-Identifier: GPL-2.0-or-later
"""Every field that is used, wrong alone: found on a live DPVS, and named."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from probes.anatomy import Anatomy
from probes.control import ControlSocket
from probes.errors import DpvsProbeError
from probes.evidence import Name, name_of
from probes.judging import CAPTURED, INJECTED, OPTIONAL, faults, supported
from probes.layout import SESSION, Layout, Struct
from probes.memory import SessionPool
from probes.poolcheck import POOL_FIELDS, ZONE_FIELDS
from probes.proof import prove, prove_live
from probes.target import Target
from tests.conftest import demand
from tests.lab.node import Settings
from tests.lab.pair import Pair, memory_mib

LAYOUT = Layout.load("1.10.2")
USED: tuple[Name, ...] = tuple(dict.fromkeys((*ZONE_FIELDS, *POOL_FIELDS, *CAPTURED, *INJECTED, *OPTIONAL)))
# A buffer of ours that is larger than the struct does no harm; one that is smaller is what has to be found.
LARGER_IS_FINE = {"dp_vs_conn_param", "dpvs_sockopts", "dpvs_msg_type"}

pytestmark = [pytest.mark.needs("twin")]


@dataclass
class Live:
    target: Target
    anatomy: Anatomy
    control: ControlSocket
    pool: SessionPool

    def refusals(self, layout: Layout, *, alone: bool = False) -> str:
        """Everything that is said against a layout; ``alone``: by what is live only, not by the layout itself."""
        if not alone and (wrong := faults(layout)):
            return "; ".join(wrong)
        try:
            with SessionPool.open(self.target, layout) as pool:
                proof = prove_live(self.target, layout, pool, self.control, self.anatomy)
        except DpvsProbeError as error:
            return str(error)
        found = proof.injection
        return " ".join(
            (
                *(check.detail for check in proof.failed), *found.wrong, *found.missing, *found.missing_fullnat,
                *supported(layout, self.anatomy)[1],
            )
        )  # fmt: skip


@pytest.fixture(scope="module")
def live(lab_run: Any, lab_pages: Any) -> Iterator[Live]:
    demand("twin")
    lab_pages("twin")
    with Pair(lab_run, settings=Settings(memory_mib=memory_mib("twin"))) as pair:
        steady = pair.steady(connections=20)
        with Target.open(pair.a.pid) as target, SessionPool.open(target, LAYOUT) as pool:
            yield Live(target, Anatomy.of(target), pair.a.control, pool)
        assert steady.finish()["alive"] == 20


def test_the_right_one_is_proven(live: Live) -> None:
    proof = prove(live.target, LAYOUT, live.pool, live.control, live.anatomy)
    assert proof.fields_ok, proof.checks
    assert (proof.injection.wrong, proof.injection.missing, proof.injection.missing_fullnat) == ((), (), ())
    assert supported(LAYOUT, live.anatomy) == (LAYOUT, ())


@pytest.mark.parametrize("name", USED, ids=name_of)
def test_one_field_wrong(live: Live, name: Name) -> None:
    said = live.refusals(LAYOUT.changed(elsewhere(LAYOUT.struct(name[0]), name[1])))
    if name[0] in LARGER_IS_FINE and name[1] is None:
        assert f"{name[0]}." in said  # its last field is outside then
    else:
        assert name_of(name) in said


@pytest.mark.parametrize("first", ["refcnt", "timer", "dest", "fnat_seq", "packet_xmit", "flags", "state"])
def test_a_fork_with_one_member_more(live: Live, first: str) -> None:
    """Eight bytes before a field, in a layout that agrees with itself: the sessions of a fork, taken for stock."""
    struct = LAYOUT.struct(SESSION)
    start = struct.fields[first][0]
    moved = {
        member: (offset + 8 if offset >= start else offset, size)
        for member, (offset, size) in struct.fields.items()
        if offset < start or offset + 8 + size <= struct.size
    }
    layout = LAYOUT.changed(replace(struct, fields=moved))
    assert f"{SESSION}." in live.refusals(layout, alone=True)


def elsewhere(struct: Struct, member: str | None) -> Struct:
    """The struct with one field behind where it is, or before it; with eight bytes less if it is the size."""
    if member is None:
        return replace(struct, size=struct.size + (-8 if struct.name in LARGER_IS_FINE else 8))
    offset, size = struct.fields[member]
    step = max(size, 1)
    place = offset + step if offset + step + size <= struct.size else offset - step
    return replace(struct, fields={**struct.fields, member: (max(place, 0), size)})
