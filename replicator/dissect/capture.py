# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP segments out of a capture file (pcap, pcapng, either packed by gzip), one packet in memory at a time.

Rules: Scapy reads the file and takes the packets apart, down to TCP; this module and ``layer`` are all that import it.
The file is whatever somebody hands us: what is read at once is bounded, a file that ends in the middle of a packet
gives what it has and says so, and what cannot be read at all is a ``BadCapture``.
"""

import gzip
import logging
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

logging.getLogger("scapy").setLevel(logging.ERROR)  # Scapy warns on standard error; what matters of it, we say

from scapy.config import conf  # noqa: E402
from scapy.error import Scapy_Exception  # noqa: E402
from scapy.layers import l2  # noqa: E402, F401  (link types)
from scapy.layers.inet import IP, TCP  # noqa: E402
from scapy.layers.inet6 import IPv6  # noqa: E402
from scapy.packet import Packet  # noqa: E402
from scapy.utils import PcapReader  # noqa: E402

from probes.errors import DpvsProbeError  # noqa: E402

from .links import Segment  # noqa: E402

STDIN = Path("-")
MAX_READ = 16 << 20  # bytes at once: no packet is that large
MAX_PACKET = 1 << 20
SYN = 0x02
ACK = 0x10


class BadCapture(DpvsProbeError):
    """The file cannot be read as a capture."""

    help_text = "Give a file that tcpdump, dumpcap or Wireshark wrote: tcpdump -i IFACE -s 0 -w FILE tcp port PORT"


class _Bounded:
    """A file that is never read in large pieces, and that knows whether it ended within something."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.name = name
        self.cut = False
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_READ:
            self.cut = True
            return b""
        try:
            data = self._file.read(size)
        except (OSError, EOFError, zlib.error):  # gzip: broken, or over too early
            self.cut = True
            return b""
        self.cut = self.cut or 0 < len(data) < size
        return data

    def seek(self, *_: int) -> int:
        raise OSError("not packed twice")  # Scapy wants to, in what looks like gzip once more

    def close(self) -> None:
        self._file.close()


class Capture:
    """``with Capture(path) as capture: for segment in capture: ...``; the counters are right when that is done.

    ``-`` is standard input.
    """

    def __init__(self, path: Path) -> None:
        self.packets = 0
        self.fragments = 0  # of IP packets: not put together
        self.cut = False  # the file ends within a packet
        self.unknown_links = 0  # packets of a kind of network that Scapy does not know
        try:
            file: IO[bytes] = sys.stdin.buffer if path == STDIN else path.open("rb")
            magic = file.peek(2)[:2]  # type: ignore[attr-defined]
        except OSError as error:
            advice = "Check its name, and whether you may read it."
            raise BadCapture(f"{path} cannot be read: {error.strerror}", help_text=advice) from None
        self._file = _Bounded(gzip.GzipFile(fileobj=file) if magic == b"\x1f\x8b" else file, str(path))  # type: ignore[arg-type]
        try:
            self._reader = PcapReader(self._file)
        except (Scapy_Exception, EOFError, OSError):
            self._file.close()
            file.close()
            raise BadCapture(f"{path} is not a capture") from None
        self._raw = file

    def __enter__(self) -> "Capture":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._raw.close()

    def __iter__(self) -> Iterator[Segment]:
        while True:
            try:
                packet = self._reader.read_packet(MAX_PACKET, stop_dissection_after=TCP)
            except EOFError:
                break
            except (Scapy_Exception, ValueError, LookupError, ArithmeticError):
                self._file.cut = True  # rubbish where a block should be
                break
            self.packets += 1
            segment = self._segment(packet)
            if segment is not None:
                yield segment
        self.cut = self._file.cut

    def _segment(self, packet: Packet) -> Segment | None:
        if type(packet) is conf.raw_layer:
            self.unknown_links += 1
            return None
        if TCP not in packet:
            self.fragments += IP in packet and (packet[IP].frag > 0 or packet[IP].flags.MF)
            return None
        tcp = packet[TCP]
        network = tcp.underlayer
        while network is not None and not isinstance(network, IP | IPv6):
            network = network.underlayer  # extension headers
        if network is None:
            return None
        flags = int(tcp.flags)
        return Segment(
            time_ns=int(packet.time * 1_000_000_000),
            source=(str(network.src), int(tcp.sport)),
            destination=(str(network.dst), int(tcp.dport)),
            sequence=int(tcp.seq),
            acknowledged=int(tcp.ack) if flags & ACK else None,
            syn=bool(flags & SYN),
            data=bytes(tcp.original[4 * (tcp.dataofs or 5) :]),
        )
