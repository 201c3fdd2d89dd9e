"""The MIME scanner against a naive oracle, against Python's email package, and on messages that break the rules."""

import email
import re
from email.message import Message

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relaymta._speedups import mime as compiled
from relaymta.proto.mime_envelope import FIELDS
from tests.speedups import mime_oracle
from tests.speedups.mime_oracle import LEAF, MESSAGE, MULTIPART, OPAQUE
from tests.speedups.test_smtp import interpreted_twin

KERNELS = [pytest.param(compiled, id="compiled"), pytest.param(interpreted_twin("mime"), id="interpreted")]

TYPES = [
    b"multipart/mixed; boundary=a", b'multipart/mixed; boundary="a"', b"Multipart/Alternative; charset=x; BOUNDARY=ab",
    b"text/html",
    b"multipart/digest; boundary=b", b"multipart/mixed", b"multipart/mixed; boundary=", b"message/rfc822", b"message/global",
    b"text",
    b'multipart/mixed; boundary="a--"', b'multipart/mixed;\r\n boundary="a b "', b"message/partial; id=1", b"/",
    b"text/plain; a=b;",
    b'multipart/mixed; boundary="a b', b"multipart/mixed; boundary = ab ; x", b"text/plain charset=x",
    b"(text/html) multipart (a/b) / mixed (;) ; (b) boundary (c) = (d) a (e)",
    b'text/plain; a="', b"(a",
    b'multipart/mixed; boundary="\\a"', b"multipart/mixed; x=(;boundary=b",
]  # fmt: skip
LINES = [
    b"", b"text", b"--a", b"--a--", b"--ab", b"--ab--", b"--b", b"--b--", b"--a b", b"--a \t", b"--", b"----", b" folded",
    b"\tfolded",
    b"Subject: x", b"From: a@b.test", b"To : c", b"X-Y: z", b"no field", b":", b"a\rb", b"\0", b"\xff: \xff", b"--a: x",
    b"--a--b",
    b"Content-Transfer-Encoding: base64", b"content-transfer-encoding:8bit", b"Content-ID: <1>", b" ", b"\r", b"Content-MD5:",
    *(b"Content-Type: " + one for one in TYPES), b"CONTENT-TYPE:message/rfc822", b"Content-Type: multipart/mixed; boundary=a",
]  # fmt: skip
DATA = st.lists(
    st.tuples(st.sampled_from(LINES), st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r\n\r\n"])).map(b"".join), max_size=30
).map(b"".join)
CUT = st.integers(0, 3)


def found(kernel, data: bytes) -> list[mime_oracle.Node]:
    """What the scanner finds, in the oracle's form."""
    return [
        mime_oracle.Node(
            part.depth, part.kind, part.header, part.body, part.end, part.lines, part.encoding, part.boundary,
            data[part.type : part.type_end] + b"/" + data[part.subtype : part.subtype_end] if part.type >= 0 else None,
            [(FIELDS[number], data[start:end]) for number, start, end in part.fields],
        )
        for part in kernel.scan(data)
    ]  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=DATA, cut=CUT)
@example(data=b"", cut=0)
@example(data=b"\n", cut=0)
@example(
    data=b"Content-Type: multipart/mixed; boundary=a\r\n\r\n--a\r\nContent-Type: multipart/mixed; boundary=a\r\n\r\n--a--\r\n--a",
    cut=0,
)
@example(data=b"Content-Type: message/rfc822\r\n\r\nContent-Type: message/rfc822", cut=0)
def test_parts_are_those_of_the_oracle(kernel, data, cut):
    data = data[: len(data) - cut]
    assert found(kernel, data) == mime_oracle.parts(data)


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=DATA)
def test_fields_are_those_of_the_oracle(kernel, data):
    expected = []
    for one in re.finditer(rb"(?:[^\n]*\n|[^\n]+\Z)(?:[ \t][^\n]*(?:\n|\Z))*", data):
        if one[0].startswith((b"\n", b"\r\n")):
            break
        match = re.match(rb"([!-9;-~]+)[ \t]*:", one[0])
        if match is not None:
            expected.append((match[1], one[0][match.end() :]))
    assert [(data[a:b], data[c:d]) for a, b, c, d in kernel.fields(data, 0, len(data))] == expected


@st.composite
def bodies(draw, depth: int = 0) -> bytes:
    """A well-formed part: header, empty line, body."""
    kind = draw(st.sampled_from(["text", "base64", "message", "multipart", "digest"] if depth < 4 else ["text", "base64"]))
    extra = draw(st.sampled_from([b"", b"Subject: x\r\n y\r\n", b"Content-ID: <a@b>\r\n", b"Content-Description: (x) y\r\n"]))
    if kind == "text":
        text = draw(st.text("ab-=. \t\r\nä", max_size=60)).replace("\r", "").replace("\n", "\r\n").encode()
        return extra + b"Content-Type: text/plain; charset=utf-8 (x)\r\nContent-Transfer-Encoding: 8bit\r\n\r\n" + text
    if kind == "base64":
        encoded = email.base64mime.body_encode(draw(st.binary(max_size=150)), eol="\r\n").encode()
        return extra + b'Content-Type: application/x; name="a (b\\" c"\r\nContent-Transfer-Encoding: base64\r\n\r\n' + encoded
    if kind == "message":
        return extra + b"Content-Type: message/rfc822\r\n\r\n" + draw(bodies(depth + 1))
    boundary = b"%s%d" % (draw(st.sampled_from([b"=_x y", b"b", b"--"])), depth)
    parts = draw(st.lists(bodies(depth + 1), min_size=1, max_size=3))
    if kind == "digest":
        parts = [b"\r\n" + one for one in parts]
    subtype = b"digest" if kind == "digest" else b"mixed"
    front, back = draw(st.sampled_from([b"", b"preamble\r\n"])), draw(st.sampled_from([b"", b"\r\n", b"\r\nepilogue\r\n"]))
    inner = b"".join(b"--" + boundary + b"\r\n" + one + b"\r\n" for one in parts)
    return (
        extra
        + b'Content-Type: multipart/%s;\r\n\tboundary="%s"\r\n\r\n' % (subtype, boundary)
        + front
        + inner
        + b"--"
        + boundary
        + b"--"
        + back
    )


def flat(message: Message, depth: int = 0) -> list[tuple[int, str, list[tuple[str, str]], bytes | None]]:
    """The parts of a parsed message: depth, type, header, and the body of a leaf."""
    inner = message._payload
    leaf = not isinstance(inner, list)
    body = inner.encode("ascii", "surrogateescape") if leaf else None
    own = [(depth, message.get_content_type(), [(name, str(value)) for name, value in message.raw_items()], body)]
    return own if leaf else own + [one for part in inner for one in flat(part, depth + 1)]


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=bodies())
def test_well_formed_messages_are_as_for_pythons_email(kernel, data):
    expected = flat(email.message_from_bytes(data))
    parts = kernel.scan(data)
    assert [(part.depth, shown_type(data, part)) for part in parts] == [one[:2] for one in expected]
    for part, (_, _, header, body) in zip(parts, expected, strict=True):
        fields = [(data[a:b], data[c:d]) for a, b, c, d in kernel.fields(data, part.header, part.body)]
        assert [name for name, _ in fields] == [name.encode() for name, _ in header]
        assert [value.strip() for _, value in fields] == [value.encode("utf-8", "surrogateescape").strip() for _, value in header]
        assert body is None or data[part.body : part.end] == body
        assert part.lines == data.count(b"\n", part.body, part.end)


def shown_type(data: bytes, part) -> str:
    if part.type < 0:
        return "message/rfc822" if part.kind == MESSAGE else "text/plain"
    return (data[part.type : part.type_end] + b"/" + data[part.subtype : part.subtype_end]).lower().decode()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b" attachment", (b"attachment", None)),
        (b"attachment; filename=a.txt", (b"attachment", [(b"filename", b"a.txt")])),
        (b' inline (x) ; a = "b;\\"c" (y;z=1); d=e', (b"inline", [(b"a", b'b;\\"c'), (b"d", b"e")])),
        (b"x; =y; ; z; a/b=c; d==e=f (g); h=", (b"x", [(b"d", b"=e=f"), (b"h", b"")])),
        (b'x; a="b', (b"x", [(b"a", b"b")])),
        (b'x; a="b\\', (b"x", [(b"a", b"b\\")])),
        (b"x; a=b(1).pdf", (b"x", [(b"a", b"b(1).pdf")])),
        (b"(((", (b"", None)),
        (b"x; (\\)y=1) z=2", (b"x", [(b"z", b"2")])),
        (b"x;\r\n\ta=b;\r\n c=d\r\n", (b"x", [(b"a", b"b"), (b"c", b"d")])),
        (b"", (b"", None)),
    ],
)
def test_a_value_with_parameters(kernel, text, expected):
    data = b"[" + text + b"]"
    start, end, parameters = kernel.value(data, 1, len(data) - 1)
    shown = parameters and [(data[a:b], data[c:d]) for a, b, c, d in parameters]
    assert (data[start:end], shown) == expected


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=st.binary(max_size=80) | st.text('a;="\\( )\r\n/', max_size=40).map(str.encode))
def test_a_value_of_any_octets(kernel, data):
    start, end, parameters = kernel.value(data, 0, len(data))
    assert 0 <= start <= end <= len(data)
    places = [place for one in parameters or [] for place in one]
    assert places == sorted(places) and all(0 <= place <= len(data) for place in places)
    assert [(data[a:b], data[c:d]) for a, b, c, d in parameters or []] == mime_oracle.parameters(mime_oracle.token(data)[1])


def nested(depth: int) -> bytes:
    """Multiparts within each other."""
    return b"".join(b"Content-Type: multipart/mixed; boundary=%d\r\n\r\n--%d\r\n" % (n, n) for n in range(depth))


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_too_deep_is_opaque(kernel):
    for data in (nested(10_000), b"Content-Type: message/rfc822\r\n\r\n" * 10_000):
        parts = kernel.scan(data)
        assert [part.depth for part in parts] == list(range(101))
        assert parts[100].kind == OPAQUE and parts[100].end == len(data)
        assert all(part.kind in (MULTIPART, MESSAGE) for part in parts[:100])


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_behind_the_last_part_that_may_be_is_opaque(kernel):
    data = b"Content-Type: multipart/mixed; boundary=a\r\n\r\n" + b"--a\r\n\r\nx\r\n" * 20_000
    parts = kernel.scan(data)
    assert len(parts) == 10_000
    assert [part.kind for part in parts] == [MULTIPART] + [LEAF] * 9998 + [OPAQUE]
    assert parts[-1].end == len(data) and parts[-1].lines == 3 * 10_001 + 1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("data", [b"\r\n" + b"\n" * 2_000_000, b"a: b\r\n" * 400_000, b"\r\n" + (b"x" * 70 + b"\r\n") * 30_000])
def test_other_threads_run_while_much_is_taken_apart(monkeypatch, kernel, data):
    """A thread that waits for the interpreter gets it many times in each megabyte."""
    calls = []
    monkeypatch.setattr(kernel, "give_way", lambda: calls.append(1))
    kernel.scan(data)
    assert len(data) // 75_000 <= len(calls) <= len(data) // 60_000


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_threads_run_while_there_are_many_parts(monkeypatch, kernel):
    calls = []
    monkeypatch.setattr(kernel, "give_way", lambda: calls.append(1))
    kernel.scan(crlf_parts(b"", 2000))
    assert 7 <= len(calls) <= 9


def crlf_parts(header: bytes, count: int) -> bytes:
    """A multipart of parts with the same header."""
    return b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + (b"--b\r\n" + header + b"\r\nx\r\n") * count


@pytest.mark.parametrize("kernel", KERNELS)
def test_fields_beyond_the_bounds_are_not_kept(kernel):
    assert len(kernel.scan(b"To: x\r\n" * 5000)[0].fields) == 1000
    data = b"X: " + b"x" * (1 << 20) + b"\r\nTo: y\r\n\r\nbody"
    (part,) = kernel.scan(data)
    assert part.fields == [] and data[part.body :] == b"body"
    assert len(kernel.fields(data, 0, part.body)) == 2
    many = kernel.fields(b"a: b\r\n" * 1001, 0, 6006)
    assert len(many) == 1000 and many[-1][3] == 6000
    data = crlf_parts(b"".join(b"X%d: x\r\nContent-ID: x\r\n" % n for n in range(20)) + b"Content-Type: text/plain;a=b\r\n", 9000)
    parts = kernel.scan(data)
    assert len(parts) == 9001 and sum(len(part.fields) + len(part.parameters or ()) for part in parts) == 100_000
    assert len(kernel.value(b"x" + b"; a=b" * 1000, 0, 6001)[2]) == 100


def test_a_kernel_takes_octets_only():
    for wrong in ("text", bytearray(b"x"), None, 1):
        with pytest.raises(TypeError):
            compiled.scan(wrong)
