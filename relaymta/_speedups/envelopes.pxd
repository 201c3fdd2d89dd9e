cimport cython

from relaymta._speedups._mem cimport copy, find, high
from relaymta._speedups.search cimport Needle, encoded

cdef int TAB, SP
cdef int NO, YES, ASK
cdef int PLACES


@cython.locals(c="const unsigned char *", yes=bytearray, ask=bytearray, y="unsigned char *", a="unsigned char *", at=Py_ssize_t,
               told=int)
cpdef tuple envelopes(Needle needle, list messages, bytes care, int place, int version)

@cython.locals(p="const unsigned char *", end=Py_ssize_t, found=list, pos=Py_ssize_t)
cpdef list elements(bytes envelope)

@cython.locals(stop=Py_ssize_t, c="unsigned char")
cdef int _field(Needle needle, const unsigned char *p, Py_ssize_t pos, Py_ssize_t end, int place) except -1

@cython.locals(w="unsigned char *", k=Py_ssize_t, several=bint, name=Py_ssize_t, route=Py_ssize_t, mailbox=Py_ssize_t,
               host=Py_ssize_t, stop=Py_ssize_t)
cdef Py_ssize_t _addresses(Needle needle, const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) except -2

@cython.locals(depth=Py_ssize_t, size=Py_ssize_t, c="unsigned char")
cdef Py_ssize_t _item(const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) noexcept

cdef Py_ssize_t _next(const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) noexcept

cdef Py_ssize_t _stripped(unsigned char *w, Py_ssize_t k, const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) noexcept

@cython.locals(named=bint, begin=Py_ssize_t)
cdef Py_ssize_t _address(unsigned char *w, Py_ssize_t k, const unsigned char *p, Py_ssize_t name, Py_ssize_t route,
                         Py_ssize_t mailbox, Py_ssize_t host, Py_ssize_t stop) noexcept

@cython.locals(start=Py_ssize_t, i=Py_ssize_t)
cdef Py_ssize_t _trimmed(unsigned char *w, Py_ssize_t begin, Py_ssize_t end) noexcept
