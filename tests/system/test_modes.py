# SPDX-License-Identifier: GPL-2.0-or-later
"""What survives a failover: each forwarding mode, family and protocol, on one worker and on two."""

import dataclasses
from typing import Any

import pytest

from tests.conftest import demand
from tests.kinds.outcomes import SURVIVES, name, record
from tests.lab.node import Settings
from tests.lab.pair import Pair, memory_mib
from tests.lab.services import KINDS
from tests.system.kinds import PROTOCOLS, Case, failover

pytestmark = [pytest.mark.dpvs, pytest.mark.needs("bpf", "agent")]
SETTINGS = Settings(kinds=tuple(KINDS), port_pools=2, udp_timeout_s=12, udp_oneway_s=12)
_played: dict[tuple[str, int], dict[Case, str]] = {}


@pytest.fixture
def outcomes(lab_run: Any, lab_pages: Any, pair_kind: str, workers: int) -> dict[Case, str]:
    """What became of each case; all of them are played in one failover, when the first is asked for."""
    if (pair_kind, workers) not in _played:
        demand(pair_kind)
        lab_pages(pair_kind)
        settings = dataclasses.replace(SETTINGS, workers=workers, memory_mib=memory_mib(pair_kind))
        with Pair(lab_run, kind=pair_kind, settings=settings) as pair:
            _played[pair_kind, workers] = failover(pair, workers)
    return _played[pair_kind, workers]


@pytest.mark.parametrize("proto", PROTOCOLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 2])
def test_survives(outcomes: dict[Case, str], pair_kind: str, kind: str, proto: str, workers: int) -> None:
    record(pair_kind, name(kind, proto, workers), outcomes[kind, proto])
    assert outcomes[kind, proto] == SURVIVES
