# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of what works where says what the tests saw, of every case that they play."""

from tests.kinds import outcomes
from tests.lab import services


def test_the_document_says_what_was_recorded() -> None:
    assert outcomes.written() == outcomes.table(), "run scripts/kinds"


def test_every_case_was_played_on_the_twin_and_on_a_real_dpvs() -> None:
    assert list(outcomes.KINDS) == list(services.KINDS)
    cases = {outcomes.name(kind, proto, workers) for kind in outcomes.KINDS for proto, workers in outcomes.COLUMNS}
    for node in outcomes.NODES:
        assert cases <= outcomes.load(node).keys()
        assert set(outcomes.load("twin")) == set(outcomes.load(node))
