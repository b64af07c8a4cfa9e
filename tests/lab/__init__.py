# SPDX-License-Identifier: GPL-2.0-or-later
"""The laboratory: two DPVS nodes (the twin or real ones), a client and a real server in network namespaces.

pair.py puts it together; run.py owns what must be given back (state directory, namespaces, hugepages, processes);
net.py, process.py, hugepages.py hold one kind each; node.py, twin.py, real.py are the nodes; backends.py, steady.py
and churn.py make the traffic; sniff.py counts resets, record.py writes captures.
"""
