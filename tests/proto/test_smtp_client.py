"""The client session against scripted replies."""

import pytest

from relaymta.proto.smtp_client import ClientSession, Features, Mail, classify, features_of, stuff

PIPELINING = Features(True, True, False, 0)
PLAIN = Features(False, False, False, None)


def mail(*recipients: str, text: bytes = b"hi\r\n") -> Mail:
    return Mail("cargo", "a@b", list(enumerate(recipients or ("c@d",))), [text], len(text), False, False)


def written(core: ClientSession) -> bytes:
    out = b"".join(core.out)
    core.out.clear()
    return out


def results(done: Mail) -> dict[int, int]:
    return {index: done.said[index].code if index in done.said else 250 for index, _ in done.recipients}


@pytest.mark.parametrize("step", [0, 1])
def test_a_warm_link_takes_one_round_trip_a_message(step):
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
    answer = b"250 2.0.0 taken\r\n250 ok\r\n250 ok\r\n354 go\r\n"
    for start in range(0, len(answer), step or len(answer)):
        core.receive(answer[start : start + (step or len(answer))])
    assert core.finished == [first]
    assert first.all_sent
    assert written(core) == b"hi\r\n.\r\n"
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
def test_each_recipient_gets_its_own_answer(answers, expected, sent):
    core = ClientSession(PIPELINING)
    core.begin(mail("a@x", "b@x", "c@x"))
    written(core)
    core.receive(answers)
    assert written(core) == sent
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
    core.receive(b"250 m\r\n250 r\r\n550 r\r\n354 go\r\n250 ok\r\n")
    assert results(core.finished[0]) == {0: 250, 1: 250, 2: 550}


def test_many_recipients_are_split_by_the_limit():
    core = ClientSession(PIPELINING, recipients=2)
    core.begin(mail("a@x", "b@x", "c@x"))
    assert written(core).count(b"RCPT") == 2
    core.receive(b"250 m\r\n250 r\r\n250 r\r\n354 go\r\n250 ok\r\n")
    assert written(core).count(b"RCPT") == 1
    core.receive(b"250 m\r\n250 r\r\n354 go\r\n250 ok\r\n")
    assert results(core.finished[0]) == {0: 250, 1: 250, 2: 250}


@pytest.mark.parametrize("noise", [b"421 4.3.2 going\r\n", b"hello?\r\n", b"250 unasked\r\n250 unasked\r\n"])
def test_a_peer_that_closes_or_talks_out_of_turn_ends_the_session(noise):
    core = ClientSession(PIPELINING)
    if noise.startswith(b"250"):
        core.receive(noise)
    else:
        core.begin(mail())
        core.receive(noise)
        assert core.under_way()
    assert core.closing


def test_how_far_it_came_is_known():
    core = ClientSession(PIPELINING)
    one = mail()
    core.begin(one)
    assert one.reached == ""
    core.receive(b"250 m\r\n")
    assert one.reached == "mail"
    assert not one.text_out
    core.receive(b"250 r\r\n354 go\r\n")
    assert one.text_out
    core.receive(b"250 taken\r\n")
    assert (one.reached, one.text_out) == ("final", False)


CHUNKING = Features(True, True, False, 0, True)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(
    ("answers", "codes"),
    [
        (b"250 m\r\n250 r\r\n250 r\r\n250 taken\r\n", {0: 250, 1: 250}),
        (b"250 m\r\n250 r\r\n550 no\r\n250 taken\r\n", {0: 250, 1: 550}),
        (b"250 m\r\n550 no\r\n551 no\r\n554 none valid\r\n", {0: 550, 1: 551}),
        (b"450 m\r\n503 x\r\n503 x\r\n503 x\r\n", {0: 450, 1: 450}),
        (b"250 m\r\n250 r\r\n250 r\r\n552 too big\r\n", {0: 552, 1: 552}),
    ],
)
def test_with_chunking_envelope_and_text_are_one_flight(answers, codes, step):
    core = ClientSession(CHUNKING)
    one = mail("c@d", "e@f", text=b".dot\r\n")
    core.begin(one)
    assert written(core) == b"MAIL FROM:<a@b> SIZE=6\r\nRCPT TO:<c@d>\r\nRCPT TO:<e@f>\r\nBDAT 6 LAST\r\n.dot\r\n"
    assert one.text_out, "a connection that is lost from now on leaves it in doubt"
    for start in range(0, len(answers), step or len(answers)):
        core.receive(answers[start : start + (step or len(answers))])
    assert core.finished == [one]
    assert results(one) == codes
    assert core.idle
    assert not one.text_out


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(
    ("answers", "codes", "dot"),
    [
        (b"250 m\r\n250 r\r\n250 r\r\n354 go\r\n250 one\r\n250 two\r\n", {0: 250, 1: 250}, b"..dot\r\n.\r\n"),
        (b"250 m\r\n250 r\r\n250 r\r\n354 go\r\n250 one\r\n452 full\r\n", {0: 250, 1: 452}, b"..dot\r\n.\r\n"),
        (b"250 m\r\n550 no\r\n250 r\r\n354 go\r\n250 two\r\n", {0: 550, 1: 250}, b"..dot\r\n.\r\n"),
        (b"250 m\r\n550 no\r\n551 no\r\n503 none\r\n", {0: 550, 1: 551}, b""),
        (b"250 m\r\n550 no\r\n551 no\r\n354 go\r\n", {0: 550, 1: 551}, b".\r\n"),
    ],
)
def test_lmtp_has_a_reply_for_each_recipient(answers, codes, dot, step):
    core = ClientSession(PIPELINING, lmtp=True)
    one = mail("c@d", "e@f", text=b".dot\r\n")
    one.dotted = True
    core.begin(one)
    written(core)
    for start in range(0, len(answers), step or len(answers)):
        core.receive(answers[start : start + (step or len(answers))])
    assert core.finished == [one]
    assert results(one) == codes
    assert written(core) == dot
    assert core.idle


def test_what_lmtp_has_answered_is_not_in_doubt():
    core = ClientSession(PIPELINING, lmtp=True)
    one = mail("c@d", "e@f")
    core.begin(one)
    core.receive(b"250 m\r\n250 r\r\n250 r\r\n354 go\r\n250 one\r\n")
    assert one.text_out and core.under_way() == [one]
    assert one.said[0].code == 250 and 1 not in one.said


def test_stuffing():
    assert b"".join(stuff([b".a\r\n", b".\r", b"\n..b\r\nc.\r\n"])) == b"..a\r\n..\r\n...b\r\nc.\r\n"


def test_features_and_classes():
    found = features_of({"size": " 1000 ", "pipelining": "", "8bitmime": ""})
    assert (found.size, found.pipelining, found.eight_bit, found.smtputf8) == (1000, True, True, False)
    core = ClientSession(PIPELINING)
    core.begin(mail())
    core.receive(b"550-5.1.1 no such\r\n550 5.1.1 user\r\n550 x\r\n550 x\r\n")
    said = core.finished[0].said[0]
    assert (said.code, said.enhanced, said.text, classify(said)) == (550, "5.1.1", "no such user", "permanent")


def test_nothing_follows_while_a_text_is_streamed():
    core = ClientSession(PIPELINING)
    big = Mail("cargo", "a@b", [(0, "c@d")], None, 9, False, False)
    core.begin(big)
    core.receive(b"250 m\r\n250 r\r\n354 go\r\n")
    assert core.streaming is big
    assert not core.may_follow
    assert not core.idle
    core.text_written(True)
    assert core.may_follow
    core.receive(b"250 ok\r\n")
    assert core.finished == [big]
