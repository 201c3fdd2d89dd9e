"""Messages to be searched, at random: all encodings and charsets, nested, damaged; and what may be looked for in them."""

import base64
import quopri
from random import Random

__all__ = ["search_text"]

CHARSETS = [
    "", "", "us-ascii", "utf-8", "UTF-8", "utf8", "iso-8859-1", "ISO-8859-15", "windows-1252", "koi8-r", "utf-16", "utf-7",
    "iso-2022-jp", "shift_jis", "gb2312", "big5", "unknown", "utf_8_sig", "cp037",
]  # fmt: skip
TYPES = ["text/plain", "text/html", "TEXT/Plain", "application/pdf", "image/png", "text", "x", "message/rfc822", "text/plain (a)"]
WORDS = [
    "the", "office", "of", "Zürich", "STRASSE", "Straße", "ﬃ", "K\u212b",
    "e\u0301", "é", "naïve", "Möwe", "a\u0308", "\u00a0", "x\u0323\u0307", "😀",
    "\u2013", "…", "½", "ｆｕｌｌ", "привет", "日本", "=?", "=", "=41", "--b", "a-b", "<p>", "&amp;", "\t", "  ", "\r\n", "\r\n ",
    "\n", "aaaa", "aaab", "İ", "ß", "K", "ﬁ", "²", "º", "\ufeff", "\u0130", "J\u030c", "\U0001d400", "\U0001f170",
]  # fmt: skip
FIELDS = [
    "Subject: the office\r\n", "Subject: =?utf-8?q?Z=C3=BCrich?=\r\n", "Subject: Zürich\r\n", "X-A: a\r\n b\r\n",
    "X-A: a\r\n\tthe\r\n",
    "No field\r\n", " folded\r\n", "Content-Description: the office\r\n", "To: office@far.example\r\n", "Content-Typed: text\r\n",
    "Content-Type : text/html\r\n", "content-type:text/plain;charset=utf-16\r\n",
    "Content-Type: text/plain;\r\n charset=utf-8\r\n",
    "Content-Type:\r\n", "--b\r\n", "X: \t \r\n", "Content-Type: image/png\r\n",
]  # fmt: skip


def _text(chance: Random, plain: bool) -> str:
    words = WORDS[:3] + WORDS[29:40] if plain else WORDS
    return "".join(chance.choice(words) + chance.choice(["", " ", " ", "\r\n"]) for _ in range(chance.choice([0, 1, 5, 40, 200])))


def _encoded(chance: Random, octets: bytes) -> tuple[str, bytes]:
    match chance.randrange(6):
        case 0:
            return "base64", base64.encodebytes(octets).replace(b"\n", b"\r\n")
        case 1:
            return "quoted-printable", quopri.encodestring(octets.replace(b"\r\n", b"\n")).replace(b"\n", b"\r\n")
        case 2:
            return chance.choice(["base64", "quoted-printable", "x-unknown"]), octets
        case _:
            return chance.choice(["", "7bit", "8bit"]), octets


def _part(chance: Random, depth: int) -> bytes:
    front = "".join(chance.choices(FIELDS, k=chance.choice([0, 0, 1, 3])))
    if depth and chance.random() < 0.5:
        mark = chance.choice(["b", "c", "d"])
        kind = chance.choice(["mixed", "alternative", "digest"])
        parts = b"".join(b"--%b\r\n%b\r\n" % (mark.encode(), _part(chance, depth - 1)) for _ in range(chance.randrange(4)))
        end = f"--{mark}--\r\n".encode() if chance.random() < 0.8 else b""
        return f"{front}Content-Type: multipart/{kind}; boundary={mark}\r\n\r\npreamble\r\n".encode() + parts + end
    if depth and chance.random() < 0.15:
        return f"{front}Content-Type: message/rfc822\r\n\r\n".encode() + _part(chance, depth - 1)
    charset = chance.choice(CHARSETS)
    try:
        octets = _text(chance, chance.random() < 0.5).encode(charset or "utf-8", "replace")
    except LookupError:
        octets = _text(chance, False).encode()
    encoding, octets = _encoded(chance, octets)
    named = chance.choice(["; charset={}", '; Charset="{}"', ";\r\n\tcharset={}"]).format(charset) if charset else ""
    kind = chance.choice([*["text/plain"] * 6, *TYPES]) + named
    header = f"Content-Type: {kind}\r\n" if chance.random() < 0.8 else ""
    header += f"Content-Transfer-Encoding: {encoding}\r\n" if encoding else ""
    return f"{front}{header}\r\n".encode() + octets


def _damaged(chance: Random, data: bytes) -> bytes:
    octets = bytearray(data)
    for _ in range(chance.choice([0, 0, 0, 1, 5])):
        at = chance.randrange(len(octets) + 1)
        match chance.randrange(3):
            case 0:
                octets[at:at] = chance.choice([b"\xff", b"\xc3", b"\0", b"\r\n", b"=", b"\xcc\x81", b"--b\r\n", b" "])
            case 1:
                del octets[at : at + chance.randrange(4)]
            case _:
                octets[at : at + 1] = bytes([chance.randrange(256)])
    return bytes(octets)


def search_text(chance: Random) -> tuple[bytes, list[str]]:
    """A message, and some needles, none of them empty."""
    data = _damaged(chance, _part(chance, chance.choice([0, 0, 1, 2, 3])))
    shown = data.decode("utf-8", "replace")
    needles = [chance.choice(WORDS), "".join(chance.choices(WORDS, k=2)), " ".join(chance.choices(WORDS, k=2))]
    for _ in range(4):
        at = chance.randrange(len(shown) + 1)
        needles.append(shown[at : at + chance.choice([1, 2, 4, 9])])
    return data, [chance.choice([one, one.upper(), one.lower()]) for one in needles if one]
