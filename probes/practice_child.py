# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that ``probes.practice`` measures probes on: a script for a bare interpreter, without imports of ours.

Its one argument is the descriptor of a file of machine code, which it maps. Each line of input, ``offset count``, calls
the function at that offset with (count, session), and the answer is how long that took, in nanoseconds of processor
time. That happens on a second thread, as DPVS's workers are: not every kernel's probes fire there.
"""

import _thread
import ctypes
import mmap
import sys
import time

SESSION_BYTES = 1 << 16


def main() -> None:
    descriptor = int(sys.argv[1])
    code = mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
    size = len(code)
    base = _address()
    session = ctypes.create_string_buffer(SESSION_BYTES)
    ended = _thread.allocate_lock()
    ended.acquire()

    def work() -> None:
        try:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            for line in sys.stdin:
                offset, count = map(int, line.split())
                if not 0 <= offset < size:
                    break
                function = ctypes.CFUNCTYPE(None, ctypes.c_ulong, ctypes.c_void_p)(base + offset)
                began = time.thread_time_ns()
                function(count, ctypes.addressof(session))
                sys.stdout.write(f"{time.thread_time_ns() - began}\n")
                sys.stdout.flush()
        finally:
            ended.release()

    _thread.start_new_thread(work, ())
    ended.acquire()


def _address() -> int:
    """Where the code is mapped: Python tells the address of writable maps only."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            if "memfd:dpvs-probe-practice" in line and "r-xp" in line:
                return int(line.split("-")[0], 16)
    raise SystemExit("the code is not mapped")


main()
