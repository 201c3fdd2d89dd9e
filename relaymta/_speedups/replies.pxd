cimport cython

from relaymta._speedups._mem cimport find

cdef int CR, LF, OCTETS

cdef inline bint _is_digit(unsigned char octet) noexcept


@cython.final
cdef class Replies:
    cdef readonly Py_ssize_t line_limit
    cdef readonly Py_ssize_t lines_limit
    cdef bytes rest
    cdef list lines
    cdef int code
    cdef Py_ssize_t cut
    cdef Py_ssize_t octets
    cdef readonly bint broken

    @cython.locals(p="const unsigned char *", replies=list, n=Py_ssize_t, pos=Py_ssize_t, i=Py_ssize_t,
                   end=Py_ssize_t)
    cpdef list feed(self, bytes data)

    cpdef bint begun(self)

    @cython.locals(replies=list)
    cpdef list end(self)

    @cython.locals(p="const unsigned char *", n=Py_ssize_t, i=Py_ssize_t, line=bytes)
    cdef Py_ssize_t _end_of_cut(self, bytes data, list replies) except -2

    cdef list _not_a_reply(self, bytes line, list replies)

    cdef list _too_long(self, list replies)

    @cython.locals(p="const unsigned char *", size=Py_ssize_t, start=Py_ssize_t, code=int, more=bint)
    cdef bint _line(self, bytes data, Py_ssize_t pos, Py_ssize_t end, list replies) except -1
