"""Each capability that is offered to IMAP clients, as its RFC has it: logins, revisions, commands, SEARCH, data. Those of
mailboxes, quota and synchronization: test_imap_capabilities_more.py."""

import datetime
import ssl
from base64 import b64decode, b64encode
from collections.abc import Iterator

import pytest
import scramp

from relaymta import control
from relaymta.proto.imap_capability import HIDEABLE
from tests.support.daemon import free_port
from tests.support.imap_client import Answer
from tests.support.imap_relay import PASSWORD, ImapRelay, Session, message
from tests.support.mailboxes import verified

MECHANISMS = ["AUTH=SCRAM-SHA-256", "AUTH=PLAIN", "AUTH=LOGIN"]
BEFORE = ["IMAP4rev1", "IMAP4rev2", "SASL-IR", "LITERAL+", "ID", "ENABLE"]
LIMIT = 3_000_000
AFTER = [
    "IMAP4rev1", "IMAP4rev2", "LITERAL+", "ID", "ENABLE", "IDLE", "NAMESPACE", "CHILDREN", "UNSELECT", "UIDPLUS", "MOVE",
    "ESEARCH", "SEARCHRES", "CONDSTORE", "QRESYNC", "LIST-EXTENDED", "LIST-STATUS", "SPECIAL-USE", "CREATE-SPECIAL-USE",
    "STATUS=SIZE", "APPENDLIMIT=3000000", "QUOTA", "QUOTA=RES-STORAGE", "QUOTA=RES-MESSAGE", "MULTIAPPEND", "OBJECTID",
    "SAVEDATE", "WITHIN", "BINARY", "UTF8=ACCEPT", "SORT", "THREAD=REFERENCES", "THREAD=ORDEREDSUBJECT", "PREVIEW",
]  # fmt: skip


class Offering(ImapRelay):
    """An IMAP relay with a listener, "strict", that takes logins under TLS alone."""

    def command(self) -> list[str]:
        if "strict" not in self.ports:
            self.ports["strict"] = free_port()
            listener = f'[[listener]]\naddress = "127.0.0.1:{self.ports["strict"]}"\nprotocol = "imap"\n'
            self.config.write_text(self.config.read_text() + listener)
        return super().command()

    def hide(self, *names: str) -> None:
        """Offer no such capabilities from now on."""
        text = self.config.read_text().partition("[imap]")[0]
        self.config.write_text(text + f"[imap]\nhide = {list(names)!r}\n")
        control.ask(self.spool / "control.sock", "reload")


@pytest.fixture(scope="module")
def relay(tmp_path_factory) -> Iterator[Offering]:
    with Offering(tmp_path_factory.mktemp("offers"), f"limits.message_size={LIMIT}") as relay:
        yield relay
        verified(relay)


def offered(answer: Answer) -> list[str]:
    """What the response code of a greeting or a login says."""
    assert answer.last.code is not None and answer.last.code[0] == "CAPABILITY"
    return list(answer.last.code[1])


def test_the_lists_are_exactly_these(relay, user):
    for place, before in (
        ("imap", [*BEFORE, "STARTTLS", *MECHANISMS]),  # auth_in_clear, on a loopback address
        ("strict", [*BEFORE, "STARTTLS", "LOGINDISABLED"]),
        ("imaps", [*BEFORE, *MECHANISMS]),
    ):
        session = relay.connect(place)
        assert offered(Answer([], session.greeting())) == before, place
        assert session.ok("CAPABILITY").named("CAPABILITY")[0].data == before
        if place == "strict":
            continue
        assert offered(session.ok(f"LOGIN {user}@local.example {PASSWORD}")) == AFTER, place
        assert session.ok("CAPABILITY").named("CAPABILITY")[0].data == AFTER
        session.ok("SELECT INBOX")
        session.ok("ENABLE IMAP4rev2 QRESYNC UTF8=ACCEPT")
        assert session.ok("CAPABILITY").named("CAPABILITY")[0].data == AFTER  # RFC 9051 6.3.1


def test_hide_takes_one_back(relay, user):
    old = relay.session(user)
    try:
        for hidden in (["QRESYNC"], ["IMAP4rev2", "SASL-IR", "APPENDLIMIT", "IDLE"], list(HIDEABLE)):
            relay.hide(*hidden)
            session = relay.connect()
            assert not set(hidden) & set(offered(Answer([], session.greeting())))
            left = [name for name in AFTER if name.partition("=3")[0] not in hidden]
            assert offered(session.ok(f"LOGIN {user}@local.example {PASSWORD}")) == left
            enabled = session.ok("ENABLE QRESYNC IMAP4rev2 CONDSTORE UTF8=ACCEPT").named("ENABLED")[0].data
            assert enabled == [one for one in ("QRESYNC", "IMAP4rev2", "CONDSTORE", "UTF8=ACCEPT") if one in left]
            if "QRESYNC" in hidden:
                assert session.command("SELECT INBOX (QRESYNC (1 1))").status == "BAD"
        assert left == ["IMAP4rev1"]
        assert old.ok("CAPABILITY").named("CAPABILITY")[0].data == AFTER  # what it was told holds
    finally:
        relay.hide()


# Before and in the login


def test_starttls(relay, user):
    session = relay.connect("strict")
    session.greeting()
    session.ok("ID NIL")
    assert session.ok("STARTTLS").untagged == []
    context = ssl.create_default_context(cafile=relay.ca)
    secure = Session(context.wrap_socket(session.sock, server_hostname="localhost"))
    assert secure.ok("CAPABILITY").named("CAPABILITY")[0].data == [*BEFORE, *MECHANISMS]  # no greeting comes (RFC 9051 6.2.1)
    assert secure.command("STARTTLS").status == "BAD"
    assert offered(secure.ok(f"LOGIN {user}@local.example {PASSWORD}")) == AFTER
    assert secure.command("STARTTLS").status == "BAD"
    injected = relay.connect("strict")
    injected.greeting()
    injected.send(b"x1 STARTTLS\r\nx2 CAPABILITY\r\n")  # command injection
    assert injected.response()[:2] == ("x1", "BAD") and injected.ended().startswith(b"* BYE")


def test_logindisabled(relay, user):
    session = relay.connect("strict")
    session.greeting()
    plain = b64encode(f"\0{user}@local.example\0{PASSWORD}".encode()).decode()
    for command in (f"LOGIN {user}@local.example {PASSWORD}", f"AUTHENTICATE PLAIN {plain}", "AUTHENTICATE PLAIN"):
        answer = session.command(command)
        assert (answer.status, answer.code) == ("NO", "PRIVACYREQUIRED"), command
    assert session.command('LIST "" *').status == "BAD"


def test_sasl_ir_and_mechanisms(relay, user):
    name = f"{user}@local.example"
    plain = b64encode(f"\0{name}\0{PASSWORD}".encode())

    def connected() -> Session:
        session = relay.connect()
        session.greeting()
        return session

    assert offered(connected().ok(b"AUTHENTICATE PLAIN " + plain)) == AFTER
    assert offered(connected().ok(b"authenticate plain {%d+}\r\n%b" % (len(plain), plain))) == AFTER

    def continued(mechanism: str, *responses: bytes) -> Answer:
        session = connected()
        tag = session.start(f"AUTHENTICATE {mechanism}")
        for response in responses:
            assert session.response().tag == "+"
            session.send(response + b"\r\n")
        return session.finish(tag)

    assert offered(continued("PLAIN", plain)) == AFTER
    assert offered(continued("LOGIN", b64encode(name.encode()), b64encode(PASSWORD.encode()))) == AFTER
    assert continued("PLAIN", b"*").status == "BAD" and continued("PLAIN", b"???").status == "BAD"
    answer = continued("PLAIN", b64encode(f"\0{name}\0wrong".encode()))
    assert (answer.status, answer.code) == ("NO", "AUTHENTICATIONFAILED")
    assert connected().command("AUTHENTICATE PLAIN =").status in ("BAD", "NO")  # an empty initial response (RFC 4959 3)
    assert connected().command("AUTHENTICATE GSSAPI").status == "NO"

    session, ours = connected(), scramp.ScramClient(["SCRAM-SHA-256"], name, PASSWORD)
    tag = session.start(b"AUTHENTICATE SCRAM-SHA-256 " + b64encode(ours.get_client_first().encode()))
    ours.set_server_first(b64decode(session.response().text).decode())
    session.send(b64encode(ours.get_client_final().encode()) + b"\r\n")
    ours.set_server_final(b64decode(session.response().text).decode())
    session.send(b"\r\n")
    assert offered(session.finish(tag)) == AFTER
    assert session.command(b"AUTHENTICATE PLAIN " + plain).status == "BAD"


def test_literal_plus(relay, user):
    session = relay.connect()
    session.greeting()
    name = f"{user}@local.example".encode()
    session.ok(b"LOGIN {%d+}\r\n%b {%d+}\r\n%b" % (len(name), name, len(PASSWORD), PASSWORD.encode()))
    session.ok(b"CREATE {4+}\r\nmade")
    tag = session.start("CREATE {2}")
    assert session.response().tag == "+"  # it is asked for, where there is no plus
    session.send(b"x2\r\n")
    assert session.finish(tag).status == "OK"
    session.ok(b"RENAME {4+}\r\nmade {5+}\r\nmade2")
    assert {"made2", "x2"} <= set(session.listed("LIST {0+}\r\n {1+}\r\n*"))
    assert session.append("made2", message("one"), plus=True).status == "OK"
    octets = message("to a name that is missing") * 1000
    answer = session.append("nowhere", octets, plus=True)  # refused, and yet it comes: read and dropped
    assert (answer.status, answer.code) == ("NO", "TRYCREATE") and session.ok("NOOP").untagged == []
    too_large = relay.session(user)
    tag = too_large.start(b"APPEND nowhere {%d+}" % (1 << 21))
    assert too_large.finish(tag).status in ("NO", "BAD") and too_large.ended().startswith(b"* BYE")
    early = relay.connect()
    early.greeting()
    assert early.command(b"LOGIN {4097+}\r\n%b x" % (b"x" * 4097)).status == "BAD"  # before the login 4096 octets


def test_id(relay, user):
    session = relay.connect()
    session.greeting()
    assert session.ok('ID ("name" "test" "version" NIL)').named("ID")[0].data == {"name": b"relaymta"}
    assert session.ok("ID NIL").named("ID")[0].data == {"name": b"relaymta"}
    session.ok(f"LOGIN {user}@local.example {PASSWORD}")
    assert session.ok('ID ("NAME" "later")').names == ["ID"]
    for arguments in ("", ' ("name")', ' ("x" "y"', f' ("{"n" * 31}" "x")', f' ("n" "{"v" * 1025}")'):
        assert session.command(f"ID{arguments}").status == "BAD", arguments
    session.ok("LOGOUT")
    assert relay.ended_session(user)["program"] == "later"  # in the log


def test_enable(relay, user):
    session = relay.connect()
    session.greeting()
    assert session.command("ENABLE CONDSTORE").status == "BAD"  # before the login
    session = relay.session(user)
    assert session.ok("ENABLE X-GOOD-IDEA IDLE").named("ENABLED")[0].data == []
    assert session.ok("ENABLE condstore X-GOOD-IDEA").named("ENABLED")[0].data == ["CONDSTORE"]
    assert session.ok("ENABLE QRESYNC utf8=accept").named("ENABLED")[0].data == ["QRESYNC", "UTF8=ACCEPT"]
    assert session.command("ENABLE").status == "BAD"


# The two revisions


def test_imap4rev1(relay, user):
    a = relay.session(user)
    a.put("INBOX", "one", "two")
    first = a.ok("SELECT INBOX")
    assert first.named("RECENT")[0].number == 2 and "LIST" not in first.names
    codes = {one.code[0]: one.code[1] for one in first.named("OK")}
    assert codes["UNSEEN"] == 1 and codes["UIDNEXT"] == 3 and "CLOSED" not in codes
    assert relay.session(user).ok("SELECT INBOX").named("RECENT")[0].number == 0  # told to one session alone
    assert a.ok("SEARCH RECENT").named("SEARCH")[0].data[0] == [1, 2] and a.searched("OLD") == []
    assert "CLOSED" not in [one.code[0] for one in a.ok("EXAMINE INBOX").named("OK")]
    a.ok("CREATE Gr&APwA3w-e")
    assert a.listed('LIST "" "Gr*"') == {"Grüße": ["\\HasNoChildren"]} and "Gr&APwA3w-e" in a.raw('LIST "" "Gr*"').decode()
    for name in ("Gr&APw", "&AGE-", "Grüße", "&2D0-"):  # no modified UTF-7: RFC 3501 5.1.3
        assert a.command(f'CREATE "{name}"').status in ("NO", "BAD"), name
    a.ok("SUBSCRIBE x/y")
    assert a.listed('LSUB "" "x%"') == {"x": ["\\Noselect"]}
    a.ok("SELECT INBOX")
    a.ok("CHECK")
    for command in ("XYZZY", "FETCH", "FETCH 0 UID", "FETCH 1 BLURDY", "STORE 1 FLAGS \\Recent", "SELECT", "SEARCH"):
        assert a.command(command).status == "BAD", command


def test_imap4rev2(relay, user):
    a = relay.session(user, "ENABLE IMAP4rev2")
    a.put("INBOX", "one", "two")
    first = a.ok("SELECT INBOX")
    assert "RECENT" not in first.names and first.named("LIST")[0].data["name"] == "INBOX"
    assert "UNSEEN" not in {one.code[0] for one in first.named("OK")}
    again = a.ok("EXAMINE inbox")
    assert (again.untagged[0].name, again.untagged[0].code) == ("OK", ("CLOSED", None)) and again.code == "READ-ONLY"
    assert a.ok("SEARCH ALL").named("ESEARCH")[0].data["ALL"] == [(1, 2)]
    assert set(a.ok("UID SEARCH FLAGGED").named("ESEARCH")[0].data) == {"TAG", "UID"}
    a.ok('CREATE "Grüße & mehr"'.encode())
    assert '"Grüße & mehr"'.encode() in a.raw('LIST "" "Gr*"')
    denormalized = "Gru\N{COMBINING DIAERESIS}n"
    for command in ("CREATE", "SELECT", "EXAMINE"):
        told = a.ok(f'{command} "{denormalized}"'.encode()).named("LIST")[0].data
        assert (told["name"], told["OLDNAME"]) == ("Grün", denormalized), command  # RFC 9051 5.1, 6.3.2, 6.3.4
    assert a.ok(f'STATUS "{denormalized}" (MESSAGES)'.encode()).named("STATUS")[0].data == ("Grün", {"MESSAGES": 0})
    told = a.ok('RENAME "Grün" "Blau"'.encode()).named("LIST")[0].data
    assert (told["name"], told["OLDNAME"]) == ("Blau", "Grün")
    a.ok("SELECT INBOX")
    a.put("INBOX", "three")
    assert "RECENT" not in a.ok("NOOP").names and a.fetch("3 (FLAGS)")[3]["FLAGS"] == []
    other = relay.session(user, "SELECT INBOX")
    assert other.ok("NOOP").names == [] and other.searched("ALL") == [1, 2, 3]  # each session for itself
    failed = a.command("SELECT nowhere")
    assert failed.status == "NO" and failed.untagged[0].code == ("CLOSED", None)
    assert a.command("FETCH 1 UID").status == "BAD"  # no mailbox is selected (6.3.2)


# Commands


def test_idle(relay, user):
    a, b = relay.pair(user, 1)
    tag = a.idle()
    b.put("INBOX", "two")
    assert a.until("EXISTS")[-1].number == 2
    b.ok("STORE 1 +FLAGS (\\Flagged)")
    assert a.until("FETCH")[-1].data["UID"] == 1
    b.ok("UID MOVE 1 Trash")
    assert a.until("EXPUNGE")[-1].number == 1
    assert set(a.done(tag).names) <= {"RECENT"}


def test_namespace(relay, user):
    a = relay.session(user)
    assert a.raw("NAMESPACE").startswith(b'* NAMESPACE (("" "/")) NIL NIL\r\n')
    assert a.command("NAMESPACE x").status == "BAD"


def test_unselect(relay, user):
    a = relay.session(user)
    a.put("INBOX", "one")
    assert a.command("UNSELECT").status == "BAD"
    a.ok("SELECT INBOX")
    a.ok("STORE 1 +FLAGS (\\Deleted)")
    assert a.command("UNSELECT x").status == "BAD" and a.ok("UNSELECT").untagged == []
    assert a.command("FETCH 1 UID").status == "BAD" and a.status("INBOX", "MESSAGES", "DELETED") == [1, 1]
    a.ok("EXAMINE INBOX")
    a.ok("CLOSE")
    assert a.status("INBOX", "MESSAGES") == [1]  # it was read-only
    a.ok("SELECT INBOX")
    assert a.ok("CLOSE").untagged == [] and a.status("INBOX", "MESSAGES") == [0]


def test_uidplus(relay, user):
    a, b = relay.pair(user, 5)
    validity = b.status("Archive", "UIDVALIDITY")[0]
    assert a.append("Archive", message("x")).last.code == ("APPENDUID", (validity, [(1, 1)]))
    assert b"raw OK [COPYUID %d 1 2] " % validity in a.raw("COPY 1 Archive")  # one is no range
    assert a.ok("COPY 4,2:3 Archive").last.code == ("COPYUID", (validity, [(2, 4)], [(3, 5)]))
    assert a.ok("UID COPY 77 Archive").code == ""
    a.ok("STORE 2,3,5 +FLAGS.SILENT (\\Deleted)")
    answer = a.ok("UID EXPUNGE 1:3,9")
    assert sorted(one.number for one in answer.named("EXPUNGE")) == [2, 3] and list(a.subjects()) == [1, 4, 5]
    assert a.ok("UID EXPUNGE 1:4").untagged == [] and a.command("UID EXPUNGE").status == "BAD"
    a.ok("EXPUNGE")
    assert list(a.subjects()) == [1, 4]
    assert a.command("EXPUNGE 1").status == "BAD"
    b.ok("EXAMINE INBOX")
    for command in ("EXPUNGE", "UID EXPUNGE 1", "STORE 1 FLAGS ()", "MOVE 1 Archive"):
        assert b.command(command).status == "NO", command
    assert b.ok("COPY 1 Archive").code == "COPYUID"


def test_move(relay, user):
    a, b = relay.pair(user, 3)
    answer = a.ok("MOVE 2 Archive")
    assert answer.names[:2] == ["OK", "EXPUNGE"] and answer.untagged[0].code[0] == "COPYUID"
    assert [one.number for one in b.ok("NOOP").named("EXPUNGE")] == [2]
    assert a.command("UID MOVE 1 nowhere").code == "TRYCREATE" and a.status("Archive", "MESSAGES", "DELETED") == [1, 0]


def test_esearch(relay, user):
    a, _ = relay.pair(user, 9)
    a.expunge("2")
    a.ok("STORE 1,3:5,8 +FLAGS (\\Flagged)")

    def told(command: str) -> dict:
        (found,) = a.ok(command).named("ESEARCH")
        return {name: value for name, value in found.data.items() if name != "TAG"}

    for options in ("()", "(ALL)"):
        assert told(f"SEARCH RETURN {options} FLAGGED") == {"UID": False, "ALL": [(1, 1), (3, 5), (8, 8)]}
    assert told("UID SEARCH RETURN (ALL) FLAGGED") == {"UID": True, "ALL": [(1, 1), (4, 6), (9, 9)]}
    assert told("SEARCH RETURN (COUNT MAX MIN) FLAGGED") == {"UID": False, "MIN": 1, "MAX": 8, "COUNT": 5}
    assert told("UID SEARCH RETURN (MAX) NOT FLAGGED") == {"UID": True, "MAX": 8}
    assert told("SEARCH RETURN (MIN MAX) DRAFT") == {"UID": False} and told("SEARCH RETURN (COUNT) DRAFT")["COUNT"] == 0
    tag = a.start("SEARCH RETURN (MIN) ALL")
    assert a.finish(tag).named("ESEARCH")[0].data["TAG"] == tag
    modseqs = {number: one["MODSEQ"] for number, one in a.fetch("1:* (MODSEQ)").items()}
    low = modseqs[2] - 1
    assert told(f"SEARCH RETURN (MIN) MODSEQ {low}") == {"UID": False, "MIN": 1, "MODSEQ": modseqs[1]}
    assert told(f"SEARCH RETURN (MIN MAX) MODSEQ {low} 2:3")["MODSEQ"] == modseqs[3]
    assert told(f"SEARCH RETURN (MIN COUNT) MODSEQ {low}")["MODSEQ"] == max(modseqs.values())
    for options in ("(BLURDY)", "MIN", "(MIN MAX"):
        assert a.command(f"SEARCH RETURN {options} ALL").status == "BAD", options


def test_searchres(relay, user):
    a, b = relay.pair(user, 6)
    assert a.ok("FETCH $ (UID)").untagged == []  # nothing was saved
    tags = [a.start(command) for command in ("SEARCH RETURN (SAVE) 2:4", "FETCH $ (UID)", "STORE $ +FLAGS.SILENT (\\Flagged)")]
    assert [a.finish(tag).status for tag in tags] == ["OK"] * 3 and a.searched("FLAGGED") == [2, 3, 4]
    assert a.ok("COPY $ Archive").last.code[1][1] == [(2, 4)] and a.ok("UID COPY $ Archive").last.code[1][1] == [(2, 4)]
    b.expunge("3")
    a.ok("NOOP")
    assert list(a.fetch("$ (UID)").values()) == [{"UID": 2}, {"UID": 4}]
    for options, found in (("SAVE MIN", [1]), ("MAX SAVE", [5]), ("SAVE MIN MAX", [1, 5]), ("SAVE COUNT MIN", [1, 2, 3, 4, 5])):
        a.ok(f"SEARCH RETURN ({options}) ALL")
        assert list(a.fetch("$ (UID)")) == found, options
    a.ok("SEARCH RETURN (ALL) DRAFT")
    assert len(a.fetch("$ (UID)")) == 5  # not saved
    a.ok("SEARCH RETURN (SAVE) DRAFT")
    assert a.ok("MOVE $ Archive").untagged == a.ok("UID STORE $ FLAGS ()").untagged == [] and a.searched("$") == []
    a.ok("SEARCH RETURN (SAVE) 1")
    a.ok("SELECT INBOX")
    assert a.ok("FETCH $ (UID)").untagged == []  # RFC 9051 6.4.4.1


def test_within(relay, user):
    a = relay.session(user)
    now = datetime.datetime.now(datetime.UTC)
    for hours in (1, 30, 60):
        date = (now - datetime.timedelta(hours=hours)).strftime("%d-%b-%Y %H:%M:%S +0000")
        a.append("INBOX", message(f"{hours}"), f'"{date}"')
    a.ok("SELECT INBOX")
    for keys, found in {"YOUNGER 86400": [1], "OLDER 86400": [2, 3], "YOUNGER 172800 OLDER 7200": [2]}.items():
        assert a.searched(keys) == found
    for interval in ("0", "-1", "x", "4294967296"):
        assert a.command(f"SEARCH OLDER {interval}").status == "BAD", interval


def test_binary(relay, user):
    a = relay.session(user)
    part = b"--o\r\nContent-Type: %b\r\nContent-Transfer-Encoding: %b\r\n\r\n%b\r\n"
    parts = [
        (b"text/plain", b"quoted-printable", b"Gr=C3=BC=\r\n=C3=9Fe=0D=0A"), (b"image/png", b"base64", b"AAECAwQ=\r\nBQY="),
        (b"text/plain", b"8bit", b"plain"), (b"text/plain", b"x-unknown", b"?"), (b"text/plain", b"base64", b"w7w="),
    ]  # fmt: skip
    header = b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=o\r\n\r\n"
    assert a.append("INBOX", header + b"".join(part % one for one in parts) + b"--o--\r\n").status == "OK"
    a.ok(b"APPEND INBOX ~{8+}\r\nX: y\r\n\r\n")
    nul = b"Content-Type: application/octet-stream\r\n\r\na\0b"
    tag = a.start(b"APPEND INBOX (\\Flagged) ~{%d}" % len(nul))
    assert a.response().tag == "+"
    a.send(nul + b"\r\n")
    assert a.finish(tag).status == "OK"
    a.ok("SELECT INBOX")
    items = "BINARY.PEEK[1] BINARY.PEEK[2] BINARY[3] BINARY.PEEK[5] BINARY.PEEK[2]<2.3> BINARY.SIZE[2] BINARY.SIZE[1]"
    found = a.fetch(f"1 ({items})")[1]
    assert (found["BINARY[1]"], found["BINARY[2]<2>"], found["BINARY[3]"]) == ("Grüße\r\n".encode(), bytes([2, 3, 4]), b"plain")
    assert found["BINARY[2]"] in (bytes(range(5)), bytes(range(7))) and found["BINARY[5]"] == "ü".encode()
    assert (found["BINARY.SIZE[2]"], found["BINARY.SIZE[1]"]) == (len(found["BINARY[2]"]), 9) and "\\Seen" in found["FLAGS"]
    assert b"BINARY[2] ~{" in a.raw("FETCH 1 BINARY.PEEK[2]") and b"BINARY[5] {2}" in a.raw("FETCH 1 BINARY.PEEK[5]")
    for item in ("BINARY.PEEK[4]", "BINARY.SIZE[4]"):
        answer = a.command(f"FETCH 1 ({item})")
        assert (answer.status, answer.code) == ("NO", "UNKNOWN-CTE"), item
    assert a.fetch("3 (BINARY.PEEK[1])")[3]["BINARY[1]"] == b"a\0b"
    assert a.fetch("3 (BODY.PEEK[1])")[3]["BODY[1]"] == b"a\x80b"  # no NUL there (RFC 9051 4.3.1)
    for item in ("BINARY[HEADER]", "BINARY[1.MIME]", "BINARY.SIZE[1]<0.1>", "BINARY"):
        assert a.command(f"FETCH 1 ({item})").status == "BAD", item


def test_utf8_accept(relay, user):
    a = relay.session(user)
    assert a.command('CREATE "Grüße"'.encode()).status in ("BAD", "NO")  # no 8-bit names without it
    assert a.ok("ENABLE UTF8=ACCEPT").named("ENABLED")[0].data == ["UTF8=ACCEPT"]
    a.ok('CREATE "Grüße"'.encode())
    assert '"Grüße"'.encode() in a.raw('LIST "" "Gr*"') and "Grüße" in a.listed('LIST "" "Gr*"')
    a.ok('SUBSCRIBE "Grüße"'.encode())
    assert "Grüße" in a.listed('LSUB "" "Gr*"') and a.status('"Grüße"', "MESSAGES") == [0]
    text = "Subject: ☃\r\n\r\n☃\r\n".encode()
    a.ok(b'APPEND "Gr\xc3\xbc\xc3\x9fe" UTF8 (~{%d+}\r\n%b)' % (len(text), text))
    assert "RECENT" in a.ok('SELECT "Grüße"'.encode()).names  # it is IMAP4rev1 still
    assert a.fetch("1 (BODY.PEEK[])")[1]["BODY[]"] == text and a.searched('SUBJECT "☃"'.encode()) == [1]
    assert a.command("SEARCH CHARSET UTF-8 ALL").status == "BAD"
    for name in (b"\xff", b"\xc3", b"a\x7fb", "a\N{LINE SEPARATOR}b".encode(), "a\N{NEXT LINE}b".encode()):
        assert a.command(b'CREATE "%b"' % name).status in ("BAD", "NO"), name
