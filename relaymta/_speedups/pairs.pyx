"""A table of pairs in shared memory, each a key and a value that change together (needs C, so it has no interpreted form).

A `Pairs` is a window of a buffer that several processes map. A pair is two int64, 16 octets that are read and written as one, by
the compare-and-swap of 16 octets that x86-64 and ARMv8 have. So a value is never seen, or left by a process that dies, beside a
key that it was not written with. All operations are sequentially consistent.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    typedef struct { int64_t key, value; } pair_t;
    static inline int64_t pair_key(pair_t *p) { return __atomic_load_n(&p->key, __ATOMIC_SEQ_CST); }
    static inline int64_t pair_used(pair_t *p, int64_t n) { return __atomic_add_fetch(&p->key, n, __ATOMIC_SEQ_CST); }
    #if defined(__x86_64__)
    static inline int pair_cas(pair_t *p, pair_t *was, pair_t now) {
        char done;
        __asm__ __volatile__("lock cmpxchg16b %1\\n\\tsete %0"
            : "=q"(done), "+m"(*p), "+a"(was->key), "+d"(was->value) : "b"(now.key), "c"(now.value) : "memory", "cc");
        return done;
    }
    #elif defined(__aarch64__)
    static inline int pair_cas(pair_t *p, pair_t *was, pair_t now) {
        unsigned __int128 before, after, there;
        memcpy(&before, was, 16);
        memcpy(&after, &now, 16);
        there = __sync_val_compare_and_swap((unsigned __int128 *) p, before, after);
        memcpy(was, &there, 16);
        return there == before;
    }
    #else
    #error "the table of pairs needs a compare-and-swap of 16 octets: x86-64 or ARMv8"
    #endif
    """
    ctypedef struct pair_t:
        int64_t key
        int64_t value
    int64_t pair_key(pair_t *p) nogil
    int64_t pair_used(pair_t *p, int64_t n) nogil
    bint pair_cas(pair_t *p, pair_t *was, pair_t now) nogil

cdef enum:
    RUN = 8  # rows beside each other: two cache lines

cdef int64_t SECOND = <int64_t> (<uint64_t> 1 << 63)


cdef class Pairs:
    """`buffer[offset : offset + 16 * (rows + 1)]` as `rows` pairs, and one for the number of those in use. A row is in use if its
    key is not 0. A key, 1 to 2^63 - 1, has its place in one of two runs of up to RUN rows, which follow from it. ValueError when they lie outside
    of the buffer, or are not aligned to 16 octets. IndexError for a row outside of them."""

    cdef Py_buffer view
    cdef pair_t *base
    cdef readonly Py_ssize_t rows
    cdef Py_ssize_t run, runs

    def __cinit__(self, buffer, Py_ssize_t offset, Py_ssize_t rows):
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        if offset < 0 or rows < 1 or offset > self.view.len or rows >= (self.view.len - offset) // 16:
            raise ValueError("pairs lie outside of the buffer")
        if (<uintptr_t> self.view.buf + <uintptr_t> offset) % 16:
            raise ValueError("pairs are not aligned to 16 octets")
        self.base = <pair_t *> (<char *> self.view.buf + offset)
        self.run = min(<Py_ssize_t> RUN, rows)
        self.runs = rows // self.run
        self.rows = self.run * self.runs

    def __dealloc__(self):
        if self.view.buf is not NULL:
            PyBuffer_Release(&self.view)

    cdef inline void _places(self, int64_t key, Py_ssize_t *first, Py_ssize_t *second) noexcept nogil:
        """The first rows of the runs of a key; the same one twice where there is only one run."""
        cdef uint64_t bits = <uint64_t> key
        first[0] = <Py_ssize_t> (bits % <uint64_t> self.runs)
        second[0] = <Py_ssize_t> ((bits >> 31) % <uint64_t> self.runs)
        if first[0] == second[0]:
            second[0] = (second[0] + 1) % self.runs
        first[0] *= self.run
        second[0] *= self.run

    cdef Py_ssize_t _find(self, int64_t key) noexcept nogil:
        cdef Py_ssize_t first = 0, second = 0, i
        self._places(key, &first, &second)
        for i in range(first, first + self.run):
            if pair_key(self.base + i) == key:
                return i
        for i in range(second, second + self.run):
            if pair_key(self.base + i) == key:
                return i
        return -1

    cdef Py_ssize_t _free(self, int64_t key) noexcept nogil:
        """A free row of the run that has more of them: so that both are full as late as possible."""
        cdef Py_ssize_t first = 0, second = 0, i, one = -1, other = -1, ones = 0, others = 0
        self._places(key, &first, &second)
        for i in range(first + self.run - 1, first - 1, -1):
            if pair_key(self.base + i) == 0:
                one = i
                ones += 1
        for i in range(second + self.run - 1, second - 1, -1):
            if pair_key(self.base + i) == 0:
                other = i
                others += 1
        return one if ones >= others else other

    cdef pair_t _read(self, Py_ssize_t row) noexcept nogil:
        """Both halves at one time: a compare-and-swap of nothing by nothing, which fails with what is there."""
        cdef pair_t nothing, there
        nothing.key = nothing.value = 0
        there = nothing
        pair_cas(self.base + row, &there, nothing)
        return there

    cdef bint _swap(self, Py_ssize_t row, pair_t was, pair_t now) noexcept nogil:
        cdef bint freed = was.key != 0 and now.key == 0, taken = was.key == 0 and now.key != 0
        if not pair_cas(self.base + row, &was, now):
            return False
        if freed or taken:
            pair_used(self.base + self.rows, 1 if taken else -1)
        return True

    cpdef Py_ssize_t find(self, int64_t key) except? -2:
        """The row of a key, the first if it has several; -1: it has none. The key is not 0."""
        return self._find(key)

    cpdef Py_ssize_t free(self, int64_t key) except? -2:
        """A free row in which a key may be put; -1: there is none."""
        return self._free(key)

    cpdef tuple get(self, Py_ssize_t row):
        """(key, value) of a row, as they were at one time."""
        cdef pair_t there
        if row < 0 or row >= self.rows:
            raise IndexError(row)
        there = self._read(row)
        return there.key, there.value

    cpdef bint swap(self, Py_ssize_t row, int64_t key, int64_t value, int64_t new_key, int64_t new_value) except? -1:
        """Store the new key and value if the row holds the old ones; returns whether it did."""
        cdef pair_t was, now
        if row < 0 or row >= self.rows:
            raise IndexError(row)
        was.key, was.value, now.key, now.value = key, value, new_key, new_value
        return self._swap(row, was, now)

    def near(self, int64_t key):
        """(lower half of the value, upper half, row, key) of all rows in which a key may be put."""
        cdef Py_ssize_t first = 0, second = 0, i, n
        cdef pair_t there
        self._places(key, &first, &second)
        found = []
        for n in range(self.run if first == second else 2 * self.run):
            i = first + n if n < self.run else second + n - self.run
            there = self._read(i)
            found.append((<uint32_t> there.value, <uint32_t> (<uint64_t> there.value >> 32), i, there.key))
        return found

    def used(self):
        """How many rows are in use. A process that was killed may have left it wrong by one."""
        return max(0, min(self.rows, pair_key(self.base + self.rows)))

    def dump(self):
        """The rows in use, each as 16 octets (key, value; in the order of this machine). The key's sign tells the second of its
        runs from the first. Runs without the GIL."""
        cdef Py_ssize_t i, first = 0, second = 0, count = 0, filled = 0
        cdef pair_t there
        cdef pair_t *out
        if pair_key(self.base + self.rows) <= 0:
            return b""  # without a look at any row: memory that was never touched stays so
        with nogil:
            for i in range(self.rows):
                count += pair_key(self.base + i) != 0
        octets = PyBytes_FromStringAndSize(NULL, 16 * count)
        out = <pair_t *> PyBytes_AS_STRING(octets)
        with nogil:
            for i in range(self.rows):
                if filled == count:  # the others were put meanwhile
                    break
                there = self._read(i)
                if there.key != 0:
                    self._places(there.key, &first, &second)
                    if i < first or i >= first + self.run:
                        there.key |= SECOND
                    memcpy(out + filled, &there, 16)
                    filled += 1
        return octets if filled == count else octets[: 16 * filled]

    def load(self, bytes octets, Py_ssize_t start):
        """Put the pairs that `dump()` returned, which stand in `octets` from `start` on: into free rows, or in place of one whose
        lower half of the value is less. A key that is there stays as it is. Half of a pair at the end, and keys and values of 0,
        are left out. Runs without the GIL. IndexError for a negative `start`."""
        cdef const char *data = PyBytes_AS_STRING(octets)
        cdef Py_ssize_t at, end = PyBytes_GET_SIZE(octets)
        cdef pair_t new
        if start < 0:
            raise IndexError(start)
        with nogil:
            at = start
            while at <= end - 16:
                memcpy(&new, data + at, 16)
                if new.key & ~SECOND != 0 and new.value != 0:
                    self._load(new)
                at += 16

    cdef void _load(self, pair_t new) noexcept nogil:
        """Into the run that it was in, if there is room: so a table that was full fits into an empty one."""
        cdef Py_ssize_t first = 0, second = 0, row
        cdef bint was_second = new.key < 0
        cdef pair_t was
        new.key &= ~SECOND
        if self._find(new.key) >= 0:
            return
        self._places(new.key, &first, &second)
        row = self._free_in(second if was_second else first)
        if row < 0:
            row = self._free_in(first if was_second else second)
        was.key = was.value = 0
        if row < 0:
            row = self._least(first, second)
            was = self._read(row)
            if <uint32_t> was.value >= <uint32_t> new.value:
                return
        self._swap(row, was, new)  # where another process was faster, the pair is left out

    cdef Py_ssize_t _free_in(self, Py_ssize_t start) noexcept nogil:
        cdef Py_ssize_t i
        for i in range(start, start + self.run):
            if pair_key(self.base + i) == 0:
                return i
        return -1

    cdef Py_ssize_t _least(self, Py_ssize_t first, Py_ssize_t second) noexcept nogil:
        """The row of two runs that has the least lower half of its value."""
        cdef Py_ssize_t i, n, found = -1
        cdef uint32_t value, least = 0
        for n in range(2 * self.run):
            i = first + n if n < self.run else second + n - self.run
            value = <uint32_t> self._read(i).value
            if found < 0 or value < least:
                found, least = i, value
        return found
