# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that touches the DPVS process: find it, know its layout, watch it, read it, load the agent into it."""
