"""What is fuzzed: each target takes any octets and raises when a kernel, compiled or interpreted, disagrees with its oracle, when
the result depends on how the input was cut, or when anything but a protocol error escapes.

An input is: one octet of options, one for the number of cuts, the cuts (two octets each), and what arrives on the wire.
"""

from collections.abc import Callable

from relaymta.proto.smtp_server import Limits, ServerSession
from tests.speedups import oracle, test_replies, test_smtp
from tests.speedups.test_smtp import BARE_CR, BARE_LF, DOTTED, NUL

PARSERS = [parameter.values[0] for parameter in test_smtp.PARSERS]
REPLIES = [parameter.values[0] for parameter in test_replies.PARSERS]


def taken_apart(data: bytes) -> tuple[int, list[int], bytes]:
    """Options, cuts and wire of an input."""
    options, count = data[0], data[1] % 8
    cuts = [int.from_bytes(data[2 + 2 * i : 4 + 2 * i], "big") for i in range(count)]
    return options, cuts, data[2 + 2 * count :]


def smtp(data: bytes) -> None:
    """The server parser: text, normalized text, commands or a chunk."""
    options, cuts, wire = taken_apart(data)
    for parser in PARSERS:
        (_text, _normalized, _commands, _chunk)[options % 4](parser, cuts, wire)


def _text(parser: type, cuts: list[int], wire: bytes) -> None:
    found = test_smtp.text_run(parser, wire, cuts)
    assert found == test_smtp.text_run(parser, wire, [])
    text, ended, size, flags, waiting = found
    expected = oracle.unstuff(wire)
    assert size == len(text) and ended == (expected is not None)
    if expected is not None:
        assert (text, waiting) == (expected[0], len(expected[1]))
        assert (bool(flags & BARE_LF), bool(flags & BARE_CR)) == oracle.bare(text)
        assert bool(flags & NUL) == (b"\0" in text)
        assert flags & DOTTED or not (text.startswith(b".") or b"\r\n." in text)


def _normalized(parser: type, cuts: list[int], wire: bytes) -> None:
    found = test_smtp.text_run(parser, wire, cuts, normalize=True)
    assert found == test_smtp.text_run(parser, wire, [], normalize=True)
    expected = oracle.unstuff(wire)
    assert found[1] == (expected is not None)
    if expected is not None:
        assert found[0] == oracle.normalize(expected[0])


def _commands(parser: type, cuts: list[int], wire: bytes) -> None:
    events = test_smtp.command_run(parser, wire, cuts)
    assert events == test_smtp.command_run(parser, wire, [])
    assert len(events) == len(oracle.lines_of(wire)[0])


def _chunk(parser: type, cuts: list[int], wire: bytes) -> None:
    octets = len(wire) // 2
    one = parser(512, 998, False)
    one.chunk(octets, True)
    text = b"".join(event[1] for piece in test_smtp.pieces(wire, cuts) for event in one.feed(piece) if len(event) > 1)
    assert text == wire[:octets]
    assert one.waiting() == len(wire) - octets


def replies(data: bytes) -> None:
    """The reply parser."""
    _, cuts, wire = taken_apart(data)
    wire = wire[:3000]  # below the limits of a line and of lines, which the oracle does not know
    for parser in REPLIES:
        one = parser(4096, 3000)
        found = [reply for piece in test_smtp.pieces(wire, cuts) for reply in one.feed(piece)]
        assert found == test_replies.oracle(wire)


def session(data: bytes) -> None:
    """A whole server session: the same replies for every split, and every message taken with text as the limits allow."""
    options, cuts, wire = taken_apart(data)
    limits = Limits(message_size=2000, recipients=5, errors=6, normalize=bool(options & 1), long_lines=bool(options & 2))
    assert _session_run(limits, wire, cuts) == _session_run(limits, wire, [])


def _session_run(limits: Limits, wire: bytes, cuts: list[int]) -> tuple[bytes, list[tuple[str, list[str], bytes]]]:
    one = ServerSession("relay.example", limits, lambda sender, size: None, lambda address, transaction: None)
    one.greet()
    out, mails = [], []
    for piece in test_smtp.pieces(wire, cuts):
        out.append(one.receive(piece))
        while one.complete is not None:
            mail = one.complete
            text = b"".join(mail.take())
            assert len(text) <= limits.message_size and 0 < len(mail.recipients) <= limits.recipients
            assert oracle.bare(text) == (False, False) and b"\0" not in text
            mails.append((mail.sender, mail.recipients, text))
            out.append(one.finish(b"250 2.0.0 taken\r\n"))
        if one.closing:
            break
    said = b"".join(out)
    assert said == b"" or said.endswith(b"\r\n")
    return said, mails


TARGETS: dict[str, Callable[[bytes], None]] = {"smtp": smtp, "replies": replies, "session": session}
