# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings that change while nodes run, over real TCP: replicator/attach.py ``apply_live``, and the command config."""

import asyncio
from dataclasses import replace
from pathlib import Path

from replicator.attach import Options, apply_live
from replicator.filters import chosen
from tests.unit.simulated_node import SimulatedNode, until


def test_filters_and_batches_change_alive(tmp_path: Path) -> None:
    async def body() -> None:
        async with SimulatedNode("b", tmp_path) as b, SimulatedNode("a", tmp_path, peers=(b.address,)) as a:
            for slot in range(20):
                a.dpvs.create(slot, slot)
            await until(lambda: b.holds(a))
            parts, options = a.node._parts, Options(pid=1)
            (sender,) = a.links.senders()
            nothing = replace(options, filters=chosen(services=["10.99.0.0/16"]))
            apply_live(parts, options, nothing)
            replica = b.replica_of("a")
            assert replica is not None
            await until(lambda: replica.count == 0)
            assert a.node.status()["held_back_by_filter"] == {"service": 20, "state": 0, "age": 0}
            apply_live(parts, nothing, options)
            await until(lambda: b.holds(a))
            assert a.node.status()["held_back_by_filter"] == "off"
            faster = replace(options, link=replace(options.link, batch_changes=7, compress=True))
            apply_live(parts, options, faster)
            assert (sender.settings.batch_changes, sender.report()["compressing"]) == (7, True)
            a.dpvs.create(30, 30)
            await until(lambda: b.holds(a) and replica.count == 21)

    asyncio.run(body())
