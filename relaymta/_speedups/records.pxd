cimport cython

from relaymta._speedups._mem cimport copy
from relaymta._speedups._words cimport digits, get32, get64, lowest, put32, put64, seek

cdef int SIZE, FLAGS, MODSEQ, LINE


@cython.locals(p="const unsigned char *", w="unsigned char *", out=bytearray, block=bytes, total=Py_ssize_t, k=Py_ssize_t, i=Py_ssize_t)
cpdef bytes load(list blocks)

@cython.locals(p="const unsigned char *", block=bytes, flags="unsigned long long", found=Py_ssize_t, i=Py_ssize_t)
cpdef Py_ssize_t count(list blocks, unsigned long long every, unsigned long long none) except -1

@cython.locals(p="const unsigned char *", found="unsigned long long", i=Py_ssize_t)
cpdef unsigned long long highest(bytes records) except? 0

@cython.locals(p="const unsigned char *", block=bytes, flags="unsigned long long", i=Py_ssize_t)
cpdef unsigned int first(list blocks, unsigned long long every, unsigned long long none) except? 0

@cython.locals(p="const unsigned char *", block=bytes, out=bytearray, start=Py_ssize_t, n=Py_ssize_t, i=Py_ssize_t)
cpdef bytes changed(list blocks, unsigned long long modseq)

@cython.locals(p="const unsigned char *", w="unsigned char *", out=bytearray, flags="unsigned long long", n=Py_ssize_t, i=Py_ssize_t)
cpdef bytes select(bytes records, unsigned long long every, unsigned long long some, unsigned long long none,
                   unsigned long long modseq)

@cython.locals(p="const unsigned char *", r="const unsigned char *", w="unsigned char *", out=bytearray, uid="unsigned int",
               n=Py_ssize_t, i=Py_ssize_t, k=Py_ssize_t, end=Py_ssize_t)
cpdef bytes within(bytes records, bytes ranges)

@cython.locals(p="const unsigned char *", b="const unsigned char *", w="unsigned char *", out=bytearray, i=Py_ssize_t, k=Py_ssize_t)
cpdef bytes pick(bytes records, bytes bits)

@cython.locals(p="const unsigned char *", r="const unsigned char *", out=bytearray, uid="unsigned int", n=Py_ssize_t, i=Py_ssize_t,
               k=Py_ssize_t, end=Py_ssize_t, start=Py_ssize_t)
cpdef bytes chosen(bytes records, bytes ranges)

@cython.locals(p="const unsigned char *", w="unsigned char *", out=bytearray, old="unsigned long long",
               flags="unsigned long long", i=Py_ssize_t)
cpdef bytes apply(bytes records, unsigned long long keep, unsigned long long add, unsigned long long modseq)

@cython.locals(p="const unsigned char *", q="const unsigned char *", w="unsigned char *", out=bytearray, uid="unsigned int",
               n=Py_ssize_t, end=Py_ssize_t, i=Py_ssize_t, j=Py_ssize_t, k=Py_ssize_t)
cpdef bytes merged(bytes records, bytes changes)

@cython.locals(p="const unsigned char *", q="const unsigned char *", w="unsigned char *", out=bytearray, uid="unsigned int",
               end=Py_ssize_t, i=Py_ssize_t, j=Py_ssize_t, k=Py_ssize_t)
cpdef bytes untold(bytes records, bytes told)

@cython.locals(p="const unsigned char *", u="const unsigned char *", w="unsigned char *", out=bytearray, uid="unsigned int",
               flags="unsigned long long", old="unsigned long long", fresh=bint, total=Py_ssize_t, k=Py_ssize_t, at=Py_ssize_t,
               i=Py_ssize_t, start=Py_ssize_t, stop=Py_ssize_t)
cpdef bytes lines(bytes records, bytes uids, list names, unsigned long long recent, unsigned long long until, int items)

@cython.locals(p="const unsigned char *", flags="unsigned long long", old="unsigned long long", n=Py_ssize_t, size=Py_ssize_t,
               length=Py_ssize_t, i=Py_ssize_t, bit=int)
cdef Py_ssize_t _room(bytes records, list names) except -1

@cython.locals(begin=Py_ssize_t, bit=int, name=bytes)
cdef Py_ssize_t _flags(unsigned char *w, Py_ssize_t k, unsigned long long flags, list names, bint fresh) except -1
