# SPDX-License-Identifier: GPL-2.0-or-later
# The types of packing.py, for Cython.
cimport cython

ctypedef unsigned char u8
ctypedef unsigned long long u64
ctypedef long long i64

cdef u64 _AF_INET, _AF_INET6, _HALF
cdef Py_ssize_t _AHEAD
cdef u8 _CREATE4, _UPDATE4, _CREATE6, _UPDATE6, _ENDED, _NOTHING
cdef int _NO_SUCH_SLOT, _NO_GENERATION, _NOT_IPV4, _NO_FAMILY, _LONG_ADDRESS
cdef i64 _LEAST_NS, _PER_OCTAVE, _LONG_NS

cdef int _room(bint enough) except -1
@cython.locals(i=Py_ssize_t, outside=bint)
cdef int _inside(const i64[:] slots, i64 limit) except -1

cdef class Telling:
    cdef const u64[:, ::1] words
    cdef const u8[::1] shared
    cdef u8[::1] told
    cdef u64 fetched

    @cython.locals(i=Py_ssize_t, slot=i64, seen=u64)
    cdef int fetch(self, const i64[:] slots, Py_ssize_t first) noexcept
    @cython.locals(i=Py_ssize_t, k=Py_ssize_t, n=Py_ssize_t, slot=i64, told=u8, kind=u8)
    cpdef sort(self, const i64[:] slots, const u8[:] fresh, u8[::1] kinds, i64[::1] counts)
    @cython.locals(i=Py_ssize_t, w=Py_ssize_t, slot=i64)
    cpdef pack4(self, const i64[:] slots, u64[:, ::1] out)
    @cython.locals(i=Py_ssize_t, w=Py_ssize_t)
    cpdef pack6(self, const i64[:] slots, u64[:, ::1] out)

@cython.locals(i=Py_ssize_t, w=Py_ssize_t)
cpdef int unpack4(const u64[:, ::1] items, u64 slots, u64[:, ::1] out) except -1
@cython.locals(i=Py_ssize_t, w=Py_ssize_t, af=u64, af_out=u64)
cpdef int unpack6(const u64[:, ::1] items, u64 slots, u64[:, ::1] out) except -1
@cython.locals(i=Py_ssize_t)
cpdef bint rising(const u64[:, ::1] words) except -1
@cython.locals(i=Py_ssize_t, longest=i64, took=i64, scaled=i64, bucket=i64)
cpdef i64 tally(const i64[:] since_ns, i64 now_ns, i64[::1] counts) except? -1
