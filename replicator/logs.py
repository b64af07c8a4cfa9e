# SPDX-License-Identifier: GPL-2.0-or-later
"""Where an attach, and what else runs for long, says what happens: standard error, or the journal."""

import logging
import sys

from replicator import systemd


class PlainFormatter(logging.Formatter):
    """``12:34:56 what happened``; warnings and errors say that they are."""

    def __init__(self, verbose: bool) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        self._verbose = verbose

    def format(self, entry: logging.LogRecord) -> str:
        text = super().format(entry)
        clock, _, message = text.partition(" ")
        level = f"{entry.levelname.lower()}: " if entry.levelno >= logging.WARNING else ""
        part = f"[{entry.name}] " if self._verbose else ""
        return f"{clock} {part}{level}{message}"


def log_to_stderr(verbose: bool) -> None:
    """All that the parts have to say goes to standard error, a line each; where that is the journal, with fields."""
    handler: logging.Handler
    if systemd.under_journal():
        handler = systemd.JournalHandler()
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(PlainFormatter(verbose))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
