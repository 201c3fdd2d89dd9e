"""XFORWARD (https://www.postfix.org/XFORWARD_README.html): what it says, in what form, for which message; both sides."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relaymta.proto.arguments import XFORWARD, forwarded, xforward
from relaymta.proto.session import Host, Offers
from relaymta.proto.smtp_client import ClientSession, Features, Mail, features_of
from relaymta.proto.smtp_server import ServerSession
from tests.proto.test_smtp_client import in_turn, written

EHLO = b"EHLO filter.example\r\n"
ENVELOPE = b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n"
OFFERED = frozenset(XFORWARD)
SAID = {"ADDR": "192.0.2.1", "HELO": "my pc", "IDENT": "0ABC", "NAME": "", "SOURCE": "REMOTE"}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (b"NAME=spike.porcupine.org ADDR=168.100.189.2 PROTO=ESMTP", ("spike.porcupine.org", "168.100.189.2", "ESMTP")),
        (b"name=[unavailable] Addr=[TEMPUNAVAIL] PROTO=esmtps", ("", "", "ESMTPS")),
        (b"NAME=a+20b+3Dc ADDR=IPV6:2001:DB8::1 PROTO=[UNAVAILABLE]", ("a b=c", "2001:db8::1", "")),
        (b"NAME=b+C3+BCcher+0D+0A.example ADDR=ipv6:::1 PROTO=SMTP", ("b\xfccher??.example", "::1", "SMTP")),
        (b"NAME=a=b ADDR=2001:db8::2 PROTO=SMTP", ("a=b", "2001:db8::2", "SMTP")),
        (b"NAME=x ADDR=IPV6:::ffff:192.0.2.7 PROTO=SMTP", ("x", "192.0.2.7", "SMTP")),  # as of XCLIENT
        (b"NAME=x ADDR=::ffff:192.0.2.7 PROTO=SMTP", ("x", "192.0.2.7", "SMTP")),
        (b"NAME=" + b"a" * 255 + b" ADDR=192.0.2.1 PROTO=SMTP", ("a" * 255, "192.0.2.1", "SMTP")),
    ],
)
def test_values(argument, expected):
    assert forwarded(argument) == dict(zip(("NAME", "ADDR", "PROTO"), expected, strict=True))


@pytest.mark.parametrize(
    "argument",
    [
        b"", b" ", b"NAME", b"NAME=", b"=x", b"LOGIN=x", b"NAME=x y", b"NAME=a+2", b"NAME=a+zz", b"NAME=a+", b"ADDR=x",
        b"ADDR=1.2.3", b"ADDR=IPV6:192.0.2.1", b"ADDR=IPV6:", b"PORT=65536", b"PORT=-1", b"PORT=+31+C2+B2",
        b"PROTO=a+20b", b"SOURCE=elsewhere",
        b"NAME=" + b"a" * 256, b"IDENT=x NAME\xff=y",
    ],
)  # fmt: skip
def test_wrong_values_are_refused(argument):
    assert forwarded(argument) is None


@given(st.binary(max_size=300))
def test_any_argument_has_an_answer_that_can_be_shown(argument):
    found = forwarded(argument)
    assert found is None or all(text.isprintable() for text in found.values())


@given(st.fixed_dictionaries({name: st.text(max_size=300) for name in ("HELO", "IDENT")}))
def test_what_is_said_fits_a_command_and_is_understood(texts):
    values = {"ADDR": "IPV6:2001:db8:1111:2222:3333:4444:5555:6666", "SOURCE": "LOCAL", **texts, "IDENT": texts["IDENT"][:20]}
    line = xforward(values, OFFERED)
    assert line.isascii() and len(line) <= 510 and "\r" not in line and "\n" not in line
    word, _, argument = line.partition(" ")
    found = forwarded(argument.encode())
    assert word == "XFORWARD" and found is not None and found["SOURCE"] == "LOCAL"
    shown = "".join(one if one.isprintable() else "?" for one in texts["HELO"].encode("utf-8", "replace").decode())
    cut = len(shown.encode()) > 255 // 3
    assert shown.startswith(found["HELO"]) and (cut or found["HELO"] == shown)


@given(
    st.fixed_dictionaries({name: st.text(max_size=255) for name in ("NAME", "HELO", "IDENT")}),
    st.integers(0, 255), st.sets(st.sampled_from(XFORWARD)),
)  # fmt: skip
@example(dict.fromkeys(("NAME", "HELO", "IDENT"), "x" * 255), 255, set(XFORWARD))
@example(dict.fromkeys(("NAME", "HELO", "IDENT"), "\u20ac" * 85), 255, set(XFORWARD))
def test_what_others_have_said_fits_a_command_whatever_it_was(texts, protocol, offered):
    values = {"ADDR": "IPV6:2001:db8:1111:2222:3333:4444:5555:6666", "PORT": "65535", "PROTO": "E" * protocol, "SOURCE": "REMOTE"}
    line = xforward(texts | values, offered)
    assert line.isascii() and len(line) <= 510 and bool(line) == bool(offered)
    said = forwarded(line.partition(" ")[2].encode()) if line else {}
    assert said is not None and said.keys() == offered
    assert all(said[name] == values[name].removeprefix("IPV6:") for name in offered & {"ADDR", "PORT", "SOURCE"})


def test_only_what_a_peer_takes_is_said():
    assert (
        xforward(SAID, features_of({"xforward": "name ADDR nonsense"}).xforward) == "XFORWARD ADDR=192.0.2.1 NAME=[UNAVAILABLE]"
    )
    assert xforward(SAID, OFFERED).startswith("XFORWARD ADDR=192.0.2.1 HELO=my+20pc IDENT=0ABC ")
    assert xforward(SAID, features_of({"xforward": ""}).xforward) == ""


# The server


def session(xforward: bool = True) -> ServerSession:
    made = ServerSession("mx.example", Host(offers=Offers(xforward=xforward)))
    made.greet()
    return made


def talk(made: ServerSession, data: bytes, step: int) -> tuple[list[int], list[dict[str, str]]]:
    """(Reply codes, what was said of each complete message)."""
    out, said = b"", []
    for start in range(0, len(data), step):
        out += made.receive(data[start : start + step])
        while made.complete is not None or made.behind:
            if made.complete is not None:
                said.append(made.complete.forwarded)
                out += made.finish(b"250 2.0.0 queued\r\n")
            else:
                out += made.receive(b"")
    return [int(line[:3]) for line in out.splitlines() if line[3:4] == b" "], said


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_it_is_about_the_next_message_alone(step):
    chunk = ENVELOPE + b"BDAT 3 LAST\r\nx\r\n"
    both = b"XFORWARD HELO=one\r\nxforward ADDR=192.0.2.1 HELO=two\r\n"
    codes, said = talk(session(), EHLO + both + chunk + chunk, step)
    assert codes == [250] * 9 and said == [{"HELO": "two", "ADDR": "192.0.2.1"}, {}]


@pytest.mark.parametrize("between", [b"RSET\r\n", EHLO, b"HELO x\r\n"])
def test_what_ends_a_transaction_ends_it(between):
    data = EHLO + b"XFORWARD HELO=one\r\n" + between + ENVELOPE + b"BDAT 3 LAST\r\nx\r\n"
    assert talk(session(), data, 4096)[1] == [{}]


def test_within_a_transaction_and_where_it_is_not_offered_it_is_refused():
    assert talk(session(), EHLO + ENVELOPE + b"XFORWARD HELO=x\r\nNOOP\r\n", 4096)[0] == [250, 250, 250, 503, 250]
    assert talk(session(), EHLO + b"XFORWARD HELO\r\nNOOP\r\n", 4096)[0] == [250, 501, 250]
    assert talk(session(False), EHLO + b"XFORWARD HELO=x\r\nNOOP\r\n", 4096)[0] == [250, 500, 250]
    assert b"XFORWARD NAME ADDR PORT PROTO HELO IDENT SOURCE" in session().receive(EHLO)
    assert b"XFORWARD" not in session(False).receive(EHLO)


# The client


def mail(forward: dict[str, str] | None = None) -> Mail:
    made = Mail("cargo", "a@b", [(0, "c@d")], [b"hi\r\n"], 4, False, False)
    made.forward = SAID if forward is None else forward
    return made


def peer(pipelining: bool = True, chunking: bool = False, offered: frozenset[str] = OFFERED) -> Features:
    return Features(pipelining, True, False, None, chunking, offered)


LINE = b"XFORWARD ADDR=192.0.2.1 HELO=my+20pc IDENT=0ABC NAME=[UNAVAILABLE] SOURCE=REMOTE\r\n"
REPLIES = [b"250 ok\r\n", b"220 2.0.0 what\r\n", b"550 no\r\n", b"451 later\r\n", b"501-bad\r\n501 syntax\r\n", b"503 no\r\n"]


@pytest.mark.parametrize("answer", REPLIES)
@pytest.mark.parametrize("step", [0, 1])
def test_whatever_is_replied_to_it_the_message_goes_on(answer, step):
    for features in (peer(), peer(pipelining=False)):
        core, one = ClientSession(features), mail()
        core.begin(one)
        first = written(core)
        assert first.startswith(LINE) and (b"MAIL" in first) is features.pipelining
        out = first + in_turn(core, answer + b"250 m\r\n250 r\r\n354 go\r\n", step)
        assert out == LINE + b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nhi\r\n.\r\n"
        core.receive(b"250 taken\r\n")
        assert one.all_sent and core.finished == [one] and core.idle and not core.closing


@pytest.mark.parametrize("answer", [b"354 go\r\n", b"100 wait\r\n", b"nonsense\r\n", b"421 bye\r\n"])
def test_a_reply_that_is_out_of_turn_closes_the_connection_and_nothing_is_in_doubt(answer):
    for features in (peer(), peer(pipelining=False), peer(chunking=True)):
        core, one = ClientSession(features), mail()
        core.begin(one)
        written(core)
        core.receive(answer)
        assert core.closing and core.under_way() == [one] and not one.said and not one.reached


@pytest.mark.parametrize("answer", REPLIES)
def test_a_peer_that_has_replied_to_it_has_heard_of_the_message(answer):
    core, one = ClientSession(peer(chunking=True)), mail()
    core.begin(one)
    written(core)
    assert one.reached == "" and one.data_sent
    core.receive(answer)
    assert one.reached == "xforward" and core.awaiting == "mail"


def test_each_message_says_its_own_behind_a_reset_and_nothing_where_nothing_is_offered():
    core = ClientSession(peer())
    core.begin(mail())
    written(core)
    in_turn(core, b"250 x\r\n550 m\r\n503 r\r\n503 d\r\n")
    core.begin(mail({"HELO": "other"}))
    assert written(core).startswith(b"RSET\r\nXFORWARD HELO=other\r\nMAIL FROM")
    for silent in (ClientSession(peer(offered=frozenset())), ClientSession(peer(offered=frozenset({"PORT"})))):
        silent.begin(mail({"HELO": "x"}))
        assert written(silent).startswith(b"MAIL FROM")


def test_the_next_one_is_pipelined_behind_message_data_and_by_bdat():
    core, first, second = ClientSession(peer(chunking=True)), mail(), mail()
    core.begin(first)
    assert written(core) == LINE + b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nBDAT 4 LAST\r\nhi\r\nRSET\r\n"
    core.receive(b"550 x\r\n250 m\r\n250 r\r\n")
    assert core.may_follow
    core.begin(second)
    assert written(core).startswith(LINE + b"MAIL FROM")
    core.receive(b"250 taken\r\n250 reset\r\n250 x\r\n250 m\r\n250 r\r\n250 taken\r\n250 reset\r\n")
    assert first.all_sent and second.all_sent and core.idle and not core.closing
