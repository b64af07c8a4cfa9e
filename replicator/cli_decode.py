# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``dpvs-probe decode``: what went over a sync link, from a capture of it.

Rules: like ``cli.py``: errors are raised and ``main`` prints them. Needs no root and no running attach. Scapy, slow to
import, is imported when the command runs and not before.
"""

from itertools import chain
from pathlib import Path

import click

from probes.errors import DpvsProbeError


class NothingDecoded(DpvsProbeError):
    """The capture has no frame that can be read."""

    help_text = "Capture the port of --listen, whole packets: tcpdump -i IFACE -s 0 -w FILE tcp port PORT"


class Encrypted(NothingDecoded):
    """All there is, is TLS."""

    help_text = (
        "Links of nodes with keys cannot be read by anybody else. `dpvs-probe peers` and `status` say how they do;"
        " only in a laboratory, attach with --insecure."
    )


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--port", type=click.IntRange(1, 65535),
    help="Only connections from or to this port; without it, every connection that speaks the protocol is shown.",
)  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, help="Show each session, and all that a HELLO says.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON, one object a line.")
def decode(file: Path, port: int | None, *, verbose: bool, as_json: bool) -> None:
    """Show the frames of sync links in FILE, a capture (pcap or pcapng; - is standard input).

    Puts each direction of each TCP connection together, also where the capture begins within it or lacks packets, and
    says what had to be passed over. Times are UTC. Needs no root. Exit status 1 if no frame could be read.
    """
    from replicator.dissect import show
    from replicator.dissect.capture import Capture
    from replicator.dissect.links import Links

    links = Links(port)
    with Capture(file) as capture:
        for found in chain(chain.from_iterable(map(links.segment, capture)), links.finish()):
            for line in show.objects(found, verbose) if as_json else show.lines(found, verbose):
                click.echo(line)
    counts = links.counts
    if as_json:
        click.echo(show.end(capture, counts))
    for line in show.remarks(capture, counts):
        click.echo(line, err=True)
    if counts.frames == 0:
        if counts.encrypted:
            raise Encrypted(f"no frame in {file} can be read: {show.connections(counts.encrypted)} of TLS")
        raise NothingDecoded(f"there is no frame of the sync protocol in {file} ({capture.packets} packets)")
