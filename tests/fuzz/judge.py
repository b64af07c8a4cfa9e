# SPDX-License-Identifier: GPL-2.0-or-later
"""What a target is, and how one input is judged.

Rules: a decoder gives a value or raises an error of the declared types, whose text is one line of what can be printed.
Anything else is a finding: another exception, a value that does not encode to what it came from, more memory than the
input may claim, or no end within ``TIMEOUT_S``. Memory is what Python and numpy allocate at the same time, the peak
within one input; as measuring makes an input five times as dear, one of ``MEASURED`` inputs is, and the process has a
limit for all of them.
"""

import importlib
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

PACKAGES = ["replicator", "probes", "collector"]
SLACK_BYTES = 64 << 10  # what a decoder may take whatever comes: small objects, messages
TIMEOUT_S = 10
MEASURED = 8
MEMORY_MIB = 512  # that all inputs together may add to the process


class Target(Protocol):
    """A module in ``tests/fuzz/targets``. It may also have ``mutate``, as atheris wants it."""

    MAX_BYTES: int  # of an input
    WORDS: Sequence[bytes]  # what a mutation may put in as a whole

    def seeds(self) -> Iterable[bytes]:
        """Valid inputs, made by what packs them; the same ones each time."""

    def check(self, data: bytes) -> None:
        """Decode one input; raises whatever is a finding."""

    def bound(self, data: bytes) -> int:
        """Bytes that may be allocated at the same time for this input."""


class Finding(Exception):
    """A rule that does not hold."""


def load(name: str) -> Target:
    """A target by its name."""
    return cast(Target, importlib.import_module(f"tests.fuzz.targets.{name}"))


def judge(target: Target, data: bytes) -> None:
    """Raises for a finding."""
    tracemalloc.start()
    try:
        target.check(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    bound = target.bound(data)
    if peak > bound:
        raise Finding(f"{peak} bytes were allocated for an input of {len(data)}, {bound} at most were declared")


@contextmanager
def only(*errors: type[Exception]) -> Iterator[None]:
    """What is inside may raise these, with one line of text, and nothing else."""
    try:
        yield
    except errors as error:
        told(error)


def told(error: Exception) -> None:
    """Raises Finding if an error's text cannot be shown: it may have words of a stranger in it."""
    if not str(error) or not str(error).isprintable():
        raise Finding(f"the text of {error!r} is not one line that can be printed") from error


def must(holds: object, rule: str) -> None:
    """Raises Finding, naming the rule."""
    if not holds:
        raise Finding(rule)
