"""The PROXY protocol against an independent implementation, in any split."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.proxy import LONGEST, BadHeader, Header, parse

ADDRESSES = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4)), st.tuples(st.ip_addresses(v=6), st.ip_addresses(v=6))
)
PORTS = st.integers(0, 65535)


def first(pair, source: int, destination: int) -> bytes:
    return f"PROXY TCP{pair[0].version} {pair[0]} {pair[1]} {source} {destination}\r\n".encode()


def second(pair, source: int, destination: int, more: bytes = b"") -> bytes:
    family = 0x11 if pair[0].version == 4 else 0x21
    body = pair[0].packed + pair[1].packed + struct.pack(">HH", source, destination) + more
    return b"\r\n\r\n\x00\r\nQUIT\n\x21" + bytes([family]) + struct.pack(">H", len(body)) + body


@given(pair=ADDRESSES, source=PORTS, destination=PORTS, more=st.binary(max_size=60), behind=st.binary(max_size=20))
def test_the_client_is_who_the_header_says_in_any_split(pair, source, destination, more, behind):
    for header in (first(pair, source, destination), second(pair, source, destination, more)):
        for cut in range(len(header)):
            assert parse(header[:cut]) is None
        assert parse(header + behind) == Header(len(header), str(pair[0]))


@given(st.binary(max_size=200))
def test_only_a_header_is_accepted_as_one(data):
    try:
        found = parse(data)
    except BadHeader:
        return
    assert (found is None and len(data) < LONGEST) or data.startswith((b"PROXY ", b"\r\n\r\n\x00\r\nQUIT\n"))


@pytest.mark.parametrize(
    "header",
    [
        b"EHLO me\r\n", b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n", b"PROXY TCP4 ::1 ::1 1 2\r\n", b"PROXY TCP6 x y 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 65536\r\n", b"PROXY " + b"x" * 101,
        b"\r\n\r\n\x00\r\nQUIT\n\x31\x11\x00\x0c" + bytes(12), b"\r\n\r\n\x00\r\nQUIT\n\x21\x12\x00\x0c" + bytes(12),
        b"PROXY TCP6 fe80::1%eth0 ::1 1 25\r\n", b"PROXY TCP6 ::1 fe80::1%25 1 25\r\n",
        b"\r\n\r\n\x00\r\nQUIT\n\x21\x31\x00\x0c" + bytes(12), b"\r\n\r\n\x00\r\nQUIT\n\x21\x41\x00\x0c" + bytes(12),
        b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x02" + bytes(2), b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\xff\xff",
    ],
)  # fmt: skip
def test_what_is_no_header_is_refused(header):
    with pytest.raises(BadHeader):
        parse(header)


def test_a_balancers_own_connection_names_no_client():
    assert parse(b"PROXY UNKNOWN\r\n220") == Header(15, "")
    assert parse(b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n") == Header(35, "")
    assert parse(b"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00") == Header(16, "")
    assert parse(b"\r\n\r\n\x00\r\nQUIT\n\x21\x00\x00\x03abc220") == Header(19, "")  # AF_UNSPEC
    assert parse(b"\r\n\r\n\x00\r\nQUIT\n\x21\x31\x00\xd8" + bytes(216)) == Header(232, "")  # AF_UNIX
