# SPDX-License-Identifier: GPL-2.0-or-later
"""Turns what the probes see into one current table of sessions."""
