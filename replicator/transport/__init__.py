# SPDX-License-Identifier: GPL-2.0-or-later
"""How frames travel between nodes."""
