cimport cython

from relaymta._speedups._mem cimport copy, find, lower

cdef int TAB, LF, CR, SP, NONE, PAD
cdef bytes VALUES, HEX

@cython.locals(out=bytearray, n=Py_ssize_t)
cpdef bytes base64(bytes data)

@cython.locals(values="const unsigned char *", k=Py_ssize_t, group="unsigned int", count=int, a="unsigned char", b="unsigned char",
               c="unsigned char", d="unsigned char")
cpdef Py_ssize_t from_base64(unsigned char *w, const unsigned char *p, Py_ssize_t pos, Py_ssize_t n) noexcept

cdef Py_ssize_t _rest(unsigned char *w, Py_ssize_t k, unsigned int group, int count) noexcept

@cython.locals(out=bytearray, n=Py_ssize_t)
cpdef bytes quoted_printable(bytes data)

@cython.locals(digits="const unsigned char *", k=Py_ssize_t, i=Py_ssize_t, j=Py_ssize_t, stop=Py_ssize_t, end=Py_ssize_t,
               line_end=Py_ssize_t, joined=bint)
cpdef Py_ssize_t from_quoted(unsigned char *w, const unsigned char *p, Py_ssize_t pos, Py_ssize_t n) noexcept

@cython.locals(p="const unsigned char *", w="unsigned char *", out=bytearray, n=Py_ssize_t, k=Py_ssize_t)
cpdef bytes folded(bytes data, bint unfold)

@cython.locals(k=Py_ssize_t, i=Py_ssize_t, stop=Py_ssize_t)
cpdef Py_ssize_t unfolded(unsigned char *w, const unsigned char *p, Py_ssize_t pos, Py_ssize_t n) noexcept

cpdef bint holds(bytes data, bytes needle, bint unfold) except -1
