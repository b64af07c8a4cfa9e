# SPDX-License-Identifier: GPL-2.0-or-later
# The types of rows.py, for Cython. Arrays are seen as they are, none is copied.
cimport cython

ctypedef unsigned char u8
ctypedef unsigned short u16
ctypedef unsigned int u32
ctypedef unsigned long long u64
ctypedef long long i64

cdef u64 _AF_INET, _AF_INET6, _TCP, _NONE, _SYN_SENT, _SYN_RECV, _SYNACK, _HASHED, _INJECTED, _ONE_PACKET
cdef u64 _INACTIVE
cdef u64 _ANY_MODE, _ANY_WORKER, _CREATE, _HALF, _NEGATIVE, _MODE_BITS, _WORKER_BITS, _PADDING_BITS
cdef u64 _TIMEOUT_WORKER_BITS, _SECONDS_MAX, _SORT
cdef u8 _WATCHED, _HEARD, _CHANGED, _ANNOUNCED, _DOUBTED, _COPY
cdef u8 _CHANGE, _OWED, _FRESH
cdef Py_ssize_t _AHEAD

cdef int _room(bint enough) except -1
@cython.locals(i=Py_ssize_t, outside=bint)
cdef int _inside(const i64[:] slots, i64 limit) except -1

cdef class Conversion:
    cdef Py_ssize_t width
    cdef const i64[:, ::1] halves
    cdef const i64[::1] bytes_, shorts, words
    cdef const u64[::1] addresses
    cdef const u8[::1] modes
    cdef const u8[:, ::1] conns8
    cdef const u16[:, ::1] conns16
    cdef const u32[:, ::1] conns32
    cdef const u64[:, ::1] conns64
    cdef u64[::1] out

    cpdef into(self, row)
    cpdef read(self, conns)
    @cython.locals(value=u64)
    cdef inline u64 byte(self, Py_ssize_t i, Py_ssize_t k) noexcept
    @cython.locals(value=u64)
    cdef inline u64 short(self, Py_ssize_t i, Py_ssize_t k) noexcept
    @cython.locals(low=u64, high=u64)
    cdef inline u64 half(self, Py_ssize_t i, Py_ssize_t k) noexcept
    @cython.locals(k=Py_ssize_t, mode=u64, xmit=u64, seconds=u64, timeout=u64, af=u64, af_out=u64, word=u64)
    cdef int row(self, Py_ssize_t i, i64 slot) noexcept
    @cython.locals(i=Py_ssize_t, w=Py_ssize_t, n=Py_ssize_t)
    cpdef rows(self, const i64[:] slots, u64[:, ::1] out)

cdef class Rows:
    cdef u64[:, ::1] words
    cdef u8[::1] present, shared, fresh
    cdef i64[::1] born_ns
    cdef const u64[::1] compare
    cdef u64[::1] row_
    cdef i64[:, ::1] changed
    cdef public bint frozen
    cdef public u64 claim
    cdef readonly Py_ssize_t created, updated, deleted, marked, more
    cdef u64 fetched

    @cython.locals(i=Py_ssize_t, slot=i64, seen=u64)
    cdef int fetch(self, const i64[:] slots, Py_ssize_t first) noexcept
    cpdef begin(self)
    @cython.locals(n=Py_ssize_t)
    cdef int may(self, const i64[:] slots) except -1
    @cython.locals(i=Py_ssize_t, w=Py_ssize_t, n=Py_ssize_t)
    cpdef apply(self, const u64[:, ::1] new, const i64[:] slots, const u8[:] valid, const u8[:] renewed,
                const u8[:] worker, const i64[:] since_ns, i64 now_ns)
    @cython.locals(w=Py_ssize_t, told=u8, fresh=bint, differs=bint, lcore=u64, generation=u64, claim=u64)
    cdef int one(self, i64 slot, bint valid, bint renewed, u64 worker, i64 since_ns, i64 now_ns) noexcept

cdef class Looks:
    cdef Rows rows
    cdef Conversion conversion
    cdef u8[::1] notes, lcore
    cdef u32[::1] prints
    cdef readonly i64 torn
    cdef i64[::1] since_ns, until_ns
    cdef readonly i64 events_created, events_freed, events_unknown_slot
    cdef readonly i64 malformed, one_packet, never_hashed, renewed_by_event, copies, adopted
    cdef u64 fetched

    @cython.locals(i=Py_ssize_t, k=Py_ssize_t, slot=i64, time_ns=i64, tid=u64, created=bint, note=u8, lcore=u64,
                   n=Py_ssize_t, limit=i64, found=Py_ssize_t)
    cpdef Py_ssize_t hear(self, const u64[:, ::1] events, const i64[:] slots, const u32[::1] tids,
                          const u8[::1] lcores, i64[::1] heard) except -1
    @cython.locals(i=Py_ssize_t, slot=i64, seen=u64)
    cdef int fetch(self, const i64[:] slots, Py_ssize_t first) noexcept
    @cython.locals(i=Py_ssize_t, n=Py_ssize_t, slot=i64, found=Py_ssize_t)
    cpdef Py_ssize_t look(self, const u8[:] whole, const i64[:] slots, i64 now_ns, i64 read_ns, i64 young_ns,
                          i64[::1] again) except -1
    @cython.locals(rows=Rows, record=Conversion, head=u64, flags=u64, note=u8, present=bint, known=bint, copy=bint, valid=bint, gone=bint,
                   sure=bint, awaited=bint, renewed=bint, since=i64, left=u8, born=Py_ssize_t)
    cdef int _one(self, Py_ssize_t i, i64 slot, i64 now_ns, i64 read_ns, i64 young_ns) noexcept
    @cython.locals(head=u64, state=u64)
    cdef bint _waiting(self) noexcept
    cdef bint _family(self, u64 number) noexcept
    @cython.locals(record=Conversion, state=u64)
    cdef bint _unsettled(self) noexcept

cdef class Marks:
    cdef u8[::1] marks
    cdef i64[::1] since_ns
    cdef public Py_ssize_t overlap
    cdef u64 fetched

    @cython.locals(i=Py_ssize_t, seen=u64)
    cdef int fetch(self, Rows rows, Py_ssize_t first) noexcept
    @cython.locals(before=u8)
    cdef int one(self, i64 slot, i64 since_ns, bint fresh) noexcept
    @cython.locals(i=Py_ssize_t, n=Py_ssize_t, found=Py_ssize_t)
    cpdef Py_ssize_t mark(self, const i64[:] slots, const i64[:] since_ns, const u8[:] fresh, i64[::1] added) except -1
    @cython.locals(i=Py_ssize_t, found=Py_ssize_t)
    cpdef Py_ssize_t mark_rows(self, Rows rows, i64[::1] added) except -1
    @cython.locals(i=Py_ssize_t, slot=i64, before=u8, n=Py_ssize_t, both=Py_ssize_t)
    cpdef Py_ssize_t take(self, const i64[:] slots, i64[::1] since_ns, u8[::1] fresh) except -1

cdef class Copies:
    cdef u64[:, ::1] words
    cdef u8[::1] present, named
    cdef const u64[::1] compare
    cdef readonly Py_ssize_t created, updated, stale, more
    cdef u64 fetched

    @cython.locals(i=Py_ssize_t, slot=i64, seen=u64)
    cdef int fetch(self, const u64[:, ::1] new, Py_ssize_t first) noexcept
    @cython.locals(i=Py_ssize_t, w=Py_ssize_t, slot=i64, known=u64, ahead=u64, was=bint, anew=bint, differs=bint,
                   n=Py_ssize_t, limit=u64, outside=bint, found=Py_ssize_t)
    cpdef Py_ssize_t put(self, const u64[:, ::1] new, bint naming, i64[::1] changed, u8[::1] fresh) except -1
