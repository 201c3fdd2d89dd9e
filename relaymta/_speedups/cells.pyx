"""Counters and limits in shared memory: 64-bit cells updated with C11 atomics (needs C, so it has no interpreted form).

A `Cells` is a window of a buffer that several processes map. One cell is one int64. All operations are sequentially consistent:
who changes one cell and then reads another relies on it (shm.py).
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t

cdef extern from *:
    """
    #include <stdint.h>
    static inline int64_t cell_add(int64_t *p, int64_t n) { return __atomic_add_fetch(p, n, __ATOMIC_SEQ_CST); }
    static inline int64_t cell_get(int64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline void cell_set(int64_t *p, int64_t n) { __atomic_store_n(p, n, __ATOMIC_SEQ_CST); }
    static inline int cell_cas(int64_t *p, int64_t was, int64_t now) {
        return __atomic_compare_exchange_n(p, &was, now, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    """
    int64_t cell_add(int64_t *p, int64_t n) nogil
    int64_t cell_get(int64_t *p) nogil
    void cell_set(int64_t *p, int64_t n) nogil
    bint cell_cas(int64_t *p, int64_t was, int64_t now) nogil


cdef class Cells:
    """`buffer[offset : offset + 8 * count]` as `count` signed 64-bit cells. IndexError outside of them."""

    cdef Py_buffer view
    cdef int64_t *base
    cdef readonly Py_ssize_t count

    def __cinit__(self, buffer, Py_ssize_t offset, Py_ssize_t count):
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        if offset < 0 or offset % 8 or count < 0 or offset + 8 * count > self.view.len:
            raise ValueError("cells lie outside of the buffer")
        self.base = <int64_t *> (<char *> self.view.buf + offset)
        self.count = count

    def __dealloc__(self):
        if self.base is not NULL:
            PyBuffer_Release(&self.view)

    cpdef int64_t add(self, Py_ssize_t index, int64_t n) except? -1:
        """Add n to the cell; returns its new value."""
        if index < 0 or index >= self.count:
            raise IndexError(index)
        return cell_add(self.base + index, n)

    cpdef int64_t get(self, Py_ssize_t index) except? -1:
        """The cell's value."""
        if index < 0 or index >= self.count:
            raise IndexError(index)
        return cell_get(self.base + index)

    cpdef int set(self, Py_ssize_t index, int64_t n) except -1:
        """Store n in the cell."""
        if index < 0 or index >= self.count:
            raise IndexError(index)
        cell_set(self.base + index, n)
        return 0

    cpdef bint compare_swap(self, Py_ssize_t index, int64_t was, int64_t now) except -1:
        """Store `now` if the cell holds `was`; returns whether it did."""
        if index < 0 or index >= self.count:
            raise IndexError(index)
        return cell_cas(self.base + index, was, now)

    cpdef int64_t total(self, Py_ssize_t first, Py_ssize_t count) except? -1:
        """The sum of `count` cells from `first` on."""
        cdef Py_ssize_t i
        cdef int64_t result = 0
        if first < 0 or count < 0 or first + count > self.count:
            raise IndexError(first)
        for i in range(first, first + count):
            result += cell_get(self.base + i)
        return result

    cpdef int64_t highest(self, Py_ssize_t first, Py_ssize_t count, Py_ssize_t but) except? -1:
        """The greatest of `count` cells from `first` on and of 0, the cell `but` left out."""
        cdef Py_ssize_t i
        cdef int64_t one, result = 0
        if first < 0 or count < 0 or first + count > self.count:
            raise IndexError(first)
        for i in range(first, first + count):
            if i != but:
                one = cell_get(self.base + i)
                if one > result:
                    result = one
        return result

    def some(self, Py_ssize_t first, Py_ssize_t count):
        """`count` cells from `first` on as a list."""
        cdef Py_ssize_t i
        if first < 0 or count < 0 or first + count > self.count:
            raise IndexError(first)
        return [cell_get(self.base + i) for i in range(first, first + count)]

    def observer(self, Py_ssize_t at, bounds):
        """`Observer.observe` of a histogram in the cells from `at` on."""
        return Observer(self, at, bounds).observe

    def values(self):
        """All cells as a list."""
        cdef Py_ssize_t i
        return [cell_get(self.base + i) for i in range(self.count)]


cdef enum:
    BOUNDS = 24

cdef double ABSURD = 1e9


cdef class Observer:
    """Adds observations to a histogram: one cell for each of up to 24 `bounds` (upper, ascending), one for what is above them, and
    one for the sum, in millionths. What is negative, no number or absurd (above 1e9: 30 years, in seconds) is left out: a clock was
    set. IndexError where the cells are too few."""

    cdef Cells cells
    cdef int64_t *base
    cdef double bounds[BOUNDS]
    cdef Py_ssize_t count

    def __cinit__(self, Cells cells, Py_ssize_t at, bounds):
        self.count = len(bounds)
        if self.count > BOUNDS or at < 0 or at + self.count + 2 > cells.count:
            raise IndexError(at)
        for i, bound in enumerate(bounds):
            self.bounds[i] = bound
        self.cells = cells
        self.base = cells.base + at

    cpdef observe(self, double value):
        """Add an observation."""
        cdef Py_ssize_t i = 0
        if not 0.0 <= value <= ABSURD:
            return
        while i < self.count and value > self.bounds[i]:
            i += 1
        cell_add(self.base + i, 1)
        cell_add(self.base + self.count + 1, <int64_t> (value * 1e6 + 0.5))
