from libc.string cimport memchr, memcpy

cdef extern from "strings.h" nogil:
    int strncasecmp(const char *one, const char *other, size_t size)


cpdef inline Py_ssize_t find(const unsigned char *p, int byte, Py_ssize_t start, Py_ssize_t end) noexcept:
    """Index of the first `byte` in p[start:end], or -1."""
    cdef const unsigned char *hit
    if start >= end:
        return -1
    hit = <const unsigned char *> memchr(p + start, byte, end - start)
    return -1 if hit is NULL else hit - p


cpdef inline bint high(const unsigned char *p, Py_ssize_t start, Py_ssize_t end) noexcept:
    """Whether a byte of p[start:end] is above 127."""
    cdef unsigned char seen = 0
    cdef Py_ssize_t i
    for i in range(start, end):
        seen |= p[i]
    return seen > 127


cpdef inline Py_ssize_t copy(unsigned char *w, Py_ssize_t k, const unsigned char *p, Py_ssize_t start, Py_ssize_t end) noexcept:
    """Copy p[start:end] to w[k:]; the new k."""
    if end > start:
        memcpy(w + k, p + start, end - start)
        return k + end - start
    return k


cpdef inline bytes cut(const unsigned char *p, Py_ssize_t start, Py_ssize_t end):
    """p[start:end] as bytes."""
    return p[start:end]


cpdef inline bint clean(const unsigned char *p, Py_ssize_t start, Py_ssize_t end) noexcept:
    """Whether p[start:end] has no TAB, no two spaces side by side, and none at its end."""
    cdef unsigned char bad = 0
    cdef unsigned char space = 32
    cdef unsigned char tab = 9
    cdef Py_ssize_t i
    if start >= end:
        return True
    for i in range(start, end - 1):
        bad |= (p[i] == tab) | ((p[i] == space) & (p[i + 1] == space))
    return not (bad or p[end - 1] == space or p[end - 1] == tab)


cpdef inline Py_ssize_t dot(const unsigned char *p, Py_ssize_t start, Py_ssize_t end) noexcept:
    """Index of the first "." in p[start:end] that follows a CR or LF, or -1; `start` is at least 1."""
    cdef unsigned char full = 46
    cdef unsigned char cr = 13
    cdef unsigned char lf = 10
    cdef unsigned char hit
    cdef Py_ssize_t i, stop
    while start < end:
        stop = end if end - start < 128 else start + 128
        hit = 0
        for i in range(start, stop):
            hit |= (p[i] == full) & ((p[i - 1] == lf) | (p[i - 1] == cr))
        if hit:
            for i in range(start, stop):
                if p[i] == full and (p[i - 1] == lf or p[i - 1] == cr):
                    return i
        start = stop
    return -1


cpdef inline bint same(const unsigned char *p, Py_ssize_t start, Py_ssize_t end, bytes word) noexcept:
    """Whether p[start:end] is `word`, which is in lower case and has no NUL, in any case."""
    return end - start == len(word) and strncasecmp(<const char *> p + start, <const char *> word, end - start) == 0


cpdef inline void lower(unsigned char *w, Py_ssize_t end) noexcept:
    """Make the ASCII letters of w[:end] lower case."""
    cdef Py_ssize_t i
    cdef unsigned char c
    for i in range(end):
        c = w[i]
        w[i] = c + 32 * (<unsigned char> (c - 65) < 26)
