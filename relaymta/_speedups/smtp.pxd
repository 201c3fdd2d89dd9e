cimport cython

from relaymta._speedups._mem cimport copy, find, high

cdef int COMMAND, BAD, DATA, END, FOREIGN
cdef Py_ssize_t BATCH, SHOWN
cdef int HOLDING, COMMANDS, MESSAGE, CHUNK
cdef int START, DOT, DOT_CR, MIDDLE, AFTER_CR
cdef int BARE_LF, BARE_CR, NUL, EIGHT_BIT, LONG_LINE
cdef int CR, LF, SPACE
cdef unsigned int DATA_VERB, BDAT_VERB, AUTH_VERB


@cython.final
cdef class Parser:
    cdef readonly Py_ssize_t line_limit
    cdef readonly Py_ssize_t data_line_limit
    cdef public bint normalize
    cdef bytes rest
    cdef Py_ssize_t at
    cdef bytes start
    cdef readonly int mode
    cdef bint raw
    cdef bint skipping
    cdef int place
    cdef Py_ssize_t column
    cdef readonly Py_ssize_t left
    cdef readonly Py_ssize_t size
    cdef readonly int flags

    cpdef commands(self)
    cpdef line(self)
    cpdef data(self)
    cpdef chunk(self, Py_ssize_t octets, bint first)
    cpdef Py_ssize_t waiting(self)
    cpdef bint runnable(self)
    cpdef keep(self, bytes data)

    @cython.locals(events=list, pos=Py_ssize_t, n=Py_ssize_t, before=Py_ssize_t)
    cpdef list feed(self, bytes data)

    @cython.locals(p="const unsigned char *", i=Py_ssize_t, end=Py_ssize_t, verb="unsigned int",
                   letter="unsigned char")
    cdef Py_ssize_t _command(self, bytes data, Py_ssize_t pos, Py_ssize_t n, list events) except -1

    @cython.locals(p="const unsigned char *")
    cdef Py_ssize_t _unfinished(self, bytes data, Py_ssize_t pos, Py_ssize_t n) except -1

    @cython.locals(p="const unsigned char *", w="unsigned char *", out=bytearray, first=Py_ssize_t, run=Py_ssize_t,
                   k=Py_ssize_t, i=Py_ssize_t, c=Py_ssize_t, stop=Py_ssize_t, place=int, tail=Py_ssize_t,
                   lf=Py_ssize_t)
    cdef Py_ssize_t _data(self, bytes data, Py_ssize_t pos, Py_ssize_t n, list events) except -1

    cdef int _line(self, Py_ssize_t ending) except -1

    @cython.locals(p="const unsigned char *", w="unsigned char *", nul=bint, body=bytes)
    cdef int _flush(self, bytes data, Py_ssize_t first, Py_ssize_t run, Py_ssize_t pos, bytearray out, Py_ssize_t k,
                    list events) except -1

    @cython.locals(p="const unsigned char *", end=Py_ssize_t, i=Py_ssize_t, j=Py_ssize_t, c=Py_ssize_t,
                   stop=Py_ssize_t, lf=Py_ssize_t)
    cdef Py_ssize_t _chunk(self, bytes data, Py_ssize_t pos, Py_ssize_t n, list events) except -1
