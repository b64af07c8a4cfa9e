# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent inside the DPVS process: how it is configured, loaded, asked and unloaded."""
