# SPDX-License-Identifier: GPL-2.0-or-later
"""libFuzzer's own mutations, for those that know more of an input."""

import atheris


def resize(data: bytes, longest: int) -> bytes:
    """Other bytes like these, ``longest`` at most; only while fuzzing."""
    return bytes(atheris.Mutate(data, longest))
