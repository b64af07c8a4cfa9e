# SPDX-License-Identifier: GPL-2.0-or-later
"""RDMA as it is: pyverbs on soft-RoCE in a virtual machine, under the same suites as all other transports."""

import io
import re
import sys
from typing import BinaryIO, cast

import pytest

from tests.vm import kernel, machine

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.needs("vm"), pytest.mark.timeout(2000)]

SUITES = ["tests/unit/test_transport_conformance.py", "tests/unit/test_transport_sync.py"]
# What differs when slots are sealed; the rest passes through the same lines.
SEALED = ("arrive", "both", "orderly", "killed", "goodbye", "nonsense", "ten_thousand")
SETTINGS = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-q", "--tb=short", "--durations=5"]
MINIMUM = 40  # tests; fewer would mean that they were not found


class Tee(io.RawIOBase):
    """Shows the guest's output as it comes, and keeps it."""

    def __init__(self) -> None:
        self.kept = bytearray()

    def write(self, data: object) -> int:
        """Like any file's."""
        piece = bytes(cast(bytes, data))
        self.kept += piece
        sys.stdout.write(piece.decode(errors="replace"))
        return len(piece)


def test_the_suites_of_all_transports_over_soft_roce() -> None:
    if reason := machine.missing():
        pytest.fail(reason)
    output = Tee()
    chosen = f"not tls or {' or '.join(SEALED)}"
    try:
        status = machine.run(
            [".venv/bin/python", "-m", "pytest", *SETTINGS, "-k", chosen, *SUITES],
            environment={"DPVS_PROBE_TRANSPORTS": "rdma,rdma+tls"},
            timeout_s=1900,
            output=cast(BinaryIO, output),
        )
    except kernel.NoKernel as error:
        pytest.fail(str(error))
    assert status == 0
    summary = re.findall(rb"(\d+) (passed|failed|skipped|error)", output.kept)
    assert [kind for _, kind in summary] == [b"passed"]
    assert int(summary[0][0]) >= MINIMUM
