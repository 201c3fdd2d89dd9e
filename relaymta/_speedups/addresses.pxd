cimport cython

from relaymta._speedups._mem cimport copy, find
from relaymta._speedups.octets cimport Octets

cdef int TAB, SP
cdef Py_ssize_t ADDRESSES_MOST, QUOTED_MOST
cdef int ATOM, DOMAIN, QUOTED, BREAK, LITERAL
cdef bytes CLASSES


@cython.final
cdef class Text:
    cdef bytearray octets
    cdef unsigned char *w
    cdef Py_ssize_t size
    cdef Py_ssize_t k
    cdef Py_ssize_t at
    cdef Py_ssize_t start
    cdef Py_ssize_t end

    cdef int begin(self, Py_ssize_t room) except -1

    @cython.locals(w="unsigned char *")
    cdef void strip(self, Py_ssize_t start, Py_ssize_t end) noexcept

    @cython.locals(w="unsigned char *", k=Py_ssize_t, begin=Py_ssize_t, last=Py_ssize_t, dot=Py_ssize_t, i=Py_ssize_t)
    cdef void join(self, Py_ssize_t start, Py_ssize_t end) noexcept


@cython.final
cdef class Addresses:
    cdef Octets out
    cdef Py_ssize_t count
    cdef Text name
    cdef Text within
    cdef Text route
    cdef Text comment
    cdef bint words
    cdef bint angle
    cdef bint angled
    cdef bint begun
    cdef bint routed
    cdef Py_ssize_t route_end
    cdef Py_ssize_t behind_route

    cdef int prepare(self) except -1

    @cython.locals(i=Py_ssize_t, group=bint)
    cdef int write(self, const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) except -1

    @cython.locals(classes="const unsigned char *", out=Octets, w="unsigned char *", start=Py_ssize_t, i=Py_ssize_t, quoted=bint,
                   stop=Py_ssize_t, local=Py_ssize_t, local_end=Py_ssize_t, angle=bint, domain=Py_ssize_t, k=Py_ssize_t)
    cdef Py_ssize_t common(self, const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) except -2

    @cython.locals(spaced=bint, i=Py_ssize_t, c="unsigned char")
    cdef Py_ssize_t element(self, const unsigned char *p, Py_ssize_t start, Py_ssize_t end) except -1

    @cython.locals(classes="const unsigned char *", into=Text, w="unsigned char *", k=Py_ssize_t, begin=Py_ssize_t,
                   c="unsigned char", stop=Py_ssize_t)
    cdef Py_ssize_t read_word(self, const unsigned char *p, Py_ssize_t start, Py_ssize_t i, Py_ssize_t end, bint spaced) except -1

    @cython.locals(within=Text, route=Text)
    cdef int read_route(self, unsigned char c, Py_ssize_t begin, Py_ssize_t room) except -1

    @cython.locals(comment=Text, stop=Py_ssize_t, w="unsigned char *", k=Py_ssize_t)
    cdef Py_ssize_t read_comment(self, const unsigned char *p, Py_ssize_t i, Py_ssize_t end) except -1

    @cython.locals(out=Octets, name=Text, text=Text, at=Py_ssize_t)
    cdef int mailbox(self) except -1

    @cython.locals(out=Octets)
    cdef int group(self, bint within) except -1

    cdef int group_end(self) except -1


cdef Py_ssize_t _behind_space(const unsigned char *p, Py_ssize_t i, Py_ssize_t end) noexcept

@cython.locals(classes="const unsigned char *", stop=Py_ssize_t)
cdef Py_ssize_t _behind_literal(const unsigned char *p, Py_ssize_t i, Py_ssize_t end) noexcept

@cython.locals(depth=Py_ssize_t, c="unsigned char")
cdef Py_ssize_t _behind_comment(const unsigned char *p, Py_ssize_t i, Py_ssize_t end) noexcept
