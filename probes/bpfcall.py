# SPDX-License-Identifier: GPL-2.0-or-later
"""The few requests of bpf(2) that packets need and bcc is too slow for, or has not: include/uapi/linux/bpf.h.

Rules: whole arrays in and out, no Python object for an entry. The lock of the interpreter is free while the kernel
works. Errors are OSError.
"""

import ctypes
import errno
import os
import struct

import numpy as np
import numpy.typing as npt

_SYS_BPF = 321  # x86-64
_MAP_UPDATE_ELEM, _MAP_DELETE_ELEM, _PROG_TEST_RUN, _MAP_LOOKUP_BATCH, _LINK_CREATE = 2, 3, 10, 24, 28
_ATTACH_XDP = 37  # enum bpf_attach_type
XDP_GENERIC, XDP_NATIVE = 2, 4  # include/uapi/linux/if_link.h: XDP_FLAGS_SKB_MODE, XDP_FLAGS_DRV_MODE
_ATTR_BYTES = 128

_BATCH = struct.Struct("<4QII2Q")  # in, out, keys, values, count, map, 2 flags
_ELEMENT = struct.Struct("<I4x3Q")  # map, key, value, flags
_LINK = struct.Struct("<4I")  # program, interface, type, flags
_TEST = struct.Struct("<4I2Q2I")  # program, result, bytes in and out, data in and out, repeat, ns

_libc = ctypes.CDLL(None, use_errno=True)
Raw = npt.NDArray[np.void]


def _call(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    result: int = _libc.syscall(_SYS_BPF, command, attributes, _ATTR_BYTES)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _attributes(layout: struct.Struct, *values: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(layout.pack(*values), _ATTR_BYTES)


def attach_xdp(program_fd: int, interface: int, mode: int) -> int:
    """A link from a program to the interface with that number; closing its descriptor detaches. Linux 5.9."""
    return _call(_LINK_CREATE, _attributes(_LINK, program_fd, interface, _ATTACH_XDP, mode))


def read_map(map_fd: int, keys: Raw, values: Raw, at_once: int = 1 << 14) -> int:
    """Fill ``keys`` and ``values`` with a hash map's entries, as many as fit; how many. Linux 5.6.

    An entry that stays is there once, one that comes or goes meanwhile perhaps. Both arrays are as long as the map is
    large, contiguous, of the map's key and value sizes.
    """
    place = ctypes.c_uint64()
    first, done = True, 0
    while done < len(keys):
        count = min(at_once, len(keys) - done)
        attributes = _attributes(
            _BATCH, 0 if first else ctypes.addressof(place), ctypes.addressof(place),
            keys.ctypes.data + done * keys.itemsize, values.ctypes.data + done * values.itemsize, count, map_fd, 0, 0,
        )  # fmt: skip
        try:
            _call(_MAP_LOOKUP_BATCH, attributes)
            end = False
        except OSError as error:
            if error.errno == errno.ENOSPC and count < len(keys) - done:
                at_once *= 2  # one bucket holds more than that
                continue
            if error.errno not in (errno.ENOENT, errno.ENOSPC):
                raise
            end = True  # all were read, or no bucket fits into what is left
        done += _BATCH.unpack_from(attributes)[4]
        first = False
        if end:
            break
    return done


def put(map_fd: int, key: bytes, value: bytes) -> None:
    """Set one entry of a map."""
    holds = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value, len(value))
    _call(_MAP_UPDATE_ELEM, _attributes(_ELEMENT, map_fd, *map(ctypes.addressof, holds), 0))


def remove(map_fd: int, key: bytes) -> None:
    """Take one entry out of a map; nothing if it is not there."""
    holds = ctypes.create_string_buffer(key, len(key))
    try:
        _call(_MAP_DELETE_ELEM, _attributes(_ELEMENT, map_fd, ctypes.addressof(holds), 0, 0))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def trial(program_fd: int, frame: bytes, repeat: int = 1) -> tuple[int, int]:
    """Run an XDP program on a frame (14 bytes or more) that no interface sees: (its verdict, ns a run)."""
    data = ctypes.create_string_buffer(frame, len(frame))
    attributes = _attributes(_TEST, program_fd, 0, len(frame), 0, ctypes.addressof(data), 0, repeat, 0)
    _call(_PROG_TEST_RUN, attributes)
    said = _TEST.unpack_from(attributes)
    return said[1], said[7]
