"""The client session against scripted replies."""

import pytest

from relaymta.proto.dsn import REPLY_LIMIT
from relaymta.proto.said import LONGEST, wants_tls
from relaymta.proto.sequence import CLOSES, GO_ON, GOES_ON, HELO_AFTER, OUT_OF_TURN, REFUSED, verdict
from relaymta.proto.smtp_client import ClientSession, Features, Mail, Said, classify, features_of, stuff

PIPELINING = Features(True, True, False, 0)
PLAIN = Features(False, False, False, None)


def mail(*recipients: str, data: bytes = b"hi\r\n") -> Mail:
    return Mail("cargo", "a@b", list(enumerate(recipients or ("c@d",))), [data], len(data), False, False)


def written(core: ClientSession) -> bytes:
    out = b"".join(core.out)
    core.out.clear()
    return out


def in_turn(core: ClientSession, answers: bytes, step: int = 0) -> bytes:
    """Give a session these replies line by line, or octet by octet, and write its output at once; returns that."""
    out = b""
    for piece in [answers[i : i + 1] for i in range(len(answers))] if step else answers.splitlines(keepends=True):
        core.receive(piece)
        out += written(core)
    return out


def results(done: Mail) -> dict[int, int]:
    return {index: done.said[index].code if index in done.said else 250 for index, _ in done.recipients}


@pytest.mark.parametrize("step", [0, 1])
def test_an_open_connection_takes_one_round_trip_a_message(step):
    core = ClientSession(PIPELINING)
    first, second = mail(), mail()
    core.begin(first)
    assert written(core) == b"MAIL FROM:<a@b> SIZE=4\r\nRCPT TO:<c@d>\r\nDATA\r\n"
    core.receive(b"250 ok\r\n250 ok\r\n354 go\r\n")
    assert written(core) == b"hi\r\n.\r\n"
    assert core.may_follow
    core.begin(second)
    assert written(core).startswith(b"MAIL FROM")
    assert not core.may_follow
    assert in_turn(core, b"250 2.0.0 taken\r\n250 ok\r\n250 ok\r\n354 go\r\n", step) == b"hi\r\n.\r\n"
    assert core.finished == [first]
    assert first.all_sent
    core.receive(b"250 taken\r\n")
    assert second.all_sent
    assert core.idle
    assert core.messages == 2


def test_without_pipelining_one_command_at_a_time():
    core = ClientSession(PLAIN)
    core.begin(mail("c@d", "e@f"))
    for answer, expected in [
        (b"250 a\r\n", b"RCPT TO:<c@d>\r\n"),
        (b"550 no\r\n", b"RCPT TO:<e@f>\r\n"),
        (b"250 b\r\n", b"DATA\r\n"),
        (b"354 go\r\n", b"hi\r\n.\r\n"),
    ]:
        written(core)
        core.receive(answer)
        assert written(core) == expected
        assert not core.may_follow
    core.receive(b"250 taken\r\n")
    assert results(core.finished[0]) == {0: 550, 1: 250}


@pytest.mark.parametrize(
    ("answers", "expected", "sent"),
    [
        (b"250 m\r\n250 r\r\n450 r\r\n550 r\r\n354 go\r\n250 ok\r\n", {0: 250, 1: 450, 2: 550}, b"hi\r\n.\r\n"),
        (b"250 m\r\n550 r\r\n550 r\r\n450 r\r\n354 go\r\n554 none\r\n", {0: 550, 1: 550, 2: 450}, b".\r\n"),
        (b"250 m\r\n550 r\r\n550 r\r\n450 r\r\n503 none\r\n", {0: 550, 1: 550, 2: 450}, b""),
        (b"451 m\r\n503 r\r\n503 r\r\n503 r\r\n503 d\r\n", {0: 451, 1: 451, 2: 451}, b""),
        (b"250 m\r\n250 r\r\n250 r\r\n250 r\r\n451 d\r\n", {0: 451, 1: 451, 2: 451}, b""),
        (b"250 m\r\n250 r\r\n550 r\r\n250 r\r\n354 go\r\n552 big\r\n", {0: 552, 1: 550, 2: 552}, b"hi\r\n.\r\n"),
    ],
)
def test_each_recipient_gets_its_own_reply(answers, expected, sent):
    core = ClientSession(PIPELINING)
    core.begin(mail("a@x", "b@x", "c@x"))
    written(core)
    assert in_turn(core, answers) == sent
    (done,) = core.finished
    assert results(done) == expected
    core.begin(mail())
    assert written(core).startswith(b"RSET\r\n") == (sent != b"hi\r\n.\r\n" and sent != b".\r\n")


def test_too_many_recipients_go_in_another_transaction():
    core = ClientSession(PIPELINING)
    core.begin(mail("a@x", "b@x", "c@x"))
    written(core)
    core.receive(b"250 m\r\n250 r\r\n452 4.5.3 too many\r\n452 4.5.3 too many\r\n354 go\r\n")
    assert written(core) == b"hi\r\n.\r\n"
    core.receive(b"250 ok\r\n")
    assert core.finished == []
    assert b"RCPT TO:<b@x>\r\nRCPT TO:<c@x>" in written(core)
    in_turn(core, b"250 m\r\n250 r\r\n550 r\r\n354 go\r\n250 ok\r\n")
    assert results(core.finished[0]) == {0: 250, 1: 250, 2: 550}


def test_many_recipients_are_split_by_the_limit():
    core = ClientSession(PIPELINING, recipients=2)
    core.begin(mail("a@x", "b@x", "c@x"))
    assert written(core).count(b"RCPT") == 2
    assert in_turn(core, b"250 m\r\n250 r\r\n250 r\r\n354 go\r\n250 ok\r\n").count(b"RCPT") == 1
    in_turn(core, b"250 m\r\n250 r\r\n354 go\r\n250 ok\r\n")
    assert results(core.finished[0]) == {0: 250, 1: 250, 2: 250}


@pytest.mark.parametrize("noise", [b"421 4.3.2 going\r\n", b"hello?\r\n", b"250 unasked\r\n250 unasked\r\n"])
def test_a_peer_that_closes_or_replies_out_of_turn_ends_the_session(noise):
    core = ClientSession(PIPELINING)
    if noise.startswith(b"250"):
        core.receive(noise)
    else:
        core.begin(mail())
        written(core)
        core.receive(noise)
        assert core.under_way()
    assert core.closing


def test_the_phase_that_was_reached_is_recorded():
    core = ClientSession(PIPELINING)
    one = mail()
    core.begin(one)
    written(core)
    assert one.reached == ""
    core.receive(b"250 m\r\n")
    assert one.reached == "mail"
    assert not one.data_sent
    core.receive(b"250 r\r\n354 go\r\n")
    assert one.data_sent
    assert written(core) == b"hi\r\n.\r\n"
    core.receive(b"250 taken\r\n")
    assert (one.reached, one.data_sent) == ("final", False)


CHUNKING = Features(True, True, False, 0, True)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(
    ("answers", "codes"),
    [
        (b"250 m\r\n250 r\r\n250 r\r\n250 taken\r\n", {0: 250, 1: 250}),
        (b"250 m\r\n250 r\r\n550 no\r\n250 taken\r\n", {0: 250, 1: 550}),
        (b"250 m\r\n550 no\r\n551 no\r\n554 none valid\r\n", {0: 550, 1: 551}),
        (b"450 m\r\n503 x\r\n503 x\r\n503 x\r\n", {0: 450, 1: 450}),
        (b"250 m\r\n550 no\r\n551 no\r\n250 taken?\r\n", {0: 550, 1: 551}),
        (b"250 m\r\n250 r\r\n250 r\r\n552 too big\r\n", {0: 552, 1: 552}),
    ],
)
def test_with_chunking_envelope_and_message_data_are_one_write(answers, codes, step):
    core = ClientSession(CHUNKING)
    one = mail("c@d", "e@f", data=b".dot\r\n")
    core.begin(one)
    assert written(core) == b"MAIL FROM:<a@b> SIZE=6\r\nRCPT TO:<c@d>\r\nRCPT TO:<e@f>\r\nBDAT 6 LAST\r\n.dot\r\nRSET\r\n"
    assert one.data_sent, "a connection that is lost from now on leaves it in doubt"
    in_turn(core, answers, step)
    assert not core.finished, "not before the RSET behind it is answered"
    in_turn(core, b"250 2.0.0 reset\r\n", step)
    assert core.finished == [one]
    assert results(one) == codes
    assert core.idle
    assert not one.data_sent


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(
    ("answers", "codes", "dot"),
    [
        (b"250 m\r\n250 r\r\n250 r\r\n354 go\r\n250 one\r\n250 two\r\n", {0: 250, 1: 250}, b"..dot\r\n.\r\n"),
        (b"250 m\r\n250 r\r\n250 r\r\n354 go\r\n250 one\r\n452 full\r\n", {0: 250, 1: 452}, b"..dot\r\n.\r\n"),
        (b"250 m\r\n550 no\r\n250 r\r\n354 go\r\n250 two\r\n", {0: 550, 1: 250}, b"..dot\r\n.\r\n"),
        (b"250 m\r\n550 no\r\n551 no\r\n503 none\r\n", {0: 550, 1: 551}, b""),
        (b"250 m\r\n550 no\r\n551 no\r\n354 go\r\n", {0: 550, 1: 551}, b""),  # and the connection ends
    ],
)
def test_lmtp_has_a_reply_for_each_recipient(answers, codes, dot, step):
    core = ClientSession(PIPELINING, lmtp=True)
    one = mail("c@d", "e@f", data=b".dot\r\n")
    core.begin(one)
    written(core)
    assert in_turn(core, answers, step) == dot
    assert core.finished == [one]
    assert results(one) == codes
    assert core.idle
    assert core.closing == (b"551" in answers and b"354" in answers)


def test_what_lmtp_has_replied_to_is_not_in_doubt():
    core = ClientSession(PIPELINING, lmtp=True)
    one = mail("c@d", "e@f")
    core.begin(one)
    written(core)
    in_turn(core, b"250 m\r\n250 r\r\n250 r\r\n354 go\r\n250 one\r\n")
    assert one.data_sent and core.under_way() == [one]
    assert one.said[0].code == 250 and 1 not in one.said


def test_stuffing():
    assert b"".join(stuff([b".a\r\n", b".\r", b"\n..b\r\nc.\r\n"])) == b"..a\r\n..\r\n...b\r\nc.\r\n.\r\n"
    assert b"".join(stuff([b"no end of line"])) == b"no end of line\r\n.\r\n"


def test_features_and_classes():
    found = features_of({"size": " 1000 ", "pipelining": "", "8bitmime": ""})
    assert (found.size, found.pipelining, found.eight_bit, found.smtputf8) == (1000, True, True, False)
    core = ClientSession(PIPELINING)
    core.begin(mail())
    written(core)
    core.receive(b"550-5.1.1 no such\r\n550 5.1.1 user\r\n550 x\r\n550 x\r\n")
    said = core.finished[0].said[0]
    assert (said.code, said.enhanced, said.text, classify(said)) == (550, "5.1.1", "no such user", "permanent")


def test_of_a_long_reply_as_much_is_kept_as_a_dsn_returns():
    said = Said(550, b"5.7.1 " + b"x" * 5000, "rcpt")
    assert len(said.text) == REPLY_LIMIT == LONGEST


def test_nothing_follows_while_message_data_is_streamed():
    core = ClientSession(PIPELINING)
    big = Mail("cargo", "a@b", [(0, "c@d")], None, 9, False, False)
    core.begin(big)
    written(core)
    core.receive(b"250 m\r\n250 r\r\n354 go\r\n")
    assert core.streaming is big
    assert not core.may_follow
    assert not core.idle
    core.data_written(True)
    assert core.may_follow
    core.receive(b"250 ok\r\n")
    assert core.finished == [big]


# What comes with the 354, the code that counts (0: none)
BEGUN = [
    (b"250 2.0.0 ok", 0), (b"250 ok\r", 0), (b"250-ok\r\n", 0), (b"250-ok\r\n250", 0), (b"2", 0), (b"25", 0), (b"\r", 0),
    (b"354 g", 0), (b"550 5.7.1 no", 550), (b"451-4.3.0 later\r\n451", 451), (b"421 4.7.0 bye", 421), (b"5", 0),
]  # fmt: skip


@pytest.mark.parametrize(("begun", "code"), BEGUN)
@pytest.mark.parametrize("lmtp", [False, True])
@pytest.mark.parametrize("features", [PIPELINING, PLAIN])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("more", [b"", b"k\r\n"])
def test_a_reply_that_has_begun_with_the_354_is_not_the_one_to_message_data(features, begun, code, lmtp, streamed, more):
    """The rest of it comes later, or never: in neither case has the peer taken anything."""
    core, one = ClientSession(features, lmtp=lmtp), mail()
    if streamed:
        one.data = None
    core.begin(one)
    written(core)
    in_turn(core, b"250 m\r\n250 r\r\n")
    core.receive(b"354 go\r\n" + begun)
    assert core.closing and not one.data_sent and not core.finished
    core.receive(more)
    core.out.clear()
    core.ended()
    assert not core.finished and not one.all_sent
    assert (one.said[0].code if 0 in one.said else core.last_said.code if core.last_said else 0) == code


def test_a_reply_that_has_begun_before_its_command_is_out_of_turn():
    core, one = ClientSession(PLAIN), mail()
    core.begin(one)
    written(core)
    core.receive(b"250 m\r\n250 o")
    assert core.closing and b"out of turn" in core.broken


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("replies", "codes"),
    [
        (b"550 5.7.1 not for a\r\n452 4.2.2 b is full\r\n", {0: 550, 1: 452}),
        (b"550 5.7.1 not for a\r\n", {0: 550}),
        (b"550 5.7.1 not for a\r\n250 ok\r\n", {0: 550}),
        (b"452 4.2.2 a is full\r\n550 b\r\n550 more\r\n", {0: 452, 1: 550}),
    ],
)
def test_early_refusals_by_lmtp_are_each_for_one_recipient(replies, codes, streamed):
    """RFC 2033 4.2."""
    core, one = ClientSession(PIPELINING, lmtp=True), mail("a@d", "b@d")
    if streamed:
        one.data = None
    core.begin(one)
    written(core)
    core.receive(b"250 m\r\n250 r\r\n250 r\r\n354 go\r\n" + replies)
    assert {index: said.code for index, said in one.said.items()} == codes
    assert core.closing and not one.data_sent and not one.all_sent


@pytest.mark.parametrize("features", [PIPELINING, PLAIN])
@pytest.mark.parametrize("line", [b"550 5.7.1 refused\r\n", b"451 4.3.0 later\r\n", b"250 ok\r\n", b"354 go\r\n", b"421 bye\r\n"])
@pytest.mark.parametrize("lmtp", [False, True])
def test_a_reply_that_comes_with_the_354_is_to_message_data_that_was_never_sent(features, line, lmtp):
    """RFC 5321 4.5.4.1: not in doubt. A refusal is the host's; whatever else it is out of turn, and the next host is asked."""
    core = ClientSession(features, lmtp=lmtp)
    one = mail("c@d", "e@f")
    core.begin(one)
    written(core)
    in_turn(core, b"250 m\r\n250 r\r\n250 r\r\n")
    core.receive(b"354 go\r\n" + line)
    assert core.closing and not one.data_sent and one.reached == "data"
    code = int(line[:3])
    assert {said.code for said in one.said.values()} == ({code} if code in (451, 550) else set())


@pytest.mark.parametrize("phase", GOES_ON)
def test_every_phase_has_an_answer_for_every_code(phase):
    """RFC 5321 4.3.2, one by one."""
    assert verdict(phase, 421) == CLOSES
    assert verdict(phase, 0) == OUT_OF_TURN, "something that is no reply"
    expected = {
        "banner": {220}, "ehlo": {250}, "helo": {250}, "starttls": {220}, "auth": {235, 334}, "data": {354},
        **{key: set(range(200, 300)) for key in ("rset", "xforward", "mail", "rcpt", "final")}, "quit": set(range(200, 600)),
    }[phase]  # fmt: skip
    for code in set(range(100, 600)) - {421}:
        otherwise = REFUSED if code >= 400 and phase != "rset" else OUT_OF_TURN
        assert verdict(phase, code) == (GO_ON if code in expected else otherwise), code
    assert {500, 502, 504, 550} == HELO_AFTER


LINES = {
    "1xx": b"150 wait\r\n", "2xx": b"299 fine\r\n", "3xx": b"399 more\r\n", "354": b"354 go\r\n", "334": b"334 go\r\n",
    "220": b"220 hello\r\n", "garbage": b"hello?\r\n", "empty": b"\r\n", "binary": b"\x16\x03\x01\0\n",
    "two": b"250 a\r\n250 b\r\n",
    "two codes": b"250-a\r\n550 b\r\n", "4xx": b"450 4.2.0 no\r\n", "421": b"421 4.3.2 bye\r\n", "5xx": b"550 5.1.1 no\r\n",
}  # fmt: skip
PEERS = {"pipelining": PIPELINING, "one by one": PLAIN, "chunking": Features(True, True, False, 0, True)}


def conversation(features: Features, lmtp: bool, step: str, line: bytes, whole: bool) -> tuple[ClientSession, Mail, bool, bool]:
    """A message for two recipients to a peer that accepts all, but replies to the command `step` with `line`: (session, mail,
    whether the peer had the data, whether it accepted it). `whole`: replies to one write arrive together."""
    core = ClientSession(features, lmtp=lmtp)
    one = mail("c@d", "e@f", data=b"Subject: x\r\n\r\n.x\r\n")
    core.open_envelope = step == "RSET"
    core.begin(one)
    had = accepted = in_data = False
    while core.out and not core.closing and not core.finished:
        answers = []
        for command in written(core).splitlines(keepends=True):
            if in_data:
                if command == b".\r\n":
                    in_data, had = False, True
                    answers += [line if step == "dot" else b"250 2.0.0 taken\r\n"] * (2 if lmtp else 1)
                    accepted = step != "dot" or line.startswith(b"2")
                continue
            verb = command[:4].decode()
            if verb == "BDAT":
                had, accepted = True, step != "dot" or line.startswith(b"2")
                answers += [line if step == "dot" else b"250 2.0.0 taken\r\n", b"250 2.0.0 reset\r\n"]
                break
            good = b"354 go\r\n" if verb == "DATA" else b"250 2.0.0 ok\r\n"
            answers.append(line if verb == step else good)
            in_data = verb == "DATA" and answers[-1].startswith(b"354")
            if verb == step == "RCPT":
                step = ""  # the first one only
        for piece in [b"".join(answers)] if whole else answers:
            core.receive(piece)
    return core, one, had, accepted


@pytest.mark.parametrize("whole", [True, False], ids=["together", "one by one"])
@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("step", ["RSET", "MAIL", "RCPT", "DATA", "dot"])
@pytest.mark.parametrize(("peer", "lmtp"), [*((name, False) for name in PEERS), ("pipelining", True)])
def test_nothing_counts_as_delivered_that_the_peer_did_not_accept(peer, lmtp, step, name, whole):
    """Every class of reply to every command: a recipient is delivered only when the peer had the message data and replied 2xx."""
    if step == "DATA" and peer == "chunking":
        return
    core, one, had, accepted = conversation(PEERS[peer], lmtp, step, LINES[name], whole)
    done = core.finished == [one]
    assert done or core.closing, "there is an end"
    for index, _ in one.recipients:
        said = one.said.get(index)
        delivered = done and (one.all_sent or (said is not None and classify(said) == "success"))
        assert not delivered or (had and accepted)
        assert not done or one.all_sent or said is not None, "each recipient has a reply of its own"
        if said is not None and classify(said) == "permanent":
            assert name == "5xx" and step in ("MAIL", "RCPT", "DATA", "dot"), "no other reply was permanent"
    if step == "dot" and name in ("2xx", "220"):
        assert had and accepted and done, "it is not sent twice"
    if step == "dot" and had and not done:
        assert one.data_sent, "in doubt"
    if name in ("2xx", "two", "220") and step in ("MAIL", "RCPT", "RSET") and not core.closing:
        assert done and all(index not in one.said or one.said[index].code == 250 for index, _ in one.recipients)
    if core.last_said is not None:
        assert core.last_said.code == 421, "no other reply stands for a message that it was not the reply to"


@pytest.mark.parametrize(
    ("features", "replies"),
    [
        (PIPELINING, b"250 m\r\n250 r\r\n354 go\r\n250 taken\r\n"),  # to message data that is not written yet
        (PIPELINING, b"250 m\r\n250 r\r\n250 too much\r\n354 go\r\n"),
        (PLAIN, b"250 m\r\n250 r\r\n354 go\r\n250 taken\r\n"),
        (PLAIN, b"250 m\r\n250 r\r\n"),
        (Features(True, True, False, 0, True), b"250 m\r\n250 r\r\n250 too much\r\n452 4.3.1 full\r\n250 reset\r\n"),
        (Features(True, True, False, 0, True), b"250 m\r\n250 x\r\n250 x\r\n250 r\r\n452 4.3.1 full\r\n250 reset\r\n"),
    ],
)
def test_early_replies_do_not_count(features, replies):
    core = ClientSession(features)
    one = mail()
    core.begin(one)
    written(core)
    core.receive(replies)
    assert core.closing and not core.finished and core.under_way() == [one]
    assert not one.said and core.last_said is None


@pytest.mark.parametrize("said", [b"250 taken\r\n", b"354 go\r\n", b"220 x\r\n"])
@pytest.mark.parametrize("behind", [False, True])
def test_message_data_that_the_peer_cannot_have_yet_is_not_accepted(said, behind):
    core = ClientSession(PIPELINING)
    one = mail(data=b"x" * 80_000 + b"\r\n")
    core.begin(one)
    written(core)
    core.receive(b"250 m\r\n250 r\r\n354 go\r\n")
    if behind:
        core.begin(mail())
    written(core)
    core.receive(said, unsent=5_000)
    assert core.closing and one in core.under_way() and not one.said
    assert one.data_sent, "in doubt"


def test_an_unwritten_envelope_casts_no_doubt_on_the_message_before_it():
    core = ClientSession(PIPELINING)
    one = mail()
    core.begin(one)
    written(core)
    core.receive(b"250 m\r\n250 r\r\n354 go\r\n")
    core.begin(mail("x@" + "y" * 200))
    written(core)
    core.receive(b"250 taken\r\n", unsent=300)
    assert core.finished == [one] and one.all_sent


@pytest.mark.parametrize(("said", "codes"), [(b"250 taken\r\n", {}), (b"354 go\r\n", {}), (b"552 5.3.4 big\r\n", {0: 552})])
def test_a_reply_while_message_data_is_streamed(said, codes):
    """Only a refusal may come early: whatever follows, this message is not accepted."""
    core = ClientSession(PIPELINING)
    big = Mail("cargo", "a@b", [(0, "c@d")], None, 9, False, False)
    core.begin(big)
    written(core)
    core.receive(b"250 m\r\n250 r\r\n354 go\r\n")
    core.receive(said)
    assert core.closing and core.under_way() == [big] and not core.finished
    assert {index: reply.code for index, reply in big.said.items()} == codes


def test_replies_to_recipients_do_not_count_when_out_of_step():
    """One reply too many after MAIL: the 550 is for the first recipient, and would be taken for the second's."""
    core = ClientSession(PIPELINING)
    one = mail("c@d", "e@f")
    core.begin(one)
    written(core)
    for line in (b"250 m\r\n", b"250 m again\r\n", b"550 no\r\n", b"250 r\r\n", b"354 go\r\n"):
        core.receive(line)
    assert core.closing and not one.said and written(core) == b""


@pytest.mark.parametrize("features", [PIPELINING, Features(True, True, False, 0, True)], ids=["data", "bdat"])
def test_nothing_follows_a_message_with_recipients_left(features):
    """Its next envelope would follow the other message's DATA, as a part of that one's data."""
    core = ClientSession(features, recipients=1)
    first = mail("c@d", "e@f")
    core.begin(first)
    written(core)
    in_turn(core, b"250 m\r\n250 r\r\n" + (b"" if features.chunking else b"354 go\r\n"))
    assert core.awaiting == "final" and not core.may_follow
    again = in_turn(core, b"250 taken\r\n" + (b"250 reset\r\n" if features.chunking else b""))
    assert again.startswith(b"MAIL FROM:<a@b>") and b"RCPT TO:<e@f>" in again
    in_turn(core, b"250 m\r\n250 r\r\n" + (b"" if features.chunking else b"354 go\r\n"))
    assert core.may_follow


def test_an_envelope_that_was_refused_behind_another_message_is_reset():
    """Otherwise the next one is nested: 503, and bounced."""
    core = ClientSession(PIPELINING)
    core.begin(mail())
    written(core)
    in_turn(core, b"250 m\r\n250 r\r\n354 go\r\n")
    core.begin(mail("e@f"))
    written(core)
    in_turn(core, b"250 taken\r\n250 m\r\n550 no\r\n554 no valid recipients\r\n")
    assert [done.all_sent for done in core.finished] == [True, False] and core.idle
    core.begin(mail())
    assert written(core).startswith(b"RSET\r\nMAIL FROM")


@pytest.mark.parametrize("real", [b"250 2.0.0 taken\r\n", b"452 4.3.1 full\r\n", b"554 5.7.1 spam\r\n"])
@pytest.mark.parametrize("surplus", [0, 1], ids=["behind MAIL", "behind RCPT"])
def test_one_reply_too_many_is_not_taken_for_that_to_bdat(real, surplus):
    core = ClientSession(CHUNKING)
    one = mail()
    core.begin(one)
    written(core)
    replies = [b"250 m\r\n", b"250 r\r\n", real, b"250 reset\r\n"]
    replies.insert(surplus, b"250 too much\r\n")
    for line in replies:
        core.receive(line)
    assert core.closing
    if real.startswith(b"250"):
        assert core.finished == [one] and one.all_sent, "whichever reply it was, it was positive"
    else:
        assert core.under_way() == [one] and not one.said and one.data_sent, "in doubt"


def test_what_bdat_delivered_stays_delivered_when_the_connection_ends():
    core = ClientSession(CHUNKING)
    one = mail()
    core.begin(one)
    written(core)
    in_turn(core, b"250 m\r\n250 r\r\n250 taken\r\n421 4.3.2 enough\r\n")
    assert core.closing and core.under_way() == [one]
    assert results(one) == {0: 250} and 0 in one.said and not one.data_sent


def test_an_envelope_follows_a_bdat_without_a_reply_yet():
    core = ClientSession(CHUNKING)
    first, second = mail(), mail("e@f")
    core.begin(first)
    written(core)
    in_turn(core, b"250 m\r\n250 r\r\n")
    assert core.may_follow
    core.begin(second)
    assert written(core).startswith(b"MAIL FROM") and not core.may_follow
    in_turn(core, b"552 5.3.4 big\r\n250 reset\r\n250 m\r\n250 r\r\n250 taken\r\n250 reset\r\n")
    assert core.finished == [first, second] and results(first) == {0: 552} and second.all_sent and core.idle


@pytest.mark.parametrize("refusal", ["451 4.3.0 later", "550 5.7.1 no"])
def test_message_data_accepted_without_a_sender_is_not_delivered(refusal):
    """With CHUNKING message data is written before the reply to MAIL arrives; a peer that accepts it anyway had no sender."""
    core, one = ClientSession(PEERS["chunking"]), mail()
    core.begin(one)
    written(core)
    in_turn(core, refusal.encode() + b"\r\n250 r\r\n250 taken\r\n250 reset\r\n")
    assert (core.finished, one.all_sent, results(one)) == ([one], False, {0: int(refusal[:3])})


@pytest.mark.parametrize(
    ("code", "text", "phase", "kind"),
    [
        (552, b"", "rcpt", "transient"),  # RFC 5321 4.5.3.1.10: as 452
        (552, b"too many recipients", "rcpt", "transient"),
        (552, b"5.5.3 too many recipients", "rcpt", "transient"),
        (552, b"4.5.3 too many recipients", "rcpt", "transient"),
        (552, b"5.2.2 mailbox full", "rcpt", "permanent"),
        (552, b"5.3.4 too large", "rcpt", "permanent"),
        (552, b"message size exceeds the limit", "mail", "permanent"),
        (552, b"too much mail data", "final", "permanent"),
        (552, b"too much mail data", "data", "permanent"),
        (452, b"", "rcpt", "transient"),
        (551, b"", "rcpt", "permanent"),
        (553, b"", "rcpt", "permanent"),
    ],
)
def test_552_to_rcpt_that_says_no_more_counts_as_452(code, text, phase, kind):
    assert classify(Said(code, text, phase)) == kind


@pytest.mark.parametrize("reply", [b"552 too many recipients\r\n", b"552 5.5.3 no more\r\n", b"452 4.5.3 no more\r\n"])
def test_too_many_recipients_by_either_code_go_in_another_transaction(reply):
    core, one = ClientSession(PIPELINING), mail("a@d", "b@d")
    core.begin(one)
    written(core)
    core.receive(b"250 ok\r\n250 ok\r\n" + reply + b"354 go\r\n")
    written(core)
    core.receive(b"250 taken\r\n")
    assert written(core).count(b"RCPT TO:<b@d>") == 1
    core.receive(b"250 ok\r\n250 ok\r\n354 go\r\n")
    written(core)
    core.receive(b"250 taken\r\n")
    assert results(one) == {0: 250, 1: 250}


@pytest.mark.parametrize(
    ("code", "text", "wants"),
    [
        (530, b"", True),
        (530, b"5.7.0 Must issue a STARTTLS command first", True),
        (523, b"", True),
        (538, b"", True),
        (554, b"5.7.10 no", True),
        (554, b"5.7.1 TLS is required", True),
        (550, b"secure connections (SSL/TLS) only", True),
        (550, b"5.7.1 encryption needed", True),
        (550, b"5.1.1 no such user", False),
        (550, b"5.7.1 turtles only", False),
        (450, b"TLS required", False),
    ],
)
def test_what_wants_tls(code, text, wants):
    """RFC 3207 4; RFC 5248 2.4."""
    assert wants_tls(Said(code, text, "mail")) == wants


@pytest.mark.parametrize("cut", [b"354 go", b"354-go\r\n", b"3", b""])
def test_no_message_data_follows_a_connection_that_has_ended(cut):
    core, one = ClientSession(PIPELINING), mail()
    core.begin(one)
    written(core)
    core.receive(b"250 ok\r\n250 ok\r\n" + cut)
    core.ended()
    assert (core.out, one.data_sent, core.under_way()) == ([], False, [one])


def test_a_reply_that_is_too_long_has_its_code_and_ends_the_session():
    core, one = ClientSession(PIPELINING), mail()
    core.begin(one)
    written(core)
    core.receive(b"250 ok\r\n250 ok\r\n354 go\r\n")
    written(core)
    core.receive(b"250 " + b"x" * 100_000)
    assert one.all_sent and core.finished == [one]
    assert core.closing


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("code", [500, 502])
@pytest.mark.parametrize("lines", [0, 1, 9])
def test_bdat_that_is_not_implemented(code, lines, step):
    """By a peer that has taken the message data all the same (0), or for commands: nothing is in doubt."""
    core, one, two = ClientSession(Features(True, True, False, 0, True)), mail("c@d", "no@d"), mail()
    core.begin(one)
    core.begin(two)
    written(core)
    said = b"%d what?\r\n" % code
    in_turn(core, b"250 ok\r\n250 ok\r\n550 no\r\n" + said * (1 + lines) + b"250 ok\r\n", step)
    assert core.no_bdat and core.not_sent and core.closing
    assert core.under_way() == [one, two]
    assert not one.data_sent and not two.data_sent and not core.finished
    assert {index: reply.code for index, reply in one.said.items()} == {1: 550}


def test_a_message_whose_bdat_is_not_implemented_is_sent_by_data_on_the_same_connection():
    core, one = ClientSession(Features(True, True, False, 0, True)), mail("c@d", "no@d")
    core.begin(one)
    written(core)
    assert (
        in_turn(core, b"250 ok\r\n250 ok\r\n550 no\r\n502 no\r\n250 ok\r\n")
        == b"MAIL FROM:<a@b> SIZE=4\r\nRCPT TO:<c@d>\r\nDATA\r\n"
    )
    assert in_turn(core, b"250 ok\r\n250 ok\r\n354 go\r\n") == b"hi\r\n.\r\n"
    in_turn(core, b"502 5.7.1 unwanted\r\n")
    assert results(one) == {0: 502, 1: 550} and core.finished == [one] and core.no_bdat


@pytest.mark.parametrize("rest", [b"\r\ngarbage\r\n", b"\r\n250 more\r\n", b"\r\n2", b""])
def test_message_data_by_bdat_that_was_not_written_is_not_in_doubt(rest):
    """The envelope of a further transaction waits in `out` when the peer speaks out of turn, or closes."""
    core, one = ClientSession(Features(True, True, False, 0, True), recipients=1), mail("c@d", "e@f")
    core.begin(one)
    written(core)
    in_turn(core, b"250 m\r\n250 r\r\n250 taken\r\n")
    core.receive(b"250 reset" + rest)
    core.ended()
    assert not one.data_sent and one.said.get(1) is None and not core.finished
