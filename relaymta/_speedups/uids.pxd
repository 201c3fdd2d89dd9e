cimport cython

from relaymta._speedups._mem cimport copy
from relaymta._speedups._words cimport get32, put32, seek


cpdef Py_ssize_t lower(bytes uids, unsigned int uid) except -1

@cython.locals(u="const unsigned char *", r="const unsigned char *", out=bytearray, total=Py_ssize_t, at=Py_ssize_t, end=Py_ssize_t,
               i=Py_ssize_t)
cpdef bytes cut(bytes uids, bytes ranges)

@cython.locals(u="const unsigned char *", g="const unsigned char *", w="unsigned char *", out=bytearray, total=Py_ssize_t,
               start=Py_ssize_t, at=Py_ssize_t, i=Py_ssize_t, k=Py_ssize_t)
cpdef bytes minus(bytes uids, bytes gone)

@cython.locals(u="const unsigned char *", g="const unsigned char *", w="unsigned char *", out=bytearray, total=Py_ssize_t,
               at=Py_ssize_t, i=Py_ssize_t, k=Py_ssize_t)
cpdef bytes numbers(bytes uids, bytes wanted)

@cython.locals(u="const unsigned char *", w="unsigned char *", out=bytearray, uid="unsigned int", n=Py_ssize_t, k=Py_ssize_t,
               i=Py_ssize_t)
cpdef bytes runs(bytes uids)
