"""What is asked of spamd, and what its answers mean."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.spamc import SpamdError, is_pong, judged, request

SPAM = b"SPAMD/1.1 0 EX_OK\r\nContent-length: 12\r\nSpam: True ; 15.2 / 5.0\r\n\r\nGTUBE,NO_DATE\r\n"


def test_what_is_asked():
    assert request(1234) == b"SYMBOLS SPAMC/1.5\r\nContent-length: 1234\r\n\r\n"
    assert request(0, "ann\r\nX: y") == b"SYMBOLS SPAMC/1.5\r\nContent-length: 0\r\nUser: ann\\r\\nX: y\r\n\r\n"


@pytest.mark.parametrize("answer, found", [
    (SPAM, (True, 15.2, 5.0, ["GTUBE", "NO_DATE"])),
    (SPAM.replace(b"True", b"False").replace(b"15.2", b"-1.5"), (False, -1.5, 5.0, ["GTUBE", "NO_DATE"])),
    (SPAM.replace(b"\r\n", b"\n").replace(b"True", b"yes"), (True, 15.2, 5.0, ["GTUBE", "NO_DATE"])),
    (b"SPAMD/1.5 0 EX_OK\r\nSpam:False;0/5\r\n\r\n", (False, 0.0, 5.0, [])),
    (b"SPAMD/1.5 0 EX_OK\r\nSpam: False ; 0 / 5\r\n\r\nA\x1b[1m,\xff", (False, 0.0, 5.0, ["A\\x1b[1m", "\ufffd"])),
])  # fmt: skip
def test_a_verdict(answer, found):
    assert judged(answer) == found


@pytest.mark.parametrize("answer, refused, text", [
    (b"SPAMD/1.0 76 Bad header line: (EOF)\r\n", True, "answers 76 Bad header line"), (b"", False, "closes the connection"),
    (b"SPAMD/1.1 0 EX_OK\r\n\r\nSpam: True ; 15 / 5\r\n", False, "without a score"),
    (b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; 1.2.3 / 5\r\n\r\n", False, "without a score"),
    (b"220 mail.example ESMTP\r\n" * 100, False, "not as spamd: begins with '220 mail.example ESMTP\\n220 "),
    (b"SPAMD/1.1 zero\r\n", False, "not as spamd"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", False, "not as spamd"),
])  # fmt: skip
def test_no_verdict(answer, refused, text):
    with pytest.raises(SpamdError) as error:
        judged(answer)
    assert text in str(error.value) and error.value.refused == refused and len(str(error.value)) < 200


def test_ping():
    assert is_pong(b"SPAMD/1.5 0 PONG\r\n") and not is_pong(b"SPAMD/1.5 0 EX_OK\r\n")
    with pytest.raises(SpamdError):
        is_pong(b"+PONG\r\n")


@given(st.one_of(st.binary(), st.builds(lambda a, b: SPAM[:a] + b + SPAM[a:], st.integers(0, len(SPAM)), st.binary())))
def test_any_octets_are_a_verdict_or_an_error(octets):
    try:
        found = judged(octets)
    except SpamdError as error:
        assert str(error).isprintable()
    else:
        assert all(rule.isprintable() for rule in found.rules)
