# SPDX-License-Identifier: GPL-2.0-or-later
"""A node's own sessions in a file, so that they outlive its DPVS."""
