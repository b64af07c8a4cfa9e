# SPDX-License-Identifier: GPL-2.0-or-later
"""What the collector keeps in one byte for each slot, as bits."""

# Notes on a slot, between two looks at it.
WATCHED = 1  # in the watch list
HEARD = 2  # an event of this tick named it
CHANGED = 4  # an event later than the row's birth: the row's session has ended
ANNOUNCED = 8  # the last event was a creation: it will be hashed soon
DOUBTED = 16  # seemed gone at the last look, without an event
COPY = 32  # held a copy of ours when last read

# What a look at a slot comes to.
VALID = 1  # it holds a session of ours
DECIDED = 2  # the table is to be told
DOUBTFUL = 4  # it seems gone, and no event said so
AWAITED = 8  # a creation was announced and is not hashed yet
IS_COPY = 16  # it holds a copy of ours

# Marks on a slot that a reader of the table has to look at again (``table.Dirty``).
CHANGE = 1
OWED = 2  # by a full sync
FRESH = 4  # a generation that the reader may never have heard of
