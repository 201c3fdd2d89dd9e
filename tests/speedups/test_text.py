"""Transfer encodings and case-insensitive search against naive oracles and Python's own decoders."""

import base64
import quopri

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relaymta._speedups import text as compiled
from tests.speedups import mime_oracle
from tests.speedups.test_smtp import interpreted_twin

KERNELS = [pytest.param(compiled, id="compiled"), pytest.param(interpreted_twin("text"), id="interpreted")]
ENCODED = st.lists(
    st.sampled_from([b"QUJD", b"QQ==", b"QUI=", b"=", b"\r\n", b" ", b"Q", b"\0", b"\xff", b"+/", b"-_"]), max_size=30
).map(b"".join)
QUOTED = st.lists(
    st.sampled_from(
        [b"=", b"=41", b"=e4", b"=4", b"=zz", b" ", b"\t", b"\r\n", b"\n", b"\r", b"x", b"=\r\n", b"= \t\r\n", b"\0", b"\xff"]
    ),
    max_size=30,
).map(b"".join)


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=ENCODED | st.binary(max_size=60))
@example(data=b"QUJDR")
@example(data=b"QQ==QUI=")
def test_base64_is_as_the_oracle_says(kernel, data):
    assert kernel.base64(data) == mime_oracle.base64(data)


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=st.binary(max_size=300))
def test_base64_of_python_is_decoded(kernel, data):
    for encoded in (base64.b64encode(data), base64.encodebytes(data), base64.b64encode(data).rstrip(b"=")):
        assert kernel.base64(encoded) == data


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=QUOTED | st.binary(max_size=60))
@example(data=b"a=\r\n")
@example(data=b"a =  \t\nb")
@example(data=b"= x  ")
def test_quoted_printable_is_as_the_oracle_says(kernel, data):
    assert kernel.quoted_printable(data) == mime_oracle.quoted_printable(data)


@pytest.mark.parametrize("kernel", KERNELS)
@given(data=st.binary(max_size=300).map(lambda data: data.replace(b"\r", b"").replace(b"\n", b"\r\n")))
def test_quoted_printable_of_python_is_decoded(kernel, data):
    encoded = quopri.encodestring(data.replace(b"\r\n", b"\n")).replace(b"\n", b"\r\n")
    assert kernel.quoted_printable(encoded) == data


@pytest.mark.parametrize("kernel", KERNELS)
@given(
    data=st.lists(st.sampled_from([b"A", b"z", b"\r\n", b"\n", b"\r", b" ", b"\t", b"[", b"@", b"\xc4", b"\0"]), max_size=30).map(
        b"".join
    )
)
def test_text_is_found_in_any_case(kernel, data):
    for unfold in (True, False):
        expected = mime_oracle.folded(data, unfold)
        assert kernel.folded(data, unfold) == expected
        assert all(kernel.holds(data, needle, unfold) == (needle in expected) for needle in (b"az", b"a z", b"a\r\n z", b""))
