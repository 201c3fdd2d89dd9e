cimport cython

cdef int NIL, BIN8, BIN32, UINT8, UINT64, INT8, INT64
cdef int ARRAY, ARRAY_END, POSITIVE_END, NEGATIVE


@cython.final
cdef class Row:
    cdef bytes row
    cdef const unsigned char *p
    cdef Py_ssize_t pos
    cdef Py_ssize_t end
    cdef Py_ssize_t start
    cdef Py_ssize_t stop
    cdef unsigned long long number
    cdef unsigned long long object
    cdef unsigned long long segment
    cdef unsigned long long generation
    cdef unsigned long long offset
    cdef unsigned long long length
    cdef bint bad
    cdef bint several
    cdef int version
    cdef Py_ssize_t envelope
    cdef Py_ssize_t envelope_end
    cdef Py_ssize_t parts
    cdef Py_ssize_t parts_end

    cdef int open(self, bytes row) except -1

    @cython.locals(i=Py_ssize_t)
    cdef int big(self, int octets) noexcept

    @cython.locals(c=int)
    cdef int integer(self) noexcept

    @cython.locals(c=int, size=Py_ssize_t)
    cdef int octets(self) noexcept

    @cython.locals(c=int)
    cdef int array(self, int least) noexcept

    cdef int message(self, bytes row) except -1

    cdef int body(self, bytes row) except -1

    @cython.locals(version=Py_ssize_t)
    cdef int data(self, bytes row) except -1


@cython.locals(row=Row, found=list, one=bytes, key=bytearray, w="unsigned char *", n="unsigned long long", i=int)
cpdef list objects(list rows)

@cython.locals(row=Row, found=list, one=bytes)
cpdef list bodies(list rows)

@cython.locals(row=Row, found=list, one=bytes, at=Py_ssize_t)
cpdef list undescribed(list rows, int version)
