# SPDX-License-Identifier: GPL-2.0-or-later
"""The one root of all errors a user can meet.

Rules: str(error) is one line that says what is wrong; ``help_text`` says what to do next. Libraries raise, only the
command line prints and exits. Modules that need a kind of their own derive it from ``DpvsProbeError`` next to the code
that raises it.
"""


class DpvsProbeError(Exception):
    """Something the user can understand and act on.

    ``help_text`` is a class attribute for errors that always have the same way out, or is given per instance.
    """

    help_text: str = ""

    def __init__(self, message: str, *, help_text: str | None = None) -> None:
        super().__init__(" ".join(message.split()))
        if help_text is not None:
            self.help_text = help_text


class NeedRoot(DpvsProbeError):
    """A privilege that attach cannot do without is missing."""

    help_text = "Run it as root: sudo dpvs-probe ..."
