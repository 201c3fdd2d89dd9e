cimport cython

from relaymta._speedups._mem cimport find

cdef int CR, LF


@cython.final
cdef class Replies:
    cdef readonly Py_ssize_t line_limit
    cdef readonly Py_ssize_t lines_limit
    cdef bytes rest
    cdef list lines
    cdef int code
    cdef readonly bint broken

    @cython.locals(p="const unsigned char *", replies=list, n=Py_ssize_t, pos=Py_ssize_t, i=Py_ssize_t,
                   end=Py_ssize_t)
    cpdef list feed(self, bytes data)

    @cython.locals(p="const unsigned char *", size=Py_ssize_t, code=int)
    cdef bint _line(self, bytes data, Py_ssize_t pos, Py_ssize_t end, list replies) except -1
