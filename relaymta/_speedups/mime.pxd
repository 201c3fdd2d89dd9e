cimport cython

from relaymta._speedups._mem cimport find, same

cdef int TAB, LF, CR, SP, DASH
cdef Py_ssize_t HEADER_MOST, TURN, PARTS_TURN, FIELDS_MOST, PARAMETERS_MOST, KEPT_MOST, DEPTH_MOST, PARTS_MOST
cdef int LEAF, MULTIPART, MESSAGE, OPAQUE
cdef int IDENTITY, QUOTED_PRINTABLE, BASE64, OTHER
cdef int CONTENT_ENCODING, CONTENT_TYPE


@cython.final
cdef class Part:
    cdef readonly Py_ssize_t depth
    cdef readonly int kind
    cdef readonly Py_ssize_t header
    cdef readonly Py_ssize_t body
    cdef readonly Py_ssize_t end
    cdef readonly Py_ssize_t lines
    cdef readonly Py_ssize_t type
    cdef readonly Py_ssize_t type_end
    cdef readonly Py_ssize_t subtype
    cdef readonly Py_ssize_t subtype_end
    cdef readonly int encoding
    cdef readonly list parameters
    cdef readonly bytes boundary
    cdef readonly list fields
    cdef bint digest
    cdef bint filled
    cdef bint typed
    cdef bint encoded
    cdef Part outer


@cython.final
cdef class Scanner:
    cdef bytes data
    cdef Py_ssize_t size
    cdef list parts
    cdef list stack
    cdef dict open
    cdef Py_ssize_t lines
    cdef bint closing
    cdef Py_ssize_t kept

    @cython.locals(p="const unsigned char *", n=Py_ssize_t, pos=Py_ssize_t, i=Py_ssize_t, due=Py_ssize_t)
    cdef list run(self)

    @cython.locals(part=Part, encoded=bint, full=bint)
    cdef Py_ssize_t _begin(self, const unsigned char *p, Py_ssize_t pos, bint digest) except -1

    @cython.locals(part=Part)
    cdef int _finish(self, Py_ssize_t end, Py_ssize_t lines) except -1

    cdef int _close(self, Part part) except -1

    @cython.locals(part=Part, i=Py_ssize_t, stop=Py_ssize_t, end=Py_ssize_t)
    cdef Py_ssize_t _delimiter(self, const unsigned char *p, Py_ssize_t pos) except -2

    @cython.locals(part=Part)
    cdef Part _match(self, const unsigned char *p, Py_ssize_t pos, Py_ssize_t stop)

    @cython.locals(n=Py_ssize_t, pos=Py_ssize_t, number=int, start=Py_ssize_t, stop=Py_ssize_t, c="unsigned char", i=Py_ssize_t,
                   end=Py_ssize_t, colon=Py_ssize_t, due=Py_ssize_t)
    cdef Py_ssize_t _header(self, const unsigned char *p, Part part) except -1

    cdef int _field(self, const unsigned char *p, Part part, int number, Py_ssize_t start, Py_ssize_t stop) except -1

    @cython.locals(kind=Py_ssize_t, kind_end=Py_ssize_t, i=Py_ssize_t, sub=Py_ssize_t, parameters=list)
    cdef int _content_type(self, const unsigned char *p, Part part, Py_ssize_t pos, Py_ssize_t end) except -1


cpdef list scan(bytes data)

@cython.locals(p="const unsigned char *", found=list, name=Py_ssize_t, colon=Py_ssize_t, pos=Py_ssize_t, c="unsigned char",
               i=Py_ssize_t)
cpdef list fields(bytes data, Py_ssize_t start, Py_ssize_t end)

@cython.locals(p="const unsigned char *", pos=Py_ssize_t, i=Py_ssize_t)
cpdef tuple value(bytes data, Py_ssize_t start, Py_ssize_t end)

cdef int _as_text(Part part) except -1

@cython.locals(i=Py_ssize_t)
cdef Py_ssize_t _colon(const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) noexcept

cdef Py_ssize_t _name_end(const unsigned char *p, Py_ssize_t pos, Py_ssize_t colon) noexcept

@cython.locals(end=Py_ssize_t, size=Py_ssize_t, c="unsigned char")
cdef int _number(const unsigned char *p, Py_ssize_t pos, Py_ssize_t colon) except -2

@cython.locals(size=Py_ssize_t)
cdef int _content_number(const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) except -2

cdef int _encoding(const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) except -1

@cython.locals(depth=Py_ssize_t, c="unsigned char")
cdef Py_ssize_t _skip(const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) noexcept

cdef Py_ssize_t _token(const unsigned char *p, Py_ssize_t pos, Py_ssize_t end) noexcept

@cython.locals(found=list, name=Py_ssize_t, name_end=Py_ssize_t, start=Py_ssize_t, stop=Py_ssize_t)
cdef list _parameters(const unsigned char *p, Py_ssize_t pos, Py_ssize_t end)

@cython.locals(name=Py_ssize_t, name_end=Py_ssize_t, start=Py_ssize_t, stop=Py_ssize_t, text=bytes)
cdef bytes _boundary(const unsigned char *p, list parameters)
