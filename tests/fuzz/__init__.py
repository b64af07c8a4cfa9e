# SPDX-License-Identifier: GPL-2.0-or-later
"""Coverage-guided fuzzing of everything that decodes bytes from outside."""
