# SPDX-License-Identifier: GPL-2.0-or-later
"""One decoder each. See ``tests.fuzz.judge`` for what a target is."""
