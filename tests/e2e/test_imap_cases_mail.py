"""Cases that other IMAP servers got wrong, as the RFCs have them: messages, quota, POP3. `a` and `b` are two sessions of one
user, on two workers."""

import contextlib
import poplib
import smtplib
from collections.abc import Iterator

import pytest

from tests.support.daemon import PATIENCE, wait_for
from tests.support.imap_relay import ImapRelay, message
from tests.support.mailboxes import shown, verified


@pytest.fixture(scope="module")
def relay(tmp_path_factory) -> Iterator[ImapRelay]:
    with ImapRelay(tmp_path_factory.mktemp("cases"), protocols=("imap", "pop3", "lmtp")) as relay:
        yield relay
        verified(relay)


NOBODY = (None, None, None, None)  # the end of a group
GROUPS = b'A: a1@x.example, "B \\"b\\" \\\\" <b@y.example>;, plain@z.example, Empty list:;'


def test_case_11_envelope(relay, user):
    a = relay.session(user)

    def envelope(header: bytes, literal8: bool = False) -> list:
        octets = header + b"\r\n\r\nx\r\n"
        a.ok(b"APPEND INBOX %b{%d+}\r\n%b" % (b"~" if literal8 else b"", len(octets), octets))
        a.ok("SELECT INBOX")
        return a.fetch("* (ENVELOPE)").popitem()[1]["ENVELOPE"]

    found = envelope(b"From: A <a@x.example>\r\nTo: undisclosed-recipients:;\r\nCc:\r\nSender:\r\nReply-To:  \r\nIn-Reply-To:")
    author = [(b"A", None, b"a", b"x.example")]
    assert found[2:6] == [author, author, author, [(None, None, b"undisclosed-recipients", None), NOBODY]]
    assert found[:2] == [None, None] and found[6:] == [None, None, b"", None]  # no Date and Subject; an empty Cc; no Message-ID
    found = envelope(b"From: a@x.example\r\nSender: s@x.example\r\nReply-To: r@x.example\r\nTo: " + GROUPS)
    assert [one[0][2] for one in found[2:5]] == [b"a", b"s", b"r"]
    assert found[5] == [
        (None, None, b"A", None), (None, None, b"a1", b"x.example"), (b'B "b" \\', None, b"b", b"y.example"), NOBODY,
        (None, None, b"plain", b"z.example"), (None, None, b"Empty list", None), NOBODY,
    ]  # fmt: skip
    assert envelope(b"Subject: no addresses")[2:8] == [None] * 6
    assert envelope(b"Subject: folded\r\n here\r\n\tand there")[1] in (b"folded here\tand there", b"folded here and there")
    assert envelope(b'Subject: "quoted" and \\ back\\"slash')[1] == b'"quoted" and \\ back\\"slash'
    assert envelope("Subject: Grüße\r\nFrom: Jörg <j@x.example>".encode())[1] == "Grüße".encode()
    assert envelope(b"Subject: \xfc \xff")[1] == b"\xfc \xff"
    assert envelope(b"Subject: a\0b\r\nFrom: c\0d <e@x.example>", literal8=True)[1] in (b"a b", b"a\x80b", b"ab")
    assert envelope(b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=")[1] == b"=?utf-8?q?Gr=C3=BC=C3=9Fe?="  # clients decode it
    for header in (b"To: <@a,@b:c@d.example>", b"To: broken <", b"To: ,,;", b"From: " + b"(" * 200, b'To: "a', b"To: a@b@c"):
        envelope(header)  # what the grammar allows
    tag = a.start("FETCH 1:* (ENVELOPE)")
    assert a.finish(tag).status == "OK"
    a.ok("ENABLE UTF8=ACCEPT")
    assert a.fetch("6 (ENVELOPE)")[6]["ENVELOPE"][1] == "Grüße".encode()


INNER = b"""Subject: inner\r
From: i@x.example\r
MIME-Version: 1.0\r
%b\r
"""
NESTED = b"""From: a@x.example\r
Subject: outer\r
X-None-Such: a\r
\tfolded\r
MIME-Version: 1.0\r
Content-Type: multipart/mixed; boundary=o\r
\r
preamble\r
--o\r
Content-Type: text/plain\r
X-Part: 1\r
\r
first\r
--o\r
Content-Type: message/rfc822\r
X-Part: 2\r
\r
%b\r
--o--\r
"""


def test_case_12_sections_of_an_attached_message(relay, user):
    a = relay.session(user)
    many = b"--i\r\nContent-Type: text/plain; charset=utf-8\r\nX-Part: 2.1\r\n\r\ninner text\r\n--i\r\n\r\nother\r\n--i--"
    header = INNER % b"Content-Type: multipart/mixed; boundary=i\r\n"
    a.append("INBOX", NESTED % (header + many))
    single = INNER % b"Content-Type: text/html\r\n"
    a.append("INBOX", NESTED % (single + b"<p>inner text"))
    a.append("INBOX", message("plain", "the text"))
    a.append("INBOX", b"Subject: no blank line\r\n")
    a.ok("EXAMINE INBOX")
    expected = {
        "1": {
            "1": b"first", "1.MIME": b"Content-Type: text/plain\r\nX-Part: 1\r\n\r\n", "2": header + many,
            "2.MIME": b"Content-Type: message/rfc822\r\nX-Part: 2\r\n\r\n", "2.HEADER": header, "2.TEXT": many,
            "2.1": b"inner text", "2.1.MIME": b"Content-Type: text/plain; charset=utf-8\r\nX-Part: 2.1\r\n\r\n",
            "2.2": b"other", "2.2.MIME": b"\r\n", "2.3": None, "3": None, "1.1": None, "2.1.1": None, "1.HEADER": None,
            "2.HEADER.FIELDS (subject)": b"Subject: inner\r\n\r\n", "2.HEADER.FIELDS (X-Part)": b"\r\n",
            "2.HEADER.FIELDS.NOT (From Content-Type)": b"Subject: inner\r\nMIME-Version: 1.0\r\n\r\n",
            "HEADER.FIELDS (X-none-SUCH)": b"X-None-Such: a\r\n\tfolded\r\n\r\n", "HEADER.FIELDS (Bcc Sender)": b"\r\n",
        },
        "2": {
            "2": single + b"<p>inner text", "2.HEADER": single, "2.TEXT": b"<p>inner text", "2.1": b"<p>inner text",
            "2.1.MIME": single, "2.2": None,
        },
        "3": {"1": b"the text\r\n", "TEXT": b"the text\r\n", "2": None, "1.1": None, "HEADER": message("plain", "")[:-2]},
        "4": {"TEXT": b"", "1": b"", "HEADER": b"Subject: no blank line\r\n"},
    }  # fmt: skip
    for number, sections in expected.items():
        items = " ".join(f"BODY.PEEK[{section}]" for section in sections)
        found = a.fetch(f"{number} ({items})")[int(number)]
        assert found == {f"BODY[{section}]": value for section, value in sections.items()}
    said = a.raw('FETCH 1 (BODY.PEEK[HEADER.FIELDS ("Subject" x-NONE)] BODY.PEEK[HEADER.FIELDS (DATE)]<0.1>)')
    assert (
        b"(BODY[HEADER.FIELDS (Subject x-NONE)] {18}\r\nSubject: outer\r\n\r\n BODY[HEADER.FIELDS (DATE)]<0> {1}\r\n\r)" in said
    )
    for section in ("MIME", "HEADER.FIELDS", "HEADER.FIELDS ()", "1.", "0", "1.0", ".1", "TEXT.1", "HEADER.1", "01"):
        assert a.command(f"FETCH 1 (BODY.PEEK[{section}])").status == "BAD", section
    structure = a.fetch("1 (BODYSTRUCTURE)")[1]["BODYSTRUCTURE"]
    attached = structure[0][1]
    assert attached[:2] == (b"MESSAGE", b"RFC822") and attached[7][1] == b"inner" and attached[8][0][0][:2] == (b"TEXT", b"PLAIN")
    assert attached[6] == len(header + many) and attached[9] == (header + many).count(b"\r\n")


PART = "--o\r\nContent-Type: {}\r\nContent-Transfer-Encoding: {}\r\n\r\n{}\r\n"
MIXED = "Subject: {}\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=o\r\n\r\n{}--o--\r\n"
SEARCHED = [
    b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe_aus?= =?iso-8859-1?b?IEv2bG4=?=\r\nX-Tag: one\r\n\r\nplain\r\n",
    b"Subject: =?utf-8?B?R3LDvA==?=\r\n =?utf-8?B?w59l?= an alle\r\n\r\nanother\r\n",  # "Grü" and "ße"
    MIXED.format("qp", PART.format("text/plain; charset=utf-8", "quoted-printable", "Donau=\r\ndampf Stra=C3=\r\n=9Fe")).encode(),
    MIXED.format("b64", PART.format("text/plain; charset=utf-8", "base64", "w5xiZXIgRG9uYXVk\r\nYW1wZg==")).encode(),
    b"Subject: latin\r\nContent-Type: text/plain; charset=iso-8859-1\r\n\r\n\xfcber den Dingen\r\n",
    MIXED.format("html", PART.format("text/html", "7bit", "<p>&uuml;ber <b>fett</b></p>")).encode(),
    MIXED.format("file", PART.format('application/octet-stream; name="donaudampf.bin"', "base64", "b3BhcXVl")).encode(),
    MIXED.format("mail", PART.format("message/rfc822", "7bit", "Subject: attached\r\nX-Tag: two\r\n\r\ndeep inside")).encode(),
]

FOUND = {
    'SUBJECT "köln"': [1], 'SUBJECT "GRÜSSE"': [1, 2], 'SUBJECT "grüße an"': [2], 'SUBJECT "="': [],
    'HEADER subject "ße A"': [1, 2], 'BODY "donaudampf"': [3, 4], 'BODY "straße"': [3], 'BODY "Stra="': [],
    'TEXT "donaudampf"': [3, 4, 7], 'BODY "über"': [4, 5], 'BODY "ÜBER D"': [4, 5], 'BODY "&UUML;ber"': [6],
    'BODY "<b>fett"': [6], 'BODY "opaque"': [], 'BODY "deep inside"': [8], 'BODY "X-Tag"': [], 'TEXT "x-tag"': [1, 8],
    'HEADER X-Tag ""': [1], 'HEADER X-Tag "ON"': [1], 'HEADER X-None ""': [], 'TEXT ""': [1, 2, 3, 4, 5, 6, 7, 8],
    'BODY "plain" SUBJECT "grüße"': [1], 'BODY "over"': [],
}  # fmt: skip


def test_case_13_search_finds_what_people_see(relay, user):
    a = relay.session(user)
    for one in SEARCHED:
        assert a.append("INBOX", one, plus=True).status == "OK"
    a.ok("SELECT INBOX")
    for keys, found in FOUND.items():
        assert a.searched(keys.encode()) == found, keys
        assert a.searched(b"CHARSET UTF-8 " + keys.encode()) == found, keys
    assert a.searched("CHARSET US-ASCII SUBJECT latin") == [5] == a.searched('charset "us-ascii" SUBJECT LATIN')
    assert a.searched(b"CHARSET UTF-8 SUBJECT {6+}\r\nK\xc3\xb6ln ") == []
    assert a.searched(b"CHARSET UTF-8 SUBJECT {5+}\r\nK\xc3\xb6ln") == [1]
    for charset in ("KOI8-R", "UTF-7", '"iso-8859-1"'):
        answer = a.command(f"SEARCH CHARSET {charset} ALL")
        assert (answer.status, answer.last.code) == ("NO", ("BADCHARSET", [b"US-ASCII", b"UTF-8"])), charset
    assert a.command(b"SEARCH SUBJECT {2+}\r\n\xc3\xc3").status == "BAD"

    a.ok("STORE 2,4,6 +FLAGS (\\Flagged)")
    assert a.searched("OR FLAGGED SUBJECT latin NOT 2") == [4, 5, 6]
    assert a.searched('NOT (OR (FLAGGED NOT BODY "donau") (OR 1 UID 8:9)) 1:7') == [3, 4, 5, 7]
    assert a.searched("NOT NOT FLAGGED") == [2, 4, 6] and a.searched("OR (1 2) (3,4 FLAGGED)") == [4]
    a.expunge("1")  # so that numbers are not UIDs
    (found,) = a.ok("UID SEARCH RETURN (MIN COUNT) FLAGGED").named("ESEARCH")
    assert {name: found.data[name] for name in ("UID", "MIN", "COUNT")} == {"UID": True, "MIN": 2, "COUNT": 3}
    (found,) = a.ok("SEARCH RETURN (MIN MAX ALL) FLAGGED").named("ESEARCH")
    assert (found.data["UID"], found.data["MIN"], found.data["MAX"], found.data["ALL"]) == (False, 1, 5, [(1, 1), (3, 3), (5, 5)])
    (found,) = a.ok("UID SEARCH RETURN (MIN MAX COUNT ALL) SUBJECT nowhere").named("ESEARCH")
    assert set(found.data) == {"UID", "TAG", "COUNT"} and found.data["COUNT"] == 0
    assert a.ok("UID SEARCH RETURN (SAVE) FLAGGED").untagged == []
    assert list(a.fetch("$ (UID)")) == [1, 3, 5] and a.searched("NOT $") == [2, 4, 6, 7] and a.searched("UID $ 2:3") == [3]
    assert [one.data[0] for one in a.ok("UID SEARCH OR $ UID 8").named("SEARCH")] == [[2, 4, 6, 8]]
    a.expunge("4")
    assert list(a.fetch("UID FETCH $ (FLAGS)").values())[-1]["UID"] == 6 and list(a.fetch("$ (UID)")) == [1, 4]
    assert a.command("SEARCH RETURN (SAVE) CHARSET KOI8-R (OR $ 1) TEXT x").status == "NO"
    assert a.ok("FETCH $ (UID)").untagged == []  # RFC 9051 6.4.4.1: a search to be saved that has failed leaves it empty
    assert a.command("SEARCH RETURN (SAVE MIN) FLAGGED").status == "OK" and list(a.fetch("$ (UID)")) == [1]
    assert a.command("SEARCH RETURN (SAVE) BLURDY").status == "BAD" and list(a.fetch("$ (UID)")) == [1]
    assert a.command("SEARCH CHARSET KOI8-R ALL").status == "NO" and list(a.fetch("$ (UID)")) == [1]


def test_case_14_full(relay, user):
    a, b = relay.pair(user, 10)
    other = f"{user}-other"
    relay.user(other)
    full = f"{user}-full"
    relay.user(full, octets=2000)
    relay.cli("mailbox", "quota", f"{user}@local.example", "none", "--messages", "15")
    before = a.status("Archive", "MESSAGES", "HIGHESTMODSEQ")
    answer = a.command("COPY 1:10 Archive")
    assert (answer.status, answer.code) == ("NO", "OVERQUOTA") and a.status("Archive", "MESSAGES", "HIGHESTMODSEQ") == before
    assert a.ok("COPY 1:5 Archive").code == "COPYUID" and a.command("UID COPY 1 Archive").code == "OVERQUOTA"
    assert a.ok("MOVE 1:10 Trash").untagged[0].code[1][1:] == ([(1, 10)], [(1, 10)])  # though not one more fits
    assert a.status("Trash", "MESSAGES") == [10] and a.ok("GETQUOTAROOT INBOX").named("QUOTA")[0].data[1] == {"MESSAGE": (15, 15)}
    for command in ("APPEND INBOX {20}", "APPEND INBOX (\\Seen) {20}", "APPEND INBOX {3+}\r\nx: "):
        answer = a.command(command)
        assert (answer.status, answer.code, answer.untagged) == ("NO", "OVERQUOTA", []), command  # without a `+` before it
    relay.quota(user, octets=5000)
    answer = a.append("INBOX", message("more", "x" * 5000))
    assert (answer.status, answer.code) == ("NO", "OVERQUOTA") and a.append("INBOX", message("small")).status == "OK"
    both = message("one", "x" * 2000)
    answer = a.command(b"APPEND INBOX {%d+}\r\n%b {%d+}\r\n%b" % (len(both), both, len(both), both))  # all or nothing
    assert (answer.status, answer.code) == ("NO", "OVERQUOTA") and b.status("INBOX", "MESSAGES") == [1]

    relay.quota(user)
    relay.mail(full, "first")
    large = b"Subject: %b\r\n\r\n" + b"x" * 70 + b"\r\n" * 1000
    with smtplib.LMTP("127.0.0.1", relay.ports["lmtp"], timeout=PATIENCE) as client:
        client.ehlo()
        client.mail("s@x.example")
        assert [client.rcpt(f"{name}@local.example")[0] for name in (user, full, other)] == [250, 250, 250]
        replies = [client.data(large % b"to three"), client.getreply(), client.getreply()]
    assert [(code, text.split()[0]) for code, text in replies] == [(250, b"2.1.5"), (452, b"4.2.2"), (250, b"2.1.5")]
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
        client.sendmail("s@x.example", [f"{name}@local.example" for name in (user, full, other)], large % b"by SMTP")
    wait_for(lambda: shown(relay, other)["INBOX"] == ["to three", "by SMTP"] == shown(relay, user)["INBOX"][1:], what="delivery")
    assert shown(relay, full)["INBOX"] == ["first"] and b.status("INBOX", "MESSAGES") == [3]


def test_case_15_pop3(relay, user):
    a = relay.session(user)
    a.put("INBOX", "one", "two")
    a.append("INBOX", b"Subject: dots\r\n\r\n.\r\n..\r\n.dot\r\nlast")
    a.put("INBOX", "four", "five")
    a.ok("SELECT INBOX")

    def session() -> poplib.POP3:
        made = poplib.POP3("127.0.0.1", relay.ports["pop3"], timeout=PATIENCE)
        made.user(f"{user}@local.example")
        made.pass_("geheim")
        return made

    def refused(session: poplib.POP3, command: str) -> bool:
        with pytest.raises(poplib.error_proto, match="-ERR"):
            session._shortcmd(command)
        return True

    pop = session()
    sizes = {number: one["RFC822.SIZE"] for number, one in a.fetch("1:* (RFC822.SIZE)").items()}
    ids = [line.split()[1] for line in pop.uidl()[1]]
    assert pop.stat() == (5, sum(sizes.values())) and len(set(ids)) == 5
    assert pop.dele(2).startswith(b"+OK")
    assert [int(line.split()[0]) for line in pop.list()[1]] == [1, 3, 4, 5] == [int(line.split()[0]) for line in pop.uidl()[1]]
    assert pop.stat() == (4, sum(sizes.values()) - sizes[2])
    for command in ("RETR 2", "DELE 2", "LIST 2", "UIDL 2", "TOP 2 0", "RETR 6", "RETR 0"):
        assert refused(pop, command)
    assert pop.uidl(3) == b"+OK 3 " + ids[2] and pop.list(3) == b"+OK 3 %d" % sizes[3]
    lines = pop.retr(3)[1]
    assert lines == [b"Subject: dots", b"", b".", b"..", b".dot", b"last"]
    assert pop.rset().startswith(b"+OK") and pop.stat()[0] == 5
    pop.dele(1)
    pop.close()  # cut
    assert a.ok("NOOP").named("EXPUNGE") == [] and a.status("INBOX", "MESSAGES") == [5]

    def opened() -> poplib.POP3 | None:
        with contextlib.suppress(poplib.error_proto):  # the seat of the one that was cut
            return session()
        return None

    pop = wait_for(opened, what="the maildrop")
    a.expunge("4")
    assert refused(pop, "RETR 4") and pop.stat()[0] == 5  # a snapshot (RFC 1939 3)
    pop.dele(5)
    pop.dele(4)
    with contextlib.suppress(poplib.error_proto):  # that one of them was gone may be said
        pop.quit()
    assert shown(relay, user)["INBOX"] == ["one", "two", "dots"]
    assert [one.number for one in a.ok("NOOP").named("EXPUNGE")] == [4]
    a.ok("STORE 1:* +FLAGS.SILENT (\\Deleted)")
    a.ok("EXPUNGE")
    a.put("INBOX", "one")
    pop = session()
    (line,) = pop.uidl()[1]
    assert line.split()[1] not in ids  # never for another message
    pop.quit()
