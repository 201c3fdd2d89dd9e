"""Text of messages: content-transfer-encodings undone (RFC 2045 6.7, 6.8), and text found in any case.

Lenient, as programs that show mail are: nothing is an error, what cannot be decoded is left out (base64) or left as it is
(quoted-printable). Linear in the length of the data.
"""

from relaymta._speedups._mem import copy, find, lower

TAB, LF, CR, SP = 9, 10, 13, 32
NONE, PAD = 64, 65

_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
VALUES = bytes(_ALPHABET.index(octet) if octet in _ALPHABET else PAD if octet == ord("=") else NONE for octet in range(256))
HEX = bytes(int(chr(octet), 16) if chr(octet) in "0123456789abcdefABCDEF" else NONE for octet in range(256))


def base64(data):  # type: ignore[no-untyped-def]
    """What `data` is in base64. Octets that are not in its alphabet are passed over; behind padding it goes on (several pieces in
    a row, each with padding, are one text); an unfinished group gives the octets that are whole."""
    n = len(data)
    out = bytearray(n // 4 * 3 + 4)
    del out[from_base64(out, data, 0, n) :]
    return bytes(out)


def from_base64(w, p, pos, n):  # type: ignore[no-untyped-def]
    """Write what p[pos:n] is in base64 to w, which has room for three octets for each four begun: how many they are."""
    values = VALUES
    k = 0
    group = 0
    count = 0  # characters of the group at hand
    while pos < n:
        if count == 0 and pos + 4 <= n:
            a = values[p[pos]]
            b = values[p[pos + 1]]
            c = values[p[pos + 2]]
            d = values[p[pos + 3]]
            if a < NONE and b < NONE and c < NONE and d < NONE:
                w[k] = (a << 2 | b >> 4) & 255
                w[k + 1] = (b << 4 | c >> 2) & 255
                w[k + 2] = (c << 6 | d) & 255
                k += 3
                pos += 4
                continue
        a = values[p[pos]]
        pos += 1
        if a < NONE:
            group = group << 6 | a
            count += 1
            if count == 4:
                w[k] = group >> 16 & 255
                w[k + 1] = group >> 8 & 255
                w[k + 2] = group & 255
                k += 3
                group = 0
                count = 0
        elif a == PAD and count:
            k = _rest(w, k, group, count)
            group = 0
            count = 0
    return _rest(w, k, group, count)


def _rest(w, k, group, count):  # type: ignore[no-untyped-def]
    """Write the whole octets of an unfinished group; the new k."""
    if count == 2:
        w[k] = group >> 4 & 255
        return k + 1
    if count == 3:
        w[k] = group >> 10 & 255
        w[k + 1] = group >> 2 & 255
        return k + 2
    return k


def quoted_printable(data):  # type: ignore[no-untyped-def]
    """What `data` is in quoted-printable. White space at the end of a line is left out (6.7, rule 3), a "=" at the end of a line
    or of the data joins lines; any other "=" without two hexadecimal digits stands for itself."""
    n = len(data)
    out = bytearray(n)
    del out[from_quoted(out, data, 0, n) :]
    return bytes(out)


def from_quoted(w, p, pos, n):  # type: ignore[no-untyped-def]
    """Write what p[pos:n] is in quoted-printable to w, which has room for as many octets: how many they are."""
    digits = HEX
    k = 0
    while pos < n:
        i = find(p, LF, pos, n)
        stop = n if i < 0 else i  # the text of the line is p[pos:end]
        end = stop - 1 if i > pos and p[i - 1] == CR else stop
        line_end = end
        while end > pos and (p[end - 1] == SP or p[end - 1] == TAB):
            end -= 1
        joined = False
        while pos < end:
            j = find(p, ord("="), pos, end)
            if j < 0:
                k = copy(w, k, p, pos, end)
                break
            k = copy(w, k, p, pos, j)
            if j + 1 == end:
                joined = True
                break
            pos = j + 1
            if j + 2 < end and digits[p[j + 1]] < NONE and digits[p[j + 2]] < NONE:
                w[k] = digits[p[j + 1]] << 4 | digits[p[j + 2]]
                pos = j + 3
            else:
                w[k] = ord("=")
            k += 1
        if i < 0:
            break
        if not joined:
            k = copy(w, k, p, line_end, i + 1)
        pos = i + 1
    return k


def folded(data, unfold):  # type: ignore[no-untyped-def]
    """`data` with ASCII letters in lower case; `unfold`: without line ends in front of white space (RFC 5322 2.2.3)."""
    p = data
    n = len(data)
    out = bytearray(n)
    w = out
    k = unfolded(w, p, 0, n) if unfold else copy(w, 0, p, 0, n)
    lower(w, k)
    del out[k:]
    return bytes(out)


def unfolded(w, p, pos, n):  # type: ignore[no-untyped-def]
    """Write p[pos:n] without line ends in front of white space to w, which has room for as many octets: how many they are."""
    k = 0
    while pos < n:
        i = find(p, LF, pos, n)
        if i < 0:
            break
        stop = i + 1
        if stop < n and (p[stop] == SP or p[stop] == TAB):
            stop = i - 1 if i > pos and p[i - 1] == CR else i
        k = copy(w, k, p, pos, stop)
        pos = i + 1
    return copy(w, k, p, pos, n)


def holds(data, needle, unfold):  # type: ignore[no-untyped-def]
    """Whether `needle` (in lower case) is in what `folded` makes of `data`."""
    return needle in folded(data, unfold)
