# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps the peers' copies of the sessions current, and puts the peers' sessions into this node's DPVS."""
