cimport cython

from relaymta._speedups._mem cimport copy, cut, find, high
from relaymta._speedups._words cimport digits

cdef int TAB, LF, CR, SP
cdef Py_ssize_t QUOTED_MOST, FIRST_ROOM


@cython.final
cdef class Octets:
    cdef bytearray octets
    cdef unsigned char *w
    cdef Py_ssize_t size
    cdef Py_ssize_t k
    cdef bytearray unfolded
    cdef const unsigned char *line
    cdef Py_ssize_t start
    cdef Py_ssize_t end

    cdef int need(self, Py_ssize_t more) except -1

    cdef int put(self, bytes text) except -1

    cdef int number(self, Py_ssize_t n) except -1

    cdef bytes taken(self, Py_ssize_t start, Py_ssize_t end)

    @cython.locals(w="unsigned char *", size=Py_ssize_t, k=Py_ssize_t, quoted=bint, i=Py_ssize_t, c="unsigned char")
    cdef int string(self, const unsigned char *p, Py_ssize_t start, Py_ssize_t end) except -1

    @cython.locals(w="unsigned char *")
    cdef int unfold(self, const unsigned char *p, Py_ssize_t start, Py_ssize_t end) except -1


@cython.locals(bad="unsigned char", quote="unsigned char", backslash="unsigned char", cr="unsigned char", lf="unsigned char",
               limit="unsigned char", i=Py_ssize_t, c="unsigned char")
cdef bint _plain(const unsigned char *p, Py_ssize_t start, Py_ssize_t end) noexcept

@cython.locals(k=Py_ssize_t, i=Py_ssize_t, c="unsigned char")
cdef Py_ssize_t _unfolded(unsigned char *w, const unsigned char *p, Py_ssize_t start, Py_ssize_t end) noexcept
