# SPDX-License-Identifier: GPL-2.0-or-later
# The types of gathering.py, for Cython.
cimport cython

ctypedef unsigned char u8
ctypedef unsigned int u32
ctypedef unsigned long long u64
ctypedef long long i64

cdef u64 _CONN

@cython.locals(i=Py_ssize_t, k=Py_ssize_t, low=i64, high=i64, outside=bint)
cdef int _inside(const u64[::1] flat, const i64[:] places, const i64[::1] words) except -1
@cython.locals(i=Py_ssize_t, k=Py_ssize_t, n=Py_ssize_t, each=Py_ssize_t, place=i64)
cpdef gather(const u64[::1] flat, const i64[:] places, const i64[::1] words, u64[:, ::1] out)
@cython.locals(i=Py_ssize_t, k=Py_ssize_t, n=Py_ssize_t, each=Py_ssize_t, place=i64, differ=u64)
cpdef still(const u64[::1] flat, const i64[:] places, const i64[::1] words, const u64[:, ::1] seen, u8[::1] same)
@cython.locals(i=Py_ssize_t, k=Py_ssize_t, n=Py_ssize_t, each=Py_ssize_t, place=i64, total=u64)
cpdef fold(const u64[::1] flat, const i64[:] places, const i64[::1] words, const u64[::1] weights, u32[::1] out)
@cython.locals(i=Py_ssize_t, n=Py_ssize_t, extents=Py_ssize_t, extent=Py_ssize_t, low=Py_ssize_t, high=Py_ssize_t,
               middle=Py_ssize_t, address=u64, page=i64, number=u64)
cpdef find(const u64[:] addresses, const u64[::1] starts, const u64[::1] ends, const i64[::1] pages,
           const i64[::1] page0, const u64[::1] first, const i64[::1] base, const u64[::1] count, int shift,
           u64 stride, i64[::1] out)
@cython.locals(rings=Py_ssize_t, ring=Py_ssize_t, found=Py_ssize_t, room=u64, tid=u64, tail=u64, count=u64,
               base=u64, i=u64, number=i64, place=u64, time_ns=u64, word=u64)
cpdef Py_ssize_t take(const u64[::1] events, u64 size, const u64[::1] tails, const u64[::1] heads, const u64[::1] tids,
                      u64 before_ns, u64[:, ::1] out, i64[::1] taken) except -1
