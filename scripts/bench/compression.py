# SPDX-License-Identifier: GPL-2.0-or-later
"""What LZ4 and Zstandard leave of session records, and what that takes: one core, no network.

Frames as a full sync sends them (192 KiB) and as a busy link sends changes (32 sessions), of sessions as a load
balancer has them: few services and real servers, clients all over, sequence numbers at random.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import lz4.block
import numpy as np
import zstandard

from collector import record
from collector.record import RECORD, Records
from replicator import codec
from replicator.codec import IPV4, IPV6, SIZES
from replicator.wire import HEADER, Opcode

Packs = Callable[[bytes], bytes]
Unpacks = Callable[[bytes, int], bytes]


def traffic(n: int, rng: np.random.Generator, *, ipv6: bool) -> Records:
    """n FullNAT sessions in rising slots."""
    out = np.zeros(n, RECORD)
    out["slot"], out["generation"] = np.sort(rng.permutation(4 * n)[:n]), rng.integers(1, 50, n)
    out["af"] = out["af_out"] = record.AF_INET6 if ipv6 else record.AF_INET
    out["proto"], out["fwdmode"] = record.TCP, record.FNAT
    out["state"] = rng.choice([record.ESTABLISHED, record.TIME_WAIT, record.FIN_WAIT], n, p=[0.7, 0.25, 0.05])
    out["flags"] = record.HASHED | record.IN_TIMER
    width = 16 if ipv6 else 4
    for name, spread in (("caddr", 1 << 22), ("vaddr", 4), ("laddr", 8), ("daddr", 40)):
        numbers = rng.integers(spread, size=n)
        out[name][:, 0] = 10
        for byte in range(3):
            out[name][:, width - 1 - byte] = numbers >> (8 * byte) & 0xFF
    out["cport"], out["lport"] = rng.integers(1024, 65536, n), rng.integers(1024, 65536, n)
    out["vport"], out["dport"] = rng.choice([80, 443], n), 8080
    out["timeout_ms"] = np.where(out["state"] == record.ESTABLISHED, 90_000, 7_000)
    out["worker"] = rng.integers(8, size=n)
    for name in ("fnat_isn", "fnat_delta", "fnat_fdata_seq", "rs_end_seq", "rs_end_ack"):
        out[name] = rng.integers(1 << 32, size=n)
    return out


def methods() -> dict[str, tuple[Packs, Unpacks]]:
    """By name: what packs, what unpacks."""

    def unpack_lz4(block: bytes, size: int) -> bytes:
        return bytes(lz4.block.decompress(block, uncompressed_size=size))

    unzstd = zstandard.ZstdDecompressor()

    def unpack_zstd(block: bytes, size: int) -> bytes:
        return bytes(unzstd.decompress(block, max_output_size=size))

    found: dict[str, tuple[Packs, Unpacks]] = {
        "lz4": (lambda data: bytes(lz4.block.compress(data, store_size=False)), unpack_lz4)
    }
    for level in (-5, 1, 3, 6):
        made = zstandard.ZstdCompressor(level=level)
        found[f"zstd {level}"] = (made.compress, unpack_zstd)
    return found


def speed(work: Callable[[], object], size: int, seconds: float) -> float:
    """MiB/s of what is not compressed."""
    rounds, began = 0, time.process_time()
    while time.process_time() - began < seconds or rounds == 0:
        work()
        rounds += 1
    return rounds * size / (time.process_time() - began) / (1 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement")
    given = parser.parse_args()
    rng = np.random.default_rng(1)
    print(f"{'sessions':<22}{'format':<10}{'left':>7}{'pack':>12}{'unpack':>12}")
    for kind, ipv6 in ((IPV4, False), (IPV6, True)):
        for n in ((192 << 10) // SIZES[kind], 32):
            frame = codec.pack_records(Opcode.CREATE, 1, traffic(n, rng, ipv6=ipv6), kind)
            raw = bytes(frame[HEADER.size + codec.BODY.size :])
            for name, (packs, unpacks) in methods().items():
                block = packs(raw)
                assert unpacks(block, len(raw)) == raw
                pack = speed(partial(packs, raw), len(raw), given.seconds)
                unpack = speed(partial(unpacks, block, len(raw)), len(raw), given.seconds)
                title = f"{n} of IPv{6 if ipv6 else 4}"
                print(f"{title:<22}{name:<10}{len(block) / len(raw):>6.1%}{pack:>7.0f} MiB/s{unpack:>6.0f} MiB/s")


if __name__ == "__main__":
    main()
