cimport cython

from relaymta._speedups._mem cimport copy, dot

cdef int CR, LF


@cython.final
cdef class Stuffer:
    cdef int last
    cdef int before

    @cython.locals(p="const unsigned char *", w="unsigned char *", out=bytearray, n=Py_ssize_t, i=Py_ssize_t, k=Py_ssize_t,
                   run=Py_ssize_t, first=bint)
    cpdef bytes feed(self, bytes data)

    cpdef bytes end(self)


@cython.locals(stuffer=Stuffer, out=list, piece=bytes)
cpdef list stuff(list data)
