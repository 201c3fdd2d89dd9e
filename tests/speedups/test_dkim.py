"""The DKIM canonicalizer against a naive implementation of RFC 6376, against dkimpy, and against hostile input, in any split."""

import re

import pytest
from dkim import canonicalization
from hypothesis import example, given
from hypothesis import strategies as st

from relaymta._speedups import dkim as compiled
from tests.speedups.test_smtp import CUTS, interpreted_twin, pieces

KERNELS = [pytest.param(compiled, id="compiled"), pytest.param(interpreted_twin("dkim"), id="interpreted")]
PARTS = [b"\r\n", b" ", b"\t", b"x", b"\r", b"\n", b"  ", b"word", b".", b"\0", b"\xff", b" \r\n", b"\r\n\r\n", b"a b\tc  d"]
BODY = st.lists(st.sampled_from(PARTS), max_size=40).map(b"".join)


def body(kernel, data: bytes, cuts: list[int], relaxed: bool) -> bytes:
    one = kernel.Body(relaxed)
    return b"".join(one.feed(piece) for piece in pieces(data, cuts)) + one.finish()


def expected(data: bytes, relaxed: bool) -> bytes:
    """RFC 6376 3.4.3 and 3.4.4, line by line; only CRLF ends a line."""
    lines = data.split(b"\r\n")
    if relaxed:
        lines = [re.sub(rb"[ \t]+", b" ", line) for line in lines]
        lines = [line.removesuffix(b" ") for line in lines]
    while lines and lines[-1] == b"":
        lines.pop()
    if not lines:
        return b"" if relaxed else b"\r\n"
    return b"\r\n".join(lines) + b"\r\n"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("relaxed", [True, False])
@given(data=BODY, cuts=CUTS)
@example(data=b" \r", cuts=[])
@example(data=b"x\r\n\r\n\r\ny \r\r\n \r\n", cuts=[3])
@example(data=b"\r\n\r\n", cuts=[])
def test_a_body_is_as_the_rfc_says_in_any_split(kernel, relaxed, data, cuts):
    assert body(kernel, data, cuts, relaxed) == expected(data, relaxed)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("relaxed", [True, False])
@given(data=BODY.map(lambda data: re.sub(rb"[\r\n]", b"", data.replace(b"\r\n", b"\0")).replace(b"\0", b"\r\n") + b"\r\n"))
def test_a_body_is_as_in_dkimpy(kernel, relaxed, data):
    algorithm = canonicalization.Relaxed if relaxed else canonicalization.Simple
    assert body(kernel, data, [], relaxed) == algorithm.canonicalize_body(data)


FIELDS = st.tuples(
    st.text("AbcX-", min_size=1, max_size=8).map(str.encode),
    st.lists(st.sampled_from([b" ", b"\t", b"x", b"Y:", b"\r\n ", b"\r\n\t", b"  ", b"word"]), max_size=12).map(b"".join),
)


@pytest.mark.parametrize("kernel", KERNELS)
@given(field=FIELDS)
@example(field=(b"Subject ", b" x"))
def test_a_header_field_is_as_in_dkimpy(kernel, field):
    ((name, value),) = canonicalization.Relaxed.canonicalize_headers([field])
    assert kernel.header(field[0] + b":" + field[1]) + b"\r\n" == name + b":" + value


@pytest.mark.parametrize("kernel", KERNELS)
@given(field=st.binary(max_size=40))
def test_whatever_a_field_is_nothing_escapes(kernel, field):
    assert kernel.header(field) == kernel.header(field)
