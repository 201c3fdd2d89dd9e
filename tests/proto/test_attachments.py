"""The parts of a message as any mail reader may show them: as Python's parser has them where they are well-formed, and more."""

import base64
import io
import zipfile
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import SMTP

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaymta.proto.attachments import Limits, kinds_of, parts
from relaymta.proto.zip_names import zip_names

EXE = base64.b64encode(b"MZ\x90\0" + b"\0" * 60)
DISPOSITION = b"Content-Disposition: attachment; "


def split(data: bytes) -> tuple[bytes, bytes]:
    header, line, body = data.partition(b"\r\n\r\n")
    return header + line, body


def found(data: bytes, **limits: int):
    return parts(*split(data), Limits(**limits))


def names(data: bytes) -> set[str]:
    return {name for part in found(data).parts for name in part.names}


def kinds(data: bytes) -> set[str]:
    return {kind for part in found(data).parts for kind in part.kinds}


def zipped(*files: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for file in files:
            archive.writestr(zipfile.ZipInfo(file), "x")
    return out.getvalue()


def multipart(*pieces: bytes, boundary: bytes = b"=_bound", field: bytes = b"", end: bytes = b"--=_bound--\r\n") -> bytes:
    field = field or b'Content-Type: multipart/mixed; boundary="%b"' % boundary
    body = b"".join(b"--%b\r\n%b\r\n" % (boundary, piece) for piece in pieces)
    return field + b"\r\n\r\n" + body + end


def part(field: bytes, body: bytes = EXE, encoding: bytes = b"base64") -> bytes:
    return field + b"\r\nContent-Transfer-Encoding: " + encoding + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (b"filename=a.exe", "a.exe"),
        (b'filename="a.exe"', "a.exe"),
        (b"FileName = a.exe", "a.exe"),
        (b"filename=\"a.txt\"; filename=\"a.exe\"", "a.exe"),
        (b"filename=\"a.exe\"; filename=\"a.txt\"", "a.exe"),
        (b"filename=\"a.exe", "a.exe"),
        (b"filename=a.exe\"", "a.exe"),
        (b"filename='a.exe'", "a.exe"),
        (b"filename=a b.exe", "a b.exe"),
        (b'filename="a\\.e\\xe"', "a.exe"),
        (b'filename="a"".exe"', "a.exe"),
        (b'filename="a.txt; filename=a.exe"', "a.exe"),
        (b"size=1 filename=a.exe", "a.exe"),
        (b"(comment; filename=a.txt) filename=(x)a.exe", "a.exe"),
        (b"filename=a(x).exe", "a.exe"),
        (b"filename*=utf-8''a%2Eexe", "a.exe"),
        (b"filename*=a%2Eexe", "a.exe"),
        (b"filename*=utf-8'a%2Eexe", "a.exe"),
        (b"filename*=nonsense'en'a%2Eexe", "a.exe"),
        (b"filename*=utf-8''a.exe%", "a.exe%"),
        (b"filename=a%2Eexe", "a.exe"),
        (b'filename*0="a.";\r\n filename*1="exe"', "a.exe"),
        (b'filename*1="exe"; filename*0="a."', "a.exe"),
        (b'filename*0="a."; filename*2="exe"', "a.exe"),
        (b'filename*0="a.exe"; filename*2=".txt"', "a.exe"),
        (b'filename*1="a."; filename*2="exe"', "a.exe"),
        (b'filename*0="a.txt"; filename*0="a.exe"', "a.exe"),
        (b"filename*0*=utf-8''a%2E; filename*1*=e%78e", "a.exe"),
        (b"filename*0*=utf-8''a%2E; filename*1=exe", "a.exe"),
        (b'filename*00="a."; filename*01="exe"', "a.exe"),
        (b'filename="=?utf-8?B?YS5leGU=?="', "a.exe"),
        (b"filename==?utf-8?Q?a=2Eexe?=", "a.exe"),
        (b'filename="=?utf-8?Q?a?=\r\n =?utf-8?Q?.exe?="', "a.exe"),
        (b'filename*0="=?utf-8?Q?a"; filename*1=".exe?="', "a.exe"),
        (b'filename="a.\r\n exe"', "a.exe"),
        (b"filename=\r\n a.exe", "a.exe"),
        (b'filename="a.exe\0.txt"', "a.exe"),
        (b'filename="a.\1exe"', "a.exe"),
        (b'filename="a.exe."', "a.exe"),
        (b'filename="a.exe . "', "a.exe"),
        (b'filename="a.exe::$DATA"', "a.exe"),
        ('filename="a\u202egpj.exe"'.encode(), "agpj.exe"),
        ('filename="a\u202egpj.exe"'.encode(), "a\u202egpj.exe"),
        ('filename="a.e\u200bxe"'.encode(), "a.exe"),
        ('filename="a\uff0e\uff45\uff58\uff45"'.encode(), "a.exe"),
        (b"filename=\"..\\..\\a.exe\"", "a.exe"),
        (b"filename=\"/tmp/a.exe\"", "a.exe"),
        (b"filename=C:\\x\\a.exe", "a.exe"),
        (b"x=y; name=a.exe", "a.exe"),
        (b"filename=\xe4.exe", "ä.exe"),
    ],
)  # fmt: skip
def test_names_however_they_are_written(written, name):
    assert name in names(multipart(part(DISPOSITION + written)))
    assert name in names(multipart(part(b"Content-Type: application/x; " + written)))


NESTED = multipart(part(DISPOSITION + b"filename=a.exe"))
FILE = part(DISPOSITION + b"filename=a.exe")
B64 = b"Content-Transfer-Encoding: base64\r\n"


@pytest.mark.parametrize(
    "data",
    [
        multipart(FILE),
        multipart(FILE, end=b""),
        multipart(FILE).replace(b"\r\n--=_bound\r\n", b"\r\n--=_bound \t\r\n"),
        multipart(FILE).replace(b"\r\n--=_bound\r\n", b"\r\n--=_bounded\r\n"),
        multipart(FILE).replace(b"\r\n--=_bound\r\n", b"\r\nx--=_bound\r\n"),
        multipart(FILE, field=b"Content-Type: multipart/mixed; boundary=x\r\nContent-Type: multipart/x; boundary=\"=_bound\""),
        multipart(FILE, field=b"Content-Type: multipart/mixed; boundary=\"=_bound\"\r\nContent-Type: text/plain"),
        multipart(FILE, field=b"Content-Type: multipart/mixed; boundary=x; boundary=\"=_bound\""),
        multipart(FILE, field=b"Content-Type: multipart/mixed; boundary=\"=_bound\"; boundary=x"),
        multipart(FILE, field=b"Content-Type: multipart/mixed; boundary*=utf-8''%3D_bound"),
        multipart(FILE, field=b"Content-Type: multipart/mixed; boundary*0=\"=_bo\"; boundary*1=und"),
        multipart(FILE, field=b"Content-Type: multipart/mixed; boundary=\"=_bound"),
        multipart(FILE, field=b"Content-Type: multipart/mixed boundary==_bound"),
        multipart(FILE, field=b"content-type\t: multipart/mixed;\r\n\tboundary=\"=_bound\""),
        multipart(FILE, boundary=b"", field=b'Content-Type: multipart/mixed; boundary=""'),
        multipart(FILE, field=b"Content-Type: multipart/mixed"),
        multipart(FILE, boundary=b"x" * 200),
        multipart(FILE, boundary=b"a", end=b"--a--"),
        multipart(FILE, boundary=b"---", end=b""),
        multipart(b"\r\nx\r\n--=_bound--", FILE),
        multipart(b"Content-Type: multipart/mixed; boundary=inner\r\n\r\n--inner\r\n" + FILE + b"\r\n--inner--"),
        multipart(b"Content-Type: multipart/mixed; boundary==_bounded\r\n\r\n--=_bounded\r\n" + FILE),
        multipart(b"Content-Type: message/rfc822\r\n\r\n" + NESTED.replace(b"=_bound", b"other")),
        multipart(b"Content-Type: message/rfc822\r\n\r\n" + FILE),
        multipart(b"Content-Type: message/rfc822\r\n" + B64 + b"\r\n" + base64.encodebytes(NESTED)),
        multipart(b"Content-Type: message/partial; number=1\r\n\r\n" + FILE),
        multipart(b'Content-Type: application/x; name="x.eml"\r\n' + B64 + b"\r\n" + base64.encodebytes(NESTED)),
        b"Content-Type: multipart/mixed; boundary=x\r\n" + B64 + b"\r\n" + base64.encodebytes(b"--x\r\n" + FILE),
        b"Content-Type: multipart/mixed; boundary=x\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n=2D-x\r\n"
        + FILE.replace(b"=", b"=3D"),
        multipart(b"\r\n" + FILE),
        multipart(FILE.replace(b"\r\n\r\n", b"\r\n")),
        multipart(FILE.replace(b"\r\n\r\n", b"\r\n \r\n")),
        multipart(FILE).replace(b"\r\n", b"\n").replace(b"\n\n", b"\r\n\r\n", 1),
        multipart(FILE).replace(b"\r\n", b"\r").replace(b"\r\r", b"\r\n\r\n", 1),
        multipart(FILE.replace(b"base64", b"base64 (x)")),
        multipart(FILE.replace(b"base64", b'"BASE64"')),
        multipart(FILE.replace(b"base64", b"unheard-of")),
        multipart(FILE.replace(b"base64", b"7bit\r\nContent-Transfer-Encoding: base64")),
        multipart(FILE.replace(b"base64", b"base64\r\nContent-Transfer-Encoding: 7bit")),
        multipart(FILE.replace(b"TV", b"T!*\r\n\r\nV")),
        multipart(FILE.replace(b"TVqQ", b"TQ==WpA=")),
        multipart(FILE.rstrip(b"=")),
        multipart(FILE.replace(b"TVq", b"%" * 20000 + b"TVq")),
        multipart(FILE.replace(b"TV", b"T\r\n--_._._._.\r\n\r\nV"), boundary=b"_._._._", end=b""),
        multipart(part(DISPOSITION + b"filename=a.exe", b"MZ\x90", b"8bit")),
        multipart(part(DISPOSITION + b"filename=a.exe", b"M=5A=90", b"quoted-printable")),
        multipart(part(DISPOSITION + b"filename=a.txt\r\nContent-Type: text/plain; name=a.exe")),
        b"Subject: x\r\n\r\nhello\r\nbegin 644 a.exe\r\n#35J0\r\n`\r\nend\r\n",
        b"Subject: x\r\n" + B64 + b"\r\n" + base64.encodebytes(b"begin 644 a.exe\n#35J0\n`\nend\n"),
        b"Subject: x\r\n\r\nbegin-base64 644 a.exe\r\n" + EXE + b"\r\n====\r\n",
        b"Subject: x\r\n\r\n=ybegin line=128 size=3 name=a.exe\r\nw\x84\xba\r\n=yend size=3\r\n",
    ],
)  # fmt: skip
def test_structure_that_is_broken(data):
    assert "a.exe" in names(data)
    assert "program" in kinds(data)


@pytest.mark.parametrize(
    ("octets", "kind"),
    [
        (b"MZ", "program"), (b"\x7fELF", "program"), (b"#!/bin/sh", "program"), (b"\xcf\xfa\xed\xfe", "program"),
        (b"\xca\xfe\xba\xbe", "program"), (b"PK\3\4", "archive"), (b"Rar!\x1a\7\1", "archive"),
        (b"7z\xbc\xaf\x27\x1c", "archive"),
        (b"\x1f\x8b\x08", "archive"), (b"BZh9", "archive"), (b"\xfd7zXZ\0", "archive"), (b"MSCF", "archive"),
        (b"\0" * 257 + b"ustar", "archive"), (b"\0" * 32769 + b"CD001", "archive"), (b"\0" * 7 + b"**ACE**", "archive"),
        (b"\x60\xea", "archive"), (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "document"), (b"%PDF-1.4", "document"),
        (b"{\\rtf1", "document"), (b"\x89PNG\r\n\x1a\n", "image"), (b"\xff\xd8\xff\xe0", "image"), (b"GIF89a", "image"),
        (b"RIFF\0\0\0\0WEBP", "image"), (b"BM", "image"), (b"II*\0", "image"), (b"MM\0*", "image"),
    ],
)  # fmt: skip
def test_kinds_by_the_first_octets(octets, kind):
    assert kinds_of(octets) == {kind}
    assert kinds(multipart(part(b"Content-Type: a/b", base64.encodebytes(octets)))) == {kind}


def test_what_is_no_attachment_has_no_kind():
    assert kinds(b"Subject: x\r\n\r\nhello -- world\r\n") == set() == names(b"Subject: x\r\n\r\nbegin to work\r\n")


ZIP = zipped("dir/a.exe", "b.txt")


@pytest.mark.parametrize(
    "octets",
    [
        ZIP,
        b"MZ" + b"x" * 1000 + ZIP,
        b"GIF89a" + ZIP,
        ZIP[: ZIP.find(b"PK\1\2")],
        ZIP[ZIP.find(b"PK\1\2") :],
        ZIP.replace(b"dir/a.exe", b"dir/a.txt", 1),
        ZIP[: ZIP.rfind(b"a.exe")] + b"a.txt" + ZIP[ZIP.rfind(b"a.exe") + 5 :],
        ZIP + zipped("c.txt"),
        ZIP + b"x" * 100_000,
        zipped("x.zip").replace(b"x.zip", b"a.exe"),
    ],
)
def test_names_within_archives(octets):
    data = multipart(part(b"Content-Type: a/b; name=a.zip", base64.encodebytes(octets)))
    one = found(data).parts[1]
    assert "a.exe" in one.archived and not one.unlisted


def test_names_within_archives_are_limited():
    octets = zipped(*(f"{number}.txt" for number in range(20)))
    assert zip_names(octets, 20)[1] and len(zip_names(octets, 20)[0]) == 20
    assert not zip_names(octets, 19)[1]
    one = found(multipart(part(b"Content-Type: a/b", base64.encodebytes(octets))), archived=5).parts[1]
    assert one.unlisted and len(one.archived) == 5


def test_a_document_of_office_is_an_archive_and_a_document():
    octets = zipped("_rels/.rels", "[Content_Types].xml", "word/document.xml")
    assert kinds(multipart(part(b"Content-Type: a/b", base64.encodebytes(octets)))) == {"archive", "document"}


def test_limits_make_it_excessive():
    assert not found(multipart(FILE, FILE), parts=4).excessive
    few = found(multipart(*[FILE] * 5), parts=4)
    assert few.excessive and len(few.parts) == 4
    deep = b"Content-Type: message/rfc822\r\n\r\n" * 5 + b"Subject: x\r\n\r\n"
    assert not found(deep, depth=5).excessive and found(deep, depth=4).excessive
    many = b"Content-Type: text/plain" + b" name=x" * 3000 + b"\r\n\r\n"
    assert found(many).excessive


def test_texts_are_decoded():
    data = multipart(
        part(b"Content-Type: text/plain; charset=utf-8", base64.encodebytes("Grüße".encode())),
        part(b"Content-Type: text/html; charset=iso-8859-1", b"<b>Gr=FC</b>&szlig;e", b"quoted-printable"),
        part(b"Content-Type: application/x", b"none"),
    )
    assert [text.strip() for text in found(data).texts()] == ["Grüße", "<b>Grü</b>&szlig;e", "Grüße"]
    assert found(data).texts(3)[0] == "Gr\ufffd"


FILENAMES = st.text(st.sampled_from("abcXYZ019-_ äß€漢"), min_size=1, max_size=30).map(lambda text: text.strip() + ".bin")
FILES = st.lists(st.tuples(FILENAMES, st.binary(max_size=300)), max_size=4)


@settings(max_examples=60, deadline=None)
@given(FILES, st.booleans(), st.booleans())
def test_well_formed_messages_have_the_parts_that_the_standard_library_finds(files, nested, text):
    one = EmailMessage(policy=SMTP)
    one["Subject"] = "x"
    one.set_content("Grüße\r\n" if text else "hello\r\n")
    for name, octets in files:
        one.add_attachment(octets, maintype="application", subtype="octet-stream", filename=name)
    if nested:
        outer = EmailMessage(policy=SMTP)
        outer.set_content("outer\r\n")
        outer.add_attachment(one)
        one = outer
    data = one.as_bytes()
    expected = list(message_from_bytes(data).walk())
    made = found(data)
    assert not made.excessive
    assert len(made.parts) == len(expected)
    for there, wanted in zip(made.parts, expected, strict=True):
        assert (there.types[0] or "text/plain") == wanted.get_content_type()
        if not wanted.is_multipart():
            assert there.octets == wanted.get_payload(decode=True).replace(b"\n", b"\r\n").replace(b"\r\r\n", b"\r\n") or (
                there.octets == wanted.get_payload(decode=True)
            )
    assert {name for name, _ in files} <= {name for part in made.parts for name in part.names}
