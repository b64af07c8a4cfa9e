# SPDX-License-Identifier: GPL-2.0-or-later
"""The one root of all errors a user can meet.

Rules: str(error) is one line of what can be printed, whatever a stranger put into it, and says what is wrong;
``help_text`` says what to do next. Libraries raise, only the command line prints and exits. Modules that need a kind of
their own derive it from ``DpvsProbeError`` next to the code that raises it.
"""

import os


class DpvsProbeError(Exception):
    """Something the user can understand and act on.

    ``help_text`` is a class attribute for errors that always have the same way out, or is given per instance.
    """

    help_text: str = ""

    def __init__(self, message: str, *, help_text: str | None = None) -> None:
        line = " ".join(message.split())
        super().__init__(line if line.isprintable() else "".join(c if c.isprintable() else "?" for c in line))
        if help_text is not None:
            self.help_text = help_text


class NeedRoot(DpvsProbeError):
    """A privilege that attach cannot do without is missing."""

    help_text = "Run it as root: sudo dpvs-probe ..."
    help_for_root = (
        "We are root, but something above forbids it: a container, a security module, kernel lockdown, or capabilities"
        " that were taken away. It takes CAP_SYS_PTRACE, CAP_BPF, CAP_PERFMON and CAP_CHECKPOINT_RESTORE, in the"
        " host's own namespaces."
    )

    def __init__(self, message: str, *, help_text: str | None = None) -> None:
        if help_text is None and os.geteuid() == 0:
            help_text = self.help_for_root
        super().__init__(message, help_text=help_text)
