cimport cython

from relaymta._speedups._mem cimport clean, copy, find

cdef int CR, LF, SP, TAB


@cython.final
cdef class Body:
    cdef readonly bint relaxed
    cdef Py_ssize_t blanks
    cdef bint wsp
    cdef bint cr
    cdef bint middle
    cdef bint some

    @cython.locals(p="const unsigned char *", w="unsigned char *", out=bytearray, n=Py_ssize_t, k=Py_ssize_t, front=Py_ssize_t,
                   pos=Py_ssize_t, run=Py_ssize_t, stop=Py_ssize_t, i=Py_ssize_t, blanks=Py_ssize_t, c="unsigned char")
    cpdef bytes feed(self, bytes data)

    @cython.locals(w="unsigned char *")
    cdef Py_ssize_t _lines(self, bytearray out, Py_ssize_t k) except -1

    @cython.locals(rest=bytes)
    cpdef bytes finish(self)


@cython.locals(p="const unsigned char *", w="unsigned char *", out=bytearray, n=Py_ssize_t, k=Py_ssize_t, i=Py_ssize_t,
               colon=Py_ssize_t, start=Py_ssize_t, c="unsigned char", wsp=bint)
cpdef bytes header(bytes field)
