from libc.string cimport memcpy

cdef extern from *:
    """
    static const char words_pairs[] =
        "0001020304050607080910111213141516171819202122232425262728293031323334353637383940414243444546474849"
        "5051525354555657585960616263646566676869707172737475767778798081828384858687888990919293949596979899";
    static inline int words_lowest(unsigned long long n) { return __builtin_ctzll(n); }
    """
    const char *words_pairs
    int words_lowest(unsigned long long n) noexcept


cpdef inline unsigned int get32(const unsigned char *p, Py_ssize_t at) noexcept:
    """The little-endian number of 32 bits at p[at:]."""
    return (<unsigned int> p[at] | (<unsigned int> p[at + 1] << 8) | (<unsigned int> p[at + 2] << 16)
            | (<unsigned int> p[at + 3] << 24))


cpdef inline unsigned long long get64(const unsigned char *p, Py_ssize_t at) noexcept:
    """The little-endian number of 64 bits at p[at:]."""
    return <unsigned long long> get32(p, at) | (<unsigned long long> get32(p, at + 4) << 32)


cpdef inline void put32(unsigned char *w, Py_ssize_t at, unsigned int n) noexcept:
    """Write a number of 32 bits to w[at:], little-endian."""
    w[at] = <unsigned char> n
    w[at + 1] = <unsigned char> (n >> 8)
    w[at + 2] = <unsigned char> (n >> 16)
    w[at + 3] = <unsigned char> (n >> 24)


cpdef inline void put64(unsigned char *w, Py_ssize_t at, unsigned long long n) noexcept:
    """Write a number of 64 bits to w[at:], little-endian."""
    put32(w, at, <unsigned int> n)
    put32(w, at + 4, <unsigned int> (n >> 32))


cpdef inline Py_ssize_t digits(unsigned char *w, Py_ssize_t k, unsigned long long n) noexcept:
    """Write a number in decimal to w[k:]; the new k."""
    cdef unsigned char text[20]
    cdef int i = 20
    cdef unsigned int two, four
    while n >= 10000:
        four = <unsigned int> (n % 10000)
        n //= 10000
        i -= 4
        memcpy(text + i, words_pairs + 2 * (four // 100), 2)
        memcpy(text + i + 2, words_pairs + 2 * (four % 100), 2)
    two = <unsigned int> n
    while two >= 100:
        i -= 2
        memcpy(text + i, words_pairs + 2 * (two % 100), 2)
        two //= 100
    if two >= 10:
        i -= 2
        memcpy(text + i, words_pairs + 2 * two, 2)
    else:
        i -= 1
        text[i] = <unsigned char> (48 + two)
    memcpy(w + k, text + i, 20 - i)
    return k + 20 - i


cpdef inline int lowest(unsigned long long n) noexcept:
    """The number of the lowest bit of n, which is not 0."""
    return words_lowest(n)


cpdef inline Py_ssize_t seek(const unsigned char *u, Py_ssize_t at, Py_ssize_t total, unsigned int n) noexcept:
    """Of `total` packed ascending numbers the first from the one at `at` on that is not below n; `total` when there is none.
    The time is the logarithm of how far it is away."""
    cdef Py_ssize_t step = 1
    cdef Py_ssize_t high, middle
    while at + step <= total and get32(u, (at + step - 1) * 4) < n:
        at += step
        step += step
    high = at + step - 1 if at + step - 1 < total else total
    while at < high:
        middle = (at + high) >> 1
        if get32(u, middle * 4) < n:
            at = middle + 1
        else:
            high = middle
    return at
