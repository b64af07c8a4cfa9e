# SPDX-License-Identifier: GPL-2.0-or-later
"""Compressed blocks inside frames: LZ4 and Zstandard, and what a peer may say with them.

Rules: a format is the flag that stands in a body. Nothing is unpacked into more room than was announced and checked
before; what does not unpack to exactly that is refused. Compressors are made once a thread.
"""

import threading
from typing import Any, cast

import lz4.block
import zstandard

PLAIN, LZ4, ZSTD = 0, 1, 2  # flags of a body
NAMES = {PLAIN: "plain", LZ4: "LZ4", ZSTD: "Zstandard"}
ZSTD_LEVEL = 1  # higher ones take far more time and leave hardly less (scripts/bench/compression)

_local = threading.local()


class BadBlock(ValueError):
    """A block that cannot be unpacked, or not to what was announced."""


def pack(flag: int, data: Any) -> bytes:
    """``data``, a buffer, as a block of that format."""
    if flag == ZSTD:
        return cast(bytes, _compressor().compress(data))
    return cast(bytes, lz4.block.compress(data, store_size=False))


def unpack(flag: int, block: bytes | memoryview, size: int) -> bytes:
    """The ``size`` bytes in a block. Raises BadBlock."""
    try:
        data = _unzstd(block, size) if flag == ZSTD else lz4.block.decompress(block, uncompressed_size=size)
    except (lz4.block.LZ4BlockError, zstandard.ZstdError, ValueError, MemoryError):
        raise BadBlock(f"a block of {NAMES[flag]} that cannot be unpacked") from None
    if len(data) != size:
        raise BadBlock(f"a block of {NAMES[flag]} with {len(data)} bytes where {size} are announced")
    return cast(bytes, data)


def _unzstd(block: bytes | memoryview, size: int) -> bytes:
    """The frame says itself how much it holds, and memory is taken for that: so it is looked at first."""
    said = zstandard.get_frame_parameters(block).content_size
    if said != size:
        raise ValueError(f"a frame of {said} bytes")
    return cast(bytes, _decompressor().decompress(block, max_output_size=size, allow_extra_data=False))


def _compressor() -> Any:
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True)
    return _local.compressor


def _decompressor() -> Any:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    return _local.decompressor
