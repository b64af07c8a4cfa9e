# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests: unit (no root), system (root, namespaces, twin), lab (what they and the demo stand on)."""
