# SPDX-License-Identifier: GPL-2.0-or-later
"""A virtual machine with soft-RoCE, for what needs RDMA."""
