cimport cython

from relaymta._speedups._mem cimport find, high, same
from relaymta._speedups._words cimport get32
from relaymta._speedups.packed cimport Row
from relaymta._speedups.text cimport from_base64, from_quoted, unfolded

cdef int TAB, LF, SP
cdef int NO, YES, ASK, ASK_HEADERS
cdef int NO_TEXT, UTF8, ASCII, OTHER
cdef Py_ssize_t BLOCK, PLACE, PIECE, HEADERS_MOST, PARTS_MOST, FIELD_MOST
cdef bytes NONE, LOWER


@cython.final
cdef class Needle:
    cdef bytes octets
    cdef bint whole
    cdef Py_ssize_t size
    cdef bint eight
    cdef Py_ssize_t first
    cdef Py_ssize_t second
    cdef Py_ssize_t third
    cdef object kind_of
    cdef object hidden
    cdef bytes flags
    cdef bytearray scratch
    cdef unsigned char *w
    cdef Row row
    cdef Row own

    cdef int need(self, Py_ssize_t size) except -1

    @cython.locals(q="const unsigned char *", lower="const unsigned char *", size=Py_ssize_t, first=Py_ssize_t,
                   second=Py_ssize_t, third=Py_ssize_t, one="unsigned char", two="unsigned char", three="unsigned char",
                   work=Py_ssize_t, stop=Py_ssize_t, hit="unsigned char", i=Py_ssize_t,
                   k=Py_ssize_t)
    cdef Py_ssize_t seek(self, const unsigned char *p, Py_ssize_t start, Py_ssize_t end) noexcept

    @cython.locals(c="const unsigned char *", size=Py_ssize_t, out=bytearray, w="unsigned char *", at=Py_ssize_t, told=int)
    cpdef tuple texts(self, list messages, bytes care, bint headers, int version)

    @cython.locals(p="const unsigned char *", pos=Py_ssize_t, end=Py_ssize_t, octets=Py_ssize_t, at=Py_ssize_t, told=int, asked=int,
                   start=Py_ssize_t, body=Py_ssize_t, size=Py_ssize_t)
    cdef int message(self, bytes own, bytes data, bint headers) except -1

    @cython.locals(told=int, at=Py_ssize_t, start=Py_ssize_t, stop=Py_ssize_t)
    cdef int headers(self, bytes own, const unsigned char *data, const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) except -1

    @cython.locals(at=Py_ssize_t)
    cdef int header(self, const unsigned char *p, Py_ssize_t start, Py_ssize_t end) except -1

    @cython.locals(kind=int)
    cdef int part(self, const unsigned char *p, Py_ssize_t start, Py_ssize_t body, Py_ssize_t end, int encoding) except -1

    @cython.locals(stop=Py_ssize_t, i=Py_ssize_t)
    cdef int kind(self, const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) except -1

    @cython.locals(at=Py_ssize_t, sure=bint)
    cdef int text(self, const unsigned char *p, Py_ssize_t start, Py_ssize_t end, int kind) except -1


@cython.locals(stop=Py_ssize_t, c=int, d=int, e=int, size=int)
cdef bint _bare(const unsigned char *p, Py_ssize_t i, Py_ssize_t end, const unsigned char *flags) noexcept

@cython.locals(i=Py_ssize_t)
cdef Py_ssize_t _line_end(const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) noexcept

cpdef bint encoded(const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) noexcept
