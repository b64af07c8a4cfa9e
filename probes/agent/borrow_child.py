# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that borrows a thread of DPVS for a moment: a script for a bare interpreter, without imports of ours.

While a thread is traced and told what to run, the death of the tracer would leave it in the middle of that, and DPVS
would stop or die. So the tracer is a process that nobody has a reason to kill: it has a session of its own, ignores
signals that can be ignored, does its ten milliseconds of work, and ends by itself, whether or not whoever started it is
still there.

Arguments: the extension module of pyinjector, the thread, the library as DPVS sees it, the library as we see it. It
says ``ready``, and touches nothing before it is answered ``go``; then one line, empty or what went wrong. The library's
file is removed in any case: a mapped one needs no name, and who placed it may be gone.
"""

import os
import signal
import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec


def main() -> None:
    extension, thread, library, file = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    try:
        loader = ExtensionFileLoader("injector", extension)
        module = loader.create_module(ModuleSpec("injector", loader, origin=extension))
        loader.exec_module(module)
        os.write(1, b"ready\n")
        if os.read(0, 3) != b"go\n":
            return
        said = borrow(module, int(thread), library.encode())
    except Exception as error:  # whatever it is, who asked has to hear of it
        said = f"{type(error).__name__}: {error}".replace("\n", " ")
    finally:
        try:
            os.unlink(file)
        except FileNotFoundError:
            pass  # its owner was faster
    try:
        os.write(1, said.encode() + b"\n")
    except BrokenPipeError:
        pass  # nobody is left who wants to know


def borrow(module: object, thread: int, library: bytes) -> str:
    """What went wrong, or nothing."""
    failed = module.InjectorException  # type: ignore[attr-defined]
    injector = module.Injector()  # type: ignore[attr-defined]
    try:
        injector.attach(thread)
        try:
            injector.inject(library)
        finally:
            injector.detach()
    except failed as error:
        function, status, reason = error.args
        return f"{function} says {status}: {reason or 'no reason given'}".replace("\n", " ")
    return ""


main()
