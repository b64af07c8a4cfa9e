# SPDX-License-Identifier: GPL-2.0-or-later
"""The injector and the numbers of workers of two nodes."""

import pytest

from collector.record import DR
from probes.agent.abi import Code
from replicator.inject import Injector
from tests.unit.test_inject import SECOND, FakeAgent, FakeReplica, Now


@pytest.mark.parametrize(
    ("theirs", "ours", "fits"), [(1, 2, False), (4, 2, False), (2, 2, True), (4, 1, True), (0, 2, True)]
)
def test_fullnat_of_a_node_with_other_workers_is_refused_and_said(
    theirs: int, ours: int, fits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    agent, replica = FakeAgent(), FakeReplica()
    replica.workers = theirs
    injector = Injector(agent, lambda: [replica], executor=Now(), workers=ours)
    replica.put(1, 5001, 1025)
    replica.put(2, 5002, 5002)
    replica.records["fwdmode"][2] = DR
    for step in range(5):
        injector.tick(step * SECOND)
    assert injector.installed() == (2 if fits else 1)
    assert injector.by_code[Code.WRONG_WORKER] == (0 if fits else 1)
    assert injector.codes(replica)[1] == (Code.CREATED if fits else Code.WRONG_WORKER)
    assert ("workers" in caplog.text) is not fits
