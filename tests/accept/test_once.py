"""Idempotency keys: whose they are, and what tells a message from another one under the same key."""

import email
import email.policy
from email.message import EmailMessage
from typing import Any

from relaymta.accept.once import LINES_MOST, owner_of, without_boundaries
from relaymta.accept.origin import Client, Origin
from relaymta.proto.transaction import Limits


def origin(user: str, application: str, address: str = "127.0.0.1") -> Origin:
    client = Client(address, address, True, 0, "", "", Limits(), False, "", "", "")
    return Origin(client, None, user, application, "", False, True, True, False, "", "", False, False, "127.0.0.1:25")


def test_keys_belong_to_the_account_wherever_it_hands_in_mail():
    assert owner_of(origin("shop", "")) == owner_of(origin("shop", "intern")) == owner_of(origin("shop", "", "192.0.2.1"))
    others = [("", ""), ("", "intern"), ("", "shop"), ("bank", ""), ("shop", "")]
    owners = [owner_of(origin(*one)) for one in others] + [owner_of(origin("", "", "192.0.2.1"))]
    assert len(set(owners)) == len(owners)


def made(text: str = "one", file: bytes = b"abc", within: bool = False) -> tuple[bytes, bytes]:
    """Header and body of a message with parts of parts, as a program makes it anew."""
    found = EmailMessage(email.policy.SMTP)
    found["Subject"] = "invoice"
    found.set_content(text)
    found.add_alternative(f"<p>{text}</p>", subtype="html")
    found.add_attachment(file, maintype="application", subtype="pdf", filename="a.pdf")
    if within:
        outer = EmailMessage(email.policy.SMTP)
        outer["Subject"] = "forwarded"
        outer.set_content("see")
        outer.add_attachment(found)
        found = outer
    header, end, body = found.as_bytes().partition(b"\r\n\r\n")
    return header + end, body


def content(*more: Any, **named: Any) -> bytes:
    return without_boundaries(*made(*more, **named))


def test_boundaries_that_are_made_anew_do_not_count():
    for within in (False, True):
        assert made(within=within) != made(within=within)
        assert content(within=within) == content(within=within)
        assert b"=====" not in content(within=within)
        assert len({content(within=within), content("two", within=within), content(file=b"abd", within=within)}) == 3
    header = b"Content-Type: message/rfc822\r\n\r\n"
    one, other = (b"".join(made()) for _ in range(2))
    assert without_boundaries(header, one) == without_boundaries(header, other) != without_boundaries(header, b"".join(made("x")))


def test_what_only_looks_like_a_boundary_counts():
    plain = b"Subject: boundary=x\r\nContent-Type: text/plain; boundary=x\r\n\r\n"
    assert without_boundaries(plain, b"--x\r\n") == b"--x\r\n"
    mixed = b'Content-Type: multipart/mixed;\r\n boundary="x y"\r\n\r\n'
    bodies = [
        b"--x y\r\n\r\nboundary=%b\r\n--%b\r\nContent-Type: multipart/x; boundary=%b\r\n\r\n\r\n--x y--\r\n" % (one, one, one)
        for one in (b"a", b"b")
    ]
    assert without_boundaries(mixed, bodies[0]) != without_boundaries(mixed, bodies[1])
    structures = b"--x y\r\n\r\na\r\n--x y--\r\n", b"--x y\r\n\r\na\r\n--x y\r\n", b"--x y\r\n\r\na\r\n--x z\r\n", b"--0\r\n\r\na"
    assert len({without_boundaries(mixed, one) for one in structures}) == len(structures)


def test_behind_so_many_lines_it_is_as_it_is():
    mixed = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n"
    found = without_boundaries(mixed, b"--b\r\n\r\n" * LINES_MOST + b"--b--\r\n")
    assert found.endswith(b"--b--\r\n") and found.count(b"--b\r\n") == 0
    assert without_boundaries(mixed, b"--b\r\n\r\n" * (LINES_MOST + 5)).count(b"--b\r\n") == 5
