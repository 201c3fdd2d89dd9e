cimport cython

from relaymta._speedups._mem cimport copy, cut, find, same
from relaymta._speedups._words cimport get32, put32
from relaymta._speedups.addresses cimport Addresses
from relaymta._speedups.mime cimport Part, scan, value
from relaymta._speedups.octets cimport Octets

cdef Py_ssize_t FIELDS_MOST, ADDRESSES_MOST, VALUE_MOST, TURN, TAGS_MOST, PLACE
cdef int LEAF, MULTIPART, MESSAGE, OPAQUE, FIELDS
cdef int DATE, SUBJECT, FROM, SENDER, REPLY_TO, TO, CC, BCC, IN_REPLY_TO, MESSAGE_ID
cdef int ID, DESCRIPTION, DISPOSITION, LANGUAGE, LOCATION, MD5, ENCODING
cdef bytes TAG


@cython.final
cdef class Writer:
    cdef bytes data
    cdef list parts
    cdef Octets out
    cdef Addresses addresses
    cdef bytearray places
    cdef unsigned char *first
    cdef unsigned int repeated
    cdef Py_ssize_t fields_left
    cdef Py_ssize_t addresses_left

    @cython.locals(first="unsigned char *", number=int, start=Py_ssize_t, end=Py_ssize_t, octets=Py_ssize_t)
    cdef Py_ssize_t index(self, list fields) except -1

    @cython.locals(out=Octets, start=Py_ssize_t)
    cdef int text(self, int number) except -1

    @cython.locals(out=Octets, start=Py_ssize_t, end=Py_ssize_t, number=int)
    cdef int envelope(self, list fields, Py_ssize_t room) except -1

    @cython.locals(out=Octets, begin=Py_ssize_t, one=int, start=Py_ssize_t, end=Py_ssize_t)
    cdef Py_ssize_t people(self, list fields, int number, Py_ssize_t room) except -1

    cdef Py_ssize_t read(self, Py_ssize_t start, Py_ssize_t end, Py_ssize_t room) except -1

    @cython.locals(out=Octets, part=Part, shown=bint)
    cdef Py_ssize_t part(self, Py_ssize_t number) except -1

    @cython.locals(part=Part)
    cdef Py_ssize_t depth(self, Py_ssize_t number) except -1

    cdef bint textual(self, Part part) except -1

    @cython.locals(part=Part, one=int, start=Py_ssize_t, end=Py_ssize_t)
    cdef Py_ssize_t message(self, Py_ssize_t number) except -1

    @cython.locals(out=Octets)
    cdef int body(self, Part part, bint shown) except -1

    @cython.locals(start=Py_ssize_t, end=Py_ssize_t)
    cdef int encoding(self) except -1

    @cython.locals(out=Octets, start=Py_ssize_t, end=Py_ssize_t, parameters=list)
    cdef int extension(self) except -1

    @cython.locals(out=Octets, tags="const unsigned char *", p="const unsigned char *", start=Py_ssize_t, begin=Py_ssize_t,
                   end=Py_ssize_t, tag=Py_ssize_t, i=Py_ssize_t)
    cdef int language(self) except -1

    @cython.locals(out=Octets, p="const unsigned char *", front=bytes, text=bytes, name=Py_ssize_t, name_end=Py_ssize_t,
                   start=Py_ssize_t, end=Py_ssize_t)
    cdef int parameters(self, list parameters) except -1

    @cython.locals(out=Octets, w="unsigned char *", k=Py_ssize_t, i=Py_ssize_t)
    cdef int lowered(self, Py_ssize_t start, Py_ssize_t end) except -1

    @cython.locals(out=Octets, part=Part, structure=Py_ssize_t, places=Py_ssize_t, k=Py_ssize_t)
    cdef tuple all(self)


@cython.locals(part=Part)
cpdef tuple describe(bytes data)

@cython.locals(out=bytearray, w="unsigned char *", k=Py_ssize_t, i=Py_ssize_t)
cdef bytes _unquoted(const unsigned char *p, Py_ssize_t start, Py_ssize_t end)
