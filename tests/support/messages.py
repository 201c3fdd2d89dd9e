"""Messages that break the rules, by what is wrong with them, and some that do not."""

__all__ = ["ATTACHED", "NASTY", "crlf"]


def crlf(text: str) -> bytes:
    """Text with CRLF at the ends of its lines."""
    return text.replace("\n", "\r\n").encode("latin-1")


_MIXED = "Content-Type: multipart/mixed; boundary=b\n\n"

# The example of RFC 9051 6.4.5.1.
ATTACHED = crlf(
    """\
From: a@b.test
Content-Type: multipart/mixed; boundary=o

preamble
--o

one
--o
Content-Type: application/octet-stream
Content-Transfer-Encoding: base64

dHdv
--o
Content-Type: message/rfc822

Subject: three
Content-Type: multipart/mixed; boundary=i

--i
Content-Type: text/plain

three.one
--i
Content-Type: application/octet-stream

three.two
--i--
--o
Content-Type: multipart/mixed; boundary=f

--f
Content-Type: image/gif
Content-ID: <four.one>

four.one
--f
Content-Type: message/rfc822

Subject: four.two
Content-Type: multipart/mixed; boundary=m

--m

four.two.one
--m
Content-Type: multipart/alternative; boundary=n

--n

four.two.two.one
--n
Content-Type: text/richtext

four.two.two.two
--n--
--m--
--f--
--o--
epilogue
"""
)

NASTY: dict[str, bytes] = {
    "nothing": b"",
    "an empty line": b"\r\n",
    "a header without an empty line": b"Subject: x\r\nFrom: a@b.test",
    "no header": b"just text\r\n\r\nand more",
    "an empty line first": b"\r\nbody",
    "bare LFs": crlf(_MIXED + "--b\n\nx\n--b--\n").replace(b"\r\n", b"\n"),
    "bare CRs": crlf(_MIXED + "--b\n\nx\n--b--\n").replace(b"\r\n", b"\r"),
    "NULs": b"Subject: a\0b\r\nFrom: \0 <a\0@b>\r\nTo: \"\0\" <c@d>\r\nContent-Type: text/plain; a=\"\0\"\r\n\r\n\0",
    "NULs everywhere": b"\0" * 100,
    "no last delimiter": crlf(_MIXED + "--b\n\nx\n"),
    "no delimiter": crlf(_MIXED + "x\n"),
    "a last delimiter alone": crlf(_MIXED + "--b--\n"),
    "delimiters alone": crlf(_MIXED + "--b\n--b\n--b\n"),
    "an outer delimiter within": crlf(
        _MIXED + "--b\nContent-Type: multipart/mixed; boundary=c\n\n--c\n\nx\n--b\n\ny\n--c\n\nz\n--b--\n--b\n"
    ),
    "a boundary that another begins with": crlf(
        "Content-Type: multipart/mixed; boundary=bb\n\n--bb\n"
        "Content-Type: multipart/mixed; boundary=b\n\n--b\n\nx\n--bb\n\ny\n--bb--\n"
    ),
    "a boundary that ends in dashes": crlf('Content-Type: multipart/mixed; boundary="b--"\n\n--b--\n\nx\n--b----\n'),
    "the same boundary within": crlf(_MIXED + "--b\n" + _MIXED + "--b\n\nx\n--b--\n\ny\n--b--\n"),
    "white space behind delimiters": crlf(_MIXED + "--b \t\n\nx\n--b-- \n"),
    "a delimiter within a header": crlf(_MIXED + "--b\nContent-Type: text/html\n--b\nContent-Type: message/rfc822\n--b--\n"),
    "a delimiter within an attached header": crlf(_MIXED + "--b\nContent-Type: message/rfc822\n\nSubject: x\n--b--\n"),
    "no boundary": b"Content-Type: multipart/mixed\r\n\r\n--\r\n\r\nx\r\n----\r\n",
    "an empty boundary": b'Content-Type: multipart/mixed; boundary=""\r\n\r\n--\r\n\r\nx\r\n----\r\n',
    "half a quoted boundary": b'Content-Type: multipart/mixed; boundary="b\r\n\r\n--b\r\n\r\nx\r\n',
    "a folded boundary": b'Content-Type: multipart/mixed; boundary="b\r\n c"\r\n\r\n--b c\r\n\r\nx\r\n',
    "two Content-Types": b"Content-Type: text/html\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nx",
    "a type of 8-bit": b"Content-Type: \xff/\xfe; \xfd=\xfc\r\n\r\nx",
    "a type without subtype": b"Content-Type: text\r\n\r\nx",
    "a type in a comment": b"Content-Type: (text/html) (a \\) (b)) image/(x)png(y); (z) a=b\r\n\r\nx",
    "a comment without end": b"Content-Type: text/html; (a=b\r\nFrom: (a@b.test\r\n\r\nx",
    "a quote without end": b'Content-Type: text/html; a="b\r\nFrom: "a <b@c.test>\r\nTo: <"x\r\n\r\nx',
    "an attached message in base64": b"Content-Type: message/rfc822\r\n"
    b"Content-Transfer-Encoding: base64\r\n\r\nU3ViamVjdDogeA0K\r\n",
    "an attached message of nothing": b"Content-Type: message/rfc822\r\n\r\n",
    "an attached message in UTF-8": "Content-Type: message/global\r\n\r\nSubject: \u00e4\r\n\r\n\u00f6".encode(),
    "messages within messages": b"Content-Type: message/rfc822\r\n\r\n" * 150,
    "multiparts within multiparts": b"".join(b"Content-Type: multipart/mixed; boundary=%d\r\n\r\n--%d\r\n" % (n,
    n) for n in range(150)),
    "a digest": crlf("Content-Type: multipart/digest; boundary=b\n\n"
        "--b\n\nFrom: a@b.test\n\nx\n--b\n--b\nContent-Type: text/html\n\n--b--\n"),
    "an unknown encoding": b"Content-Transfer-Encoding: x-uuencode\r\n\r\nbegin\r\n",
    "an empty encoding": b"Content-Transfer-Encoding:\r\n\r\nx",
    "an encoding with more": b"Content-Transfer-Encoding: (x) BASE64; (y)\r\n\r\neA==",
    "8-bit everywhere": bytes(range(128, 256))
    + b": x\r\nSubject: \xe4\r\nFrom: \xf6 <\xfc@\xe9>\r\nContent-ID: \xe4\r\n\r\n\xff",
    "names of the same field": b"From: a@b.test\r\nFROM: c@d.test\r\nFrom : e@f.test\r\nSubject: 1\r\nSubject: 2\r\n\r\n",
    "extension data": b'Content-Type: text/plain\r\nContent-MD5: Q2hlY2s=\r\n'
    b'Content-Disposition: Attachment; FileName="a\\"b"\r\n'
    b"Content-Language: en, de-AT (x)\r\nContent-Location: http://x.test/\r\n y\r\nContent-ID: <1@x.test>\r\n"
    b"Content-Description: a\r\n  b\r\n\r\nx\r\n",
    "empty fields": b"".join(
        name + b":\r\n"
        for name in (b"From", b"To", b"Subject", b"Sender", b"Date", b"Content-Type", b"Content-Disposition", b"Content-ID",
        b"Content-MD5")
    ),
    "a long subject": b"Subject: " + b"x" * 3000 + b"\r\nContent-Type: text/plain; a=" + b"y" * 2000 + b"\r\n\r\n",
    "an attached tree": ATTACHED,
}  # fmt: skip
