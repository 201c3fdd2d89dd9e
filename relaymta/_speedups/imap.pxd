cimport cython

from relaymta._speedups._mem cimport cut, find

cdef int COMMAND, BAD, LITERAL, PIECE, END, LINE
cdef int TOO_LONG, BARE, CONTROL, QUOTED, BRACE, NESTED, REFUSED, ENDLESS
cdef int COMMANDS, HOLDING, COLLECTING, STREAMING, DROPPING, RAW, ENDED
cdef Py_ssize_t SHOWN, DROP, TAIL
cdef int DEPTH, DIGITS
cdef int CR, LF
cdef bytes NOTHING


@cython.final
cdef class Parser:
    cdef public Py_ssize_t limit
    cdef readonly Py_ssize_t line_limit
    cdef bytearray held
    cdef Py_ssize_t scanned
    cdef readonly int mode
    cdef bytearray kinds
    cdef list values
    cdef int depth
    cdef Py_ssize_t used
    cdef bytes start
    cdef int why
    cdef long long size
    cdef bint plus
    cdef bint binary
    cdef readonly long long left
    cdef long long dropped
    cdef bint ends

    cpdef keep(self, bytes data)
    cpdef Py_ssize_t waiting(self)
    cpdef bint fits(self)
    cpdef line(self)
    cpdef collect(self)
    cpdef stream(self)
    cpdef refuse(self)

    @cython.locals(found=tuple)
    cpdef tuple event(self)

    @cython.locals(p="const unsigned char *", n=Py_ssize_t, i=Py_ssize_t)
    cdef Py_ssize_t _end_of_line(self) except -2

    @cython.locals(p="const unsigned char *", end=Py_ssize_t, stop=Py_ssize_t)
    cdef tuple _line(self)

    @cython.locals(p="const unsigned char *", n=Py_ssize_t)
    cdef int _too_long(self, bint beyond) except -1

    @cython.locals(p="const unsigned char *", i=Py_ssize_t, last=Py_ssize_t, plus=bint, size="long long", scale="long long")
    cdef Py_ssize_t _header(self, Py_ssize_t end) except -1

    @cython.locals(p="const unsigned char *", w="unsigned char *", c="unsigned char", values=list, out=bytearray, i=Py_ssize_t,
                   j=Py_ssize_t, k=Py_ssize_t)
    cdef Py_ssize_t _words(self, Py_ssize_t end) except -1

    @cython.locals(p="const unsigned char *", i=Py_ssize_t, escaped=bint, value=bytes)
    cdef Py_ssize_t _quoted(self, Py_ssize_t start, Py_ssize_t end) except -100

    @cython.locals(p="const unsigned char *")
    cdef int _collected(self) except -1

    @cython.locals(p="const unsigned char *", n=Py_ssize_t, piece=bytes)
    cdef tuple _piece(self)

    cdef int _drop(self, long long octets, bint coming) except -1

    @cython.locals(n=Py_ssize_t)
    cdef tuple _dropping(self)

    @cython.locals(event=tuple)
    cdef tuple _whole(self)

    @cython.locals(p="const unsigned char *", end=Py_ssize_t, event=tuple)
    cdef tuple _raw(self)
