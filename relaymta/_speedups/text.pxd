cimport cython

from relaymta._speedups._mem cimport copy, find, lower

cdef int TAB, LF, CR, SP, NONE, PAD
cdef bytes VALUES, HEX

@cython.locals(p="const unsigned char *", w="unsigned char *", values="const unsigned char *", out=bytearray, n=Py_ssize_t,
               k=Py_ssize_t, group="unsigned int", count=int, pos=Py_ssize_t, a="unsigned char", b="unsigned char",
               c="unsigned char", d="unsigned char")
cpdef bytes base64(bytes data)

cdef Py_ssize_t _rest(unsigned char *w, Py_ssize_t k, unsigned int group, int count) noexcept

@cython.locals(p="const unsigned char *", w="unsigned char *", digits="const unsigned char *", out=bytearray, n=Py_ssize_t,
               k=Py_ssize_t, pos=Py_ssize_t, i=Py_ssize_t, j=Py_ssize_t, stop=Py_ssize_t, end=Py_ssize_t, line_end=Py_ssize_t,
               joined=bint)
cpdef bytes quoted_printable(bytes data)

@cython.locals(p="const unsigned char *", w="unsigned char *", out=bytearray, n=Py_ssize_t, k=Py_ssize_t, pos=Py_ssize_t,
               i=Py_ssize_t, stop=Py_ssize_t)
cpdef bytes folded(bytes data, bint unfold)

cpdef bint holds(bytes data, bytes needle, bint unfold) except -1
