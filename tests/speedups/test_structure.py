"""What FETCH tells of a message, as the kernels write it, against a slow and obvious writer: octet for octet."""

import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relaymta import _speedups as speedups
from relaymta._speedups import structure as compiled
from tests.speedups import structure_oracle
from tests.speedups.test_mime import DATA, bodies, nested
from tests.support.messages import ATTACHED, NASTY


def interpreted():
    """The source of the kernels that write, run by the interpreter: each needs those in front of it in that form."""
    names = [f"relaymta._speedups.{one}" for one in ("octets", "addresses", "structure")]
    kept = {name: sys.modules[name] for name in names}
    try:
        for name in names:
            path = Path(speedups.__file__).parent / f"{name.rpartition('.')[2]}.py"
            loader = SourceFileLoader(name, str(path))
            module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
            sys.modules[name] = module
            loader.exec_module(module)
        return module
    finally:
        sys.modules.update(kept)


KERNELS = [pytest.param(compiled, id="compiled"), pytest.param(interpreted(), id="interpreted")]

ADDRESSES = [
    b"a", b"b.c", b"@", b"<", b">", b",", b";", b":", b"(", b")", b'"', b"\\", b" ", b"\t", b"[", b"]", b"@[", b"[1:2]", b".",
    b" . ", b"\xe4", b"\xff", b"\r\n ", b"\r\n\t", b"\r", b"\n", b"\0", b'"x y"', b"g:", b"<a@b>", b"c@d.e", b"A B <x@y>",
    b'"Q" <q@r.s>', b"(c)", b"<@r1,@r2:", b"\r\r\n ", b"  ", b'\\"', b"x" * 70, b"=?utf-8?q?x?=", b"-_", b"'", b"a@b, ", b"\x01",
    b"\x7f", b'""', b"@@", b'"\\', b"A" * 499, b"b" * 260, b"c" * 980,
]  # fmt: skip
VALUES = [
    *ADDRESSES, b"text/plain", b"text/html; charset=utf-8", b"multipart/mixed; boundary=a",
    b'multipart/alternative; boundary="b"', b"message/rfc822",
    b"multipart/digest; boundary=c", b"attachment", b'; filename="a b"', b"; x=y", b"=", b"/", b"base64",
    b"quoted-printable", b"7BIT", b"x-FOO", b"en, de-DE", b"*", b'; n="a\\"b\\\\c"', b'; n="a\\\r\n b"', b"TEXT/Plain",
    b"Te\xc4xt/Pl\xd6", b"IMAGE/PNG", b"Q" * 1001,
]  # fmt: skip
PEOPLE = [b"From", b"Sender", b"Reply-To", b"To", b"Cc", b"Bcc"]
OTHERS = [
    b"Date", b"Subject", b"In-Reply-To", b"Message-ID", b"Content-ID", b"Content-Description", b"Content-Disposition",
    b"Content-Language", b"Content-Location", b"Content-MD5", b"Content-Transfer-Encoding", b"Content-Type", b"X-Other",
]  # fmt: skip
LINES = [
    b"--a\r\n", b"--a--\r\n", b"--b\r\n", b"--b--\r\n", b"--c\r\n", b"\r\n", b"\r\n", b"text\r\n", b" folded\r\n",
    b"Content-Type: multipart/mixed; boundary=a\r\n", b"Content-Type: multipart/digest; boundary=b\r\n",
    b'Content-Type: MULTIPART/x; boundary=c; q="a\\b"\r\n', b"Content-Type: message/rfc822\r\n",
    b"Content-Transfer-Encoding: base64\r\n",
]  # fmt: skip


FORWARDED = (
    b'Content-Type: message/rfc822; a=b\\c; d="e\\f"\r\nContent-MD5: 1\r\n'
    b"Content-Disposition: attachment\r\nContent-Language: de\r\n\r\n"
    b"Content-MD5: 2\r\nContent-Disposition: inline; filename=a\\b\r\nContent-Location: x\r\n\r\ny\r\n"
)


def joined(pieces: list[bytes], most: int) -> st.SearchStrategy[bytes]:
    return st.lists(st.sampled_from(pieces), max_size=most).map(b"".join)


def fields(names: list[bytes], values: list[bytes]) -> st.SearchStrategy[bytes]:
    ends = st.sampled_from([b"\r\n", b"\r\n", b"\n"])
    return st.builds(b"%b:%b%b".__mod__, st.tuples(st.sampled_from(names), joined(values, 12), ends))


FIELDS = fields(PEOPLE, ADDRESSES) | fields(OTHERS, VALUES)
HOSTILE = st.builds(
    lambda pieces, cut: b"".join(pieces)[: -cut or None],
    st.lists(FIELDS | FIELDS | st.sampled_from(LINES), max_size=25),
    st.integers(0, 12),
)


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=fields(PEOPLE, ADDRESSES))
@example(data=b'To: "a\\')
@example(data=b"To: a@b (a (b), c")
@example(data=b"To: a@b (a (b c")
@example(data=b"To: a@b (a \\)")
@example(data=b"To: g:a@b,")
@example(data=b"To: <@a, @b:c:@d:e@f> (x)")
@example(data=b"To: a@[b(c:d\\],[")
@example(data=b"To: \"a\" . ' b '@ c . d ")
@example(data=b'To: A  B <a@b>, c d@e, x <a >b, " y z " <f@g>, "h"@i')
@example(data=b"To: " + b"x" * 1001 + b" <a@b>, " + b"y" * 1001 + b"@z, <a@" + b"z" * 1001 + b">")
def test_addresses_are_those_of_the_oracle(kernel, data):
    assert kernel.describe(data) == structure_oracle.describe(data)


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=HOSTILE)
def test_replies_about_messages_that_break_the_rules_are_those_of_the_oracle(kernel, data):
    assert kernel.describe(data) == structure_oracle.describe(data)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("octets", [1_048_576, 1_048_577])
def test_the_last_fields_that_are_shown(kernel, octets):
    data = fields_of(octets)
    assert kernel.describe(data) == structure_oracle.describe(data)
    assert (b"<1>" in kernel.describe(data)[1]) == (octets == structure_oracle.FIELDS_MOST)


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=DATA)
def test_replies_about_any_lines_are_those_of_the_oracle(kernel, data):
    assert kernel.describe(data) == structure_oracle.describe(data)


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=bodies(), front=st.lists(FIELDS, max_size=8).map(b"".join), keep=st.floats(0, 1), cut=st.booleans())
def test_replies_about_well_formed_and_cut_messages_are_those_of_the_oracle(kernel, data, front, keep, cut):
    data = front + data
    if cut:
        data = data[: int(len(data) * keep)]
    assert kernel.describe(data) == structure_oracle.describe(data)


def fields_of(octets: int) -> bytes:
    """A message whose parts have so many octets in their fields, the last one some that are shown."""
    data, values = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n", len(b" multipart/mixed; boundary=b")
    last = b" image/png; a=b\r\nContent-ID: <1>"
    while octets - values > 70_000:
        data += b"--b\r\nContent-MD5:" + b"x" * 60_000 + b"\r\n\r\n"
        values += 60_000
    values += len(last.replace(b"\r\nContent-ID:", b""))
    return data + b"--b\r\nContent-MD5:" + b"x" * (octets - values) + b"\r\nContent-Type:" + last + b"\r\n\r\n"


def much() -> Iterator[tuple[str, bytes]]:
    """Messages that reach a bound of the kernels."""
    yield "addresses", b"To: " + b"a@b," * 20_000 + b"\r\nBcc: g:" + b"(x)a,a," * 20_000 + b"\r\nCc: a@b\r\n"
    yield "groups", b"To: " + b"g:a," * 7_000 + b"\r\nCc: " + b"g:;" * 9_999 + b"a\r\n"
    yield "fields of addresses", (b"To: " + b"a@b, " * 700 + b"\r\n") * 50
    yield "no address", b"To: " + b"<a@b " * 30_000 + b"\r\nBcc: c@d"
    yield "one long name", b'To: "' + b"x\\" * 60_000 + b"\r\nFrom: (" + b"(" * 30_000
    yield "folds", b"Subject: " + b"x\r\n " * 30_000 + b"\r\nDate: " + b'"' * 70_000
    yield "long values", b"Subject: " + b"\xe4\0" * 40_000 + b"\r\nContent-Type: image/png; a=" + b"x" * 100_000
    attached = b"Content-Type: message/rfc822\r\n\r\nFrom: " + b"a@b," * 1000 + b"\r\n"
    yield "attached", b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + (b"--b\r\n" + attached + b"\r\n") * 100
    one = b"--b\r\nContent-Type: image/png; a=" + b"x" * 10_000 + b"\r\n\r\n"
    yield "parameters", b"Content-Type: multipart/mixed; boundary=b\r\nContent-Language: de\r\n\r\n" + one * 200
    sent = b"Content-Type: message/rfc822\r\n\r\nTo: a@b\r\nBcc:" + b" " * 60_000 + b"c@d\r\nSubject: x\r\n\r\n\r\n--b\r\n"
    yield "attached with Bcc", b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n" + sent * 4
    yield "parts", b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\nContent-Type: text/html\r\n\r\nx\r\n" * 11_000
    yield "depth", nested(200)
    yield "messages in messages", b"Content-Type: message/rfc822\r\nSubject: x\r\nTo: a@b\r\n\r\n" * 200
    for octets in (1000, 1001):
        yield f"{octets} octets", b"Subject: " + b"x" * octets + b"\r\nDate: " + b'"' * octets + b"\r\n\r\n"
    yield "languages", b"Content-Language: " + b"a," * 2000 + b"\r\n\r\n"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("name", "data"), list(much()), ids=lambda one: one if isinstance(one, str) else "")
def test_bounds_are_those_of_the_oracle(kernel, name, data):
    assert kernel.describe(data) == structure_oracle.describe(data)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("data", [*NASTY.values(), ATTACHED, FORWARDED, b""])
def test_replies_about_known_messages_are_those_of_the_oracle(kernel, data):
    assert kernel.describe(data) == structure_oracle.describe(data)


def test_a_kernel_takes_octets_only():
    for wrong in ("text", bytearray(b"x"), memoryview(b"x"), None, 1):
        with pytest.raises(TypeError):
            compiled.describe(wrong)
