# SPDX-License-Identifier: GPL-2.0-or-later
"""Lists of peers from elsewhere: etcd and DNS."""
