"""Cases that other IMAP servers got wrong, as the RFCs have them: the session and mailboxes (the rest: test_imap_cases_mail.py).
`a` and `b` are two sessions of one user, on two workers."""

from collections.abc import Iterator

import pytest

from tests.support.imap_client import Answer
from tests.support.imap_relay import ImapRelay
from tests.support.mailboxes import verified


@pytest.fixture(scope="module")
def relay(tmp_path_factory) -> Iterator[ImapRelay]:
    with ImapRelay(tmp_path_factory.mktemp("cases")) as relay:
        yield relay
        verified(relay)


@pytest.mark.parametrize("octets", [600, 1_500_000], ids=["small", "in a file"])
def test_case_01_empty_string(relay, user, octets):
    a = relay.session(user)
    text = (b"0123456789" * (octets // 10))[:octets]
    a.append("INBOX", b"Subject:\r\n\r\n" + text)
    a.ok("SELECT INBOX")
    starts = [0, octets - 10, octets - 1, octets, octets + 1, 2 * octets, 393216 * 9, 4294967295, 393216 * 8, 5]
    tags = [a.start(f"UID FETCH 1 BODY.PEEK[1]<{start}.393216>") for start in starts]
    for start, tag in zip(starts, tags, strict=True):
        answer = a.finish(tag)
        assert answer.status == "OK"
        (found,) = answer.named("FETCH")
        assert found.data == {"UID": 1, f"BODY[1]<{start}>": text[start : start + 393216]}
    a.append("INBOX", b"Subject: no body\r\n\r\n")
    found = a.fetch("2 (BODY.PEEK[TEXT] BODY.PEEK[1] BODY.PEEK[]<30.5> BINARY.PEEK[1] BINARY.SIZE[1] BODY.PEEK[2] RFC822.TEXT)")[
        2
    ]
    assert [found[name] for name in ("BODY[TEXT]", "BODY[1]", "BODY[]<30>", "BINARY[1]", "RFC822.TEXT")] == [b""] * 5
    assert (found["BODY[2]"], found["BINARY.SIZE[1]"]) == (None, 0)
    assert a.fetch("1 (ENVELOPE)")[1]["ENVELOPE"][1] == b""  # a subject that is there, and empty


def test_case_02_expunge_at_the_wrong_moment(relay, user):
    a, b = relay.pair(user, 9)
    b.expunge("2")
    held = [1, *range(3, 10)]
    for command in ("FETCH 1:* (UID FLAGS)", "FETCH 1:* (UID RFC822.SIZE)", "FETCH 1:9 (UID BODY.PEEK[])"):
        answer = a.command(command)
        assert (answer.status, answer.code) == ("OK", "EXPUNGEISSUED"), command
        assert {(one.number, one.data["UID"]) for one in answer.named("FETCH")} == {(number, number) for number in held}
        assert set(answer.names) == {"FETCH"}
    for item in ("UID", "FLAGS", "ENVELOPE", "BODY[]", "BODY.PEEK[TEXT]"):
        answer = a.command(f"FETCH 2 ({item})")
        assert (answer.status, answer.code, answer.named("FETCH")) == ("OK", "EXPUNGEISSUED", []), item
    answer = a.command("STORE 2:3 +FLAGS (\\Flagged)")
    assert (answer.status, answer.code) == ("OK", "EXPUNGEISSUED")
    assert [(one.number, one.data["UID"]) for one in answer.named("FETCH")] == [(3, 3)] and "EXPUNGE" not in answer.names
    answer = a.command("STORE 2 -FLAGS.SILENT (\\Flagged)")
    assert (answer.code, answer.names) == ("EXPUNGEISSUED", [])
    answer = a.ok("SEARCH ALL")
    assert set(answer.named("SEARCH")[0].data[0]) - {2} == set(held) and "EXPUNGE" not in answer.names
    answer = a.ok("UID SEARCH 2:4")  # by number as well (RFC 7162 3.2.10.2, RFC 9051 5.5)
    assert set(answer.named("SEARCH")[0].data[0]) - {2} == {3, 4} and "EXPUNGE" not in answer.names
    answer = a.command("COPY 1:3 Sent")  # all or nothing
    assert (answer.status, answer.code) == ("NO", "EXPUNGEISSUED") and a.status("Sent", "MESSAGES") == [0]
    assert a.command("CHECK").names == []  # COPY has told it
    assert a.fetch("2 (UID)")[2]["UID"] == 3
    for number, command in enumerate(("NOOP", "UID FETCH 1 (FLAGS)", "UID SEARCH ALL", "UID STORE 1 +FLAGS (\\Draft)"), 3):
        b.expunge(str(number))
        answer = a.ok(command)
        assert [one.number for one in answer.named("EXPUNGE")] == [2], command
        assert a.fetch("1:2 (UID)") == {1: {"UID": 1}, 2: {"UID": number + 1}}
    tag = a.idle()
    b.expunge("7")
    assert a.until("EXPUNGE")[-1].number == 2
    a.done(tag)
    assert a.fetch("1:* (UID)") == {1: {"UID": 1}, 2: {"UID": 8}, 3: {"UID": 9}}
    assert a.command("FETCH 4 UID").status == "BAD"


def test_case_03_unasked_status(relay, user):
    a, b = relay.pair(user, 3)
    a.ok("STATUS INBOX (MESSAGES)")
    for command in ("NOOP", "CHECK", "IDLE", "UID FETCH 1 (FLAGS)"):
        (new,) = b.put("INBOX", "new")
        b.ok("UID STORE 1 +FLAGS (\\Flagged)" if command in ("NOOP", "IDLE") else "UID STORE 1 -FLAGS (\\Flagged)")
        b.expunge(str(new))
        b.put("INBOX", "kept")
        if command == "IDLE":
            tag = a.idle()
            b.put("INBOX", "and another")
            told = [*a.until("EXISTS"), *a.done(tag).untagged]
        else:
            told = a.ok(command).untagged
        names = {one.name for one in told}
        assert {"EXISTS", "FETCH"} <= names <= {"EXISTS", "RECENT", "FETCH", "EXPUNGE"}, command
    assert a.status("INBOX", "MESSAGES") == [8]
    b.ok("STATUS INBOX (MESSAGES)")
    assert "STATUS" not in {one.name for session in (a, b) for one in session.ok("NOOP").untagged}


def test_case_04_silent_is_not_silent_under_condstore(relay, user):
    a, b = relay.pair(user, 5, "ENABLE CONDSTORE")

    def modseqs() -> dict[int, int]:
        return {one["UID"]: one["MODSEQ"] for one in a.fetch("1:* (UID MODSEQ)").values()}

    before = modseqs()
    (one,) = a.ok("STORE 1 FLAGS.SILENT (\\Seen)").untagged
    assert one.name == "FETCH" and one.data == {"UID": 1, "MODSEQ": max(before.values()) + 1}
    since = modseqs()
    for command in ("STORE 1 FLAGS.SILENT (\\Seen)", "STORE 1 +FLAGS.SILENT (\\Seen)", "STORE 1 -FLAGS.SILENT (\\Draft)", "NOOP"):
        assert a.ok(command).untagged == [] and modseqs() == since, command  # a flag that was set already; and no echo
    (one,) = a.ok("STORE 1 +FLAGS (\\Seen)").untagged
    assert (one.data["FLAGS"], one.data["MODSEQ"]) == (["\\Recent", "\\Seen"], since[1])
    (told,) = b.ok("NOOP").untagged
    assert told.number == 1 and set(told.data["FLAGS"]) >= {"\\Seen"} and "MODSEQ" not in told.data  # b has not enabled it

    b.ok("STORE 2 +FLAGS (\\Answered)")
    answer = a.command(f"STORE 1:3 (UNCHANGEDSINCE {since[1]}) +FLAGS.SILENT (\\Flagged)")
    assert (answer.status, answer.last.code) == ("OK", ("MODIFIED", [(2, 2)]))
    told = {one.number: one.data for one in answer.named("FETCH")}
    assert told[2]["FLAGS"] == ["\\Recent", "\\Answered"] and set(told) == {
        1,
        2,
        3,
    }  # what the client did not know (RFC 9051 6.4.6)
    assert all(set(told[number]) == {"UID", "MODSEQ"} and told[number]["MODSEQ"] > since[1] for number in (1, 3))
    assert a.flags() == {1: {"\\Seen", "\\Flagged"}, 2: {"\\Answered"}, 3: {"\\Flagged"}, 4: set(), 5: set()}
    assert a.ok("NOOP").untagged == []
    answer = a.command(f"UID STORE 1:3,5 (UNCHANGEDSINCE {since[1]}) FLAGS (x)")
    assert answer.last.code == ("MODIFIED", [(1, 3)]) and [one.number for one in answer.named("FETCH")][-1] == 5
    assert a.command("STORE 4 (UNCHANGEDSINCE 0) +FLAGS.SILENT ($MDNSent)").last.code == ("MODIFIED", [(4, 4)])
    now = max(modseqs().values())
    answer = a.command(f"STORE 4 (UNCHANGEDSINCE {now}) -FLAGS.SILENT (\\Seen)")  # without effect, and told all the same
    assert (answer.status, answer.code) == ("OK", "") and answer.named("FETCH")[0].data["MODSEQ"] == since[4]

    (read,) = a.ok("FETCH 4 (BODY[])").named("FETCH")
    assert "\\Seen" in read.data["FLAGS"] and (read.data["UID"], read.data["MODSEQ"]) == (4, now + 1)
    assert a.ok("NOOP").untagged == []
    (read,) = a.ok("FETCH 4 (BODY[])").named("FETCH")
    assert set(read.data) == {"BODY[]"} and modseqs()[4] == now + 1
    told = {one.number: set(one.data["FLAGS"]) - {"\\Recent"} for one in b.ok("NOOP").named("FETCH")}
    assert told == {1: {"\\Seen", "\\Flagged"}, 3: {"\\Flagged"}, 4: {"\\Seen"}, 5: {"x"}}


@pytest.mark.parametrize("enable", ["", "QRESYNC"])
def test_case_05_order_of_move(relay, user, enable):
    a, b = relay.pair(user, 9, *([f"ENABLE {enable}"] if enable else []))
    a.ok("STORE 5 +FLAGS ($Work \\Answered)")
    dates = a.fetch("5 (INTERNALDATE)")[5]
    b.expunge("2")
    answer = a.ok("UID MOVE 8,3,5,6 Archive")
    first, *rest = (one for one in answer.untagged if one.name != "RECENT")
    assert (first.name, first.code[0], answer.code) == ("OK", "COPYUID", "")
    validity, sources, copies = first.code[1]
    assert sources == [(3, 3), (5, 6), (8, 8)] and copies == [(1, 4)]
    if enable:
        assert [one.name for one in rest] == ["VANISHED", "OK"] and rest[0].data == (False, [(2, 3), (5, 6), (8, 8)])
        assert rest[1].code == ("HIGHESTMODSEQ", b.status("INBOX", "HIGHESTMODSEQ")[0])  # RFC 6851 4.4
    else:
        assert [(one.name, one.number) for one in rest] == [("EXPUNGE", number) for number in (8, 6, 5, 3, 2)]
    assert a.subjects() == {uid: f"s{uid}" for uid in (1, 4, 7, 9)}
    assert b.status("Archive", "UIDVALIDITY") == [validity]
    b.ok("NOOP")
    assert a.ok("MOVE 1 Archive").untagged[0].code[1][1:] == ([(1, 1)], [(5, 5)])  # by number
    answer = a.command("MOVE 1:* nowhere")
    assert (answer.status, answer.code, answer.untagged) == ("NO", "TRYCREATE", []) and len(a.fetch("1:* (UID)")) == 3
    assert a.ok("UID MOVE 3 Archive").untagged == []  # it is not there any more
    answer = a.ok("MOVE 1 INBOX")  # into itself
    assert answer.untagged[0].code[1][1:] == ([(4, 4)], [(10, 10)]) and list(a.subjects()) == [7, 9, 10]
    a.ok("SELECT Archive")
    assert a.subjects() == dict(enumerate(("s3", "s5", "s6", "s8", "s1"), 1))
    assert a.flags() == {1: set(), 2: {"$Work", "\\Answered"}, 3: set(), 4: set(), 5: set()}
    assert a.fetch("2 (INTERNALDATE)")[2]["INTERNALDATE"] == dates["INTERNALDATE"]


def test_case_06_inbox_by_any_name(relay, user):
    a = relay.session(user)
    a.ok("SELECT iNbOx")
    a.ok("CREATE inbox/x")
    a.ok("SUBSCRIBE InBox/x")
    for command in ('LIST "" "*"', 'LSUB "" "*"', 'LIST "" "inbox*"', 'LIST (SUBSCRIBED) "" ("inbox" "Inbox/x")'):
        assert list(a.listed(command))[:2] == ["INBOX", "INBOX/x"], command
    assert list(a.listed('LIST "inbox/" "%"')) == ["INBOX/x"] and list(a.listed('LIST "" "INBOX"')) == ["INBOX"]
    assert list(a.listed('LIST "" "inb%"')) == ["INBOX"] and a.listed('LIST "" "inbox/X"') == {}
    assert a.put("inbox", "one") and a.put("iNBOX/x", "two") and a.status("inBox", "MESSAGES") == [1]
    for command, code in (
        ("CREATE inbox", "ALREADYEXISTS"), ("CREATE INBOX", "ALREADYEXISTS"), ("CREATE inbox/x", "ALREADYEXISTS"),
        ("DELETE INBOX", "CANNOT"), ("DELETE inbox", "CANNOT"), ("RENAME Sent iNbOx", "ALREADYEXISTS"),
    ):  # fmt: skip
        answer = a.command(command)
        assert (answer.status, answer.code) == ("NO", code), command
    assert a.ok("GETQUOTAROOT inbox").named("QUOTAROOT")[0].data[0] == "INBOX"
    a.ok("DELETE inbox/x")
    a.ok("CREATE INBOXES")  # another name
    assert list(a.listed('LIST "" "I*"')) == ["INBOX", "INBOXES"]


def test_case_07_rename_of_inbox(relay, user):
    a, b = relay.pair(user, 3)
    a.ok("CREATE INBOX/child")
    a.ok("STORE 2 +FLAGS (\\Flagged)")
    before, ident = b.status("INBOX", "UIDNEXT", "UIDVALIDITY"), b.status("INBOX", "MAILBOXID")
    answer = a.ok("RENAME inbox old/mail")
    assert sorted(one.number for one in answer.named("EXPUNGE")) == [1, 2, 3]  # it is selected still
    assert {"INBOX", "INBOX/child", "old", "old/mail"} <= set(a.listed('LIST "" "*"'))
    assert "old/child" not in a.listed('LIST "" "*"') and b.status("old/mail", "MESSAGES") == [3]
    uidnext, validity = b.status("INBOX", "UIDNEXT", "UIDVALIDITY")
    assert validity == before[1] and uidnext >= before[0] and b.status("INBOX", "MESSAGES") == [0]
    assert b.status("INBOX", "MAILBOXID") == ident != b.status("old/mail", "MAILBOXID")
    b.put("INBOX", "new")
    a.ok("NOOP")
    assert a.subjects() == {uidnext: "new"} == b.subjects()
    for command in ("RENAME INBOX Sent", "RENAME Drafts Sent", "RENAME old/mail old", "RENAME Drafts INBOX/child"):
        answer = a.command(command)
        assert (answer.status, answer.code) == ("NO", "ALREADYEXISTS"), command
    assert a.command("RENAME gone there").code == "NONEXISTENT" and a.status("INBOX", "MESSAGES") == [1]
    a.ok("SELECT old/mail")
    assert list(a.subjects().values()) == ["s1", "s2", "s3"] and list(a.flags().values()) == [set(), {"\\Flagged"}, set()]


def test_case_08_selecting_is_not_returning(relay, user):
    a = relay.session(user, "CREATE a/b/c", "CREATE d", "SUBSCRIBE a/b", "SUBSCRIBE ghost/x", "CREATE p/q", "DELETE p")
    a.put("d", "one")
    special = {name: f"\\{name}" for name in ("Archive", "Drafts", "Junk", "Sent", "Trash")}
    found = a.listed('LIST (SPECIAL-USE) "" "*"')
    assert set(found) == set(special) and all(use in found[name] for name, use in special.items())
    assert set(a.listed('LIST (SPECIAL-USE SUBSCRIBED) "" "S*"')) == {"Sent"}
    everything = {"INBOX", *special, "a", "a/b", "a/b/c", "d", "p/q"}

    answer = a.ok('LIST "" "*" RETURN (SPECIAL-USE STATUS (UNSEEN))')
    said = [(one.name, one.data["name"] if one.name == "LIST" else one.data[0]) for one in answer.untagged]
    assert {name for kind, name in said if kind == "LIST"} == everything and len(said) == 2 * len(everything)
    for listing, status in zip(said[::2], said[1::2], strict=True):
        assert (listing[0], status) == ("LIST", ("STATUS", listing[1]))  # each right before its own
    assert {name: use for name, use in special.items() if use in a.listed('LIST "" "*" RETURN (SPECIAL-USE)')[name]} == special
    (unseen,) = (one.data[1] for one in answer.named("STATUS") if one.data[0] == "d")
    assert unseen == {"UNSEEN": 1}

    found = a.ok('LIST (SUBSCRIBED) "" "*" RETURN (STATUS (MESSAGES))')
    listed = {one.data["name"]: one.data["attributes"] for one in found.named("LIST")}
    assert set(listed) == {"INBOX", *special, "a/b", "ghost/x"} and all("\\Subscribed" in one for one in listed.values())
    assert [name for name, attributes in listed.items() if "\\NonExistent" in attributes] == ["ghost/x"]
    assert {one.data[0] for one in found.named("STATUS")} == set(listed) - {"ghost/x"}
    found = a.ok('LIST "" "%" RETURN (STATUS (MESSAGES))')
    assert "p" in {one.data["name"] for one in found.named("LIST")} and "p" not in {one.data[0] for one in found.named("STATUS")}

    assert list(a.listed('LIST "" ("INBOX" "%")')).count("INBOX") == 1
    answer = a.ok('LIST "" ("INBOX" "%" "a/%" "")')
    names = [one.data["name"] for one in answer.named("LIST")]
    assert len(names) == len(set(names)) and set(names) == everything - {"a/b/c", "p/q"} | {"p"}

    answer = a.ok('LIST (SUBSCRIBED RECURSIVEMATCH) "" "%" RETURN (STATUS (MESSAGES))')
    rows = {one.data["name"]: one.data for one in answer.named("LIST")}
    assert set(rows) == {"INBOX", *special, "a", "ghost"}
    assert rows["a"]["CHILDINFO"] == [b"SUBSCRIBED"] == rows["ghost"]["CHILDINFO"]
    assert "\\NonExistent" in rows["ghost"]["attributes"] and "\\NonExistent" not in rows["a"]["attributes"]
    assert "\\Subscribed" not in rows["a"]["attributes"] and "CHILDINFO" not in rows["INBOX"]
    assert {one.data[0] for one in answer.named("STATUS")} == {"INBOX", *special}  # RFC 5819 2, the second example
    for command in ('LIST (RECURSIVEMATCH) "" "*"', 'LIST (REMOTE RECURSIVEMATCH) "" "*"', 'LIST (BLURDY) "" "*"'):
        assert a.command(command).status == "BAD", command
    assert a.listed('LIST (SUBSCRIBED RECURSIVEMATCH) "" "*"').keys() == listed.keys()  # nothing redundant


def test_case_09_idle(relay, user):
    a, b = relay.pair(user, 3)
    b.put("INBOX", "before")
    tag = a.start("IDLE")
    assert a.response().tag == "+"
    assert a.response()[1:3] == ("EXISTS", 4)
    b.ok("STORE 2 +FLAGS (\\Flagged)")
    (one,) = [one for one in a.until("FETCH") if one.name == "FETCH"]
    assert one.data["UID"] == 2 and "\\Flagged" in one.data["FLAGS"]
    b.expunge("1")
    assert a.until("EXPUNGE")[-1].number == 1
    a.send(b"done\r\n")
    assert a.finish(tag).status == "OK"

    for line in (b"x1 CREATE made\r\n", b"x1 APPEND INBOX {3}\r\n", b"x1 LOGOUT\r\n", b"\r\n", b"DONE x\r\n", b'"\r\n'):
        tag = a.idle()
        a.send(line)
        answer = a.finish(tag)
        assert (answer.status, answer.last.tag) == ("BAD", tag), line
        assert a.ok("NOOP").untagged == [], line
    assert "made" not in a.listed('LIST "" "*"')

    a.send(b"z1 IDLE\r\nDONE\r\nz2 NOOP\r\nz3 IDLE\r\nDO")
    assert [a.response().tag, a.response().tag, a.response().tag, a.response().tag] == ["+", "z1", "z2", "+"]
    b.put("INBOX", "amid")
    assert a.until("EXISTS")[-1].number == 4
    a.send(b"NE\r\n")
    assert a.until("z3")[-1].name == "OK"
    unselected = relay.session(user)
    tag = unselected.idle()
    assert unselected.done(tag).untagged == []
    assert unselected.command("IDLE x").status == "BAD"


def test_case_10_append_utf8(relay, user):
    a, b = relay.session(user, worker=0), relay.session(user, worker=1)
    internationalized = "From: Jörg <jörg@straße.example>\r\nSubject: Grüße ☃\r\n\r\nä\r\n".encode()
    size = len(internationalized)

    def appended(command: bytes, plus: bool, end: bytes = b")", data: bytes = internationalized) -> Answer:
        tag = a.start(command if not plus else command + b"\r\n" + data + end)
        answer = a.finish(tag)
        if answer.last.tag == "+":
            a.send(data + end + b"\r\n")
            answer = a.finish(tag)
        return answer

    assert appended(b"APPEND Sent (\\Seen) UTF8 (~{%d+}" % size, True).status == "BAD"  # ENABLE comes before it
    answer = a.append("Sent", internationalized, "(\\Seen)")
    assert answer.status == "OK"  # RFC 6855 4 says NO: a deliberate deviation, since old mail would be lost by imports
    assert "UTF8=ACCEPT" in a.ok("ENABLE UTF8=ACCEPT").named("ENABLED")[0].data
    date = b'" 3-Feb-2021 04:05:06 +0100"'
    for command, plus in (
        (b"APPEND Sent (\\Seen) UTF8 (~{%d+}" % size, True),
        (b"APPEND Sent (\\Seen) %b UTF8 (~{%d+}" % (date, size), True),
        (b"APPEND Sent %b UTF8 (~{%d}" % (date, size), False),
        (b"APPEND Sent utf8 (~{%d}" % size, False),
    ):
        answer = appended(command, plus)
        assert (answer.status, answer.code) == ("OK", "APPENDUID"), command
    assert appended(b"APPEND Sent (\\Seen) (~{%d+}" % size, True).status == "BAD"
    assert appended(b"APPEND Sent UTF8 (~{%d+}" % size, True, b"").status == "BAD"  # without its parenthesis
    assert appended(b"APPEND Sent {%d}" % size, False, b"").status == "OK"
    assert appended(b"APPEND Sent ~{%d+}" % size, True, b"").status == "OK"
    both = internationalized + b") (\\Draft) UTF8 (~{%d+}\r\n" % size + internationalized  # RFC 3502
    assert appended(b"APPEND Sent UTF8 (~{%d+}" % size, True, data=both).last.code[1][1] == [(8, 9)]
    a.ok("EXAMINE Sent")
    found = a.fetch("1:* (FLAGS INTERNALDATE BODY.PEEK[])")
    assert [one["BODY[]"] for one in found.values()] == [internationalized] * 9
    assert [number for number, one in found.items() if "\\Seen" in one["FLAGS"]] == [1, 2, 3]
    assert [number for number, one in found.items() if one["INTERNALDATE"] == " 3-Feb-2021 03:05:06 +0000"] == [3, 4]

    a.ok('CREATE "Entwürfe & Grüße"'.encode())
    assert appended('APPEND "Entwürfe & Grüße" UTF8 (~{%d+}'.encode() % size, True).status == "OK"
    assert "Entwürfe & Grüße" in a.listed('LIST "" "Entw*"') and b'"Entw\xc3\xbcrfe' not in b.raw('LIST "" "Entw*"')
    assert b'"Entw\xc3\xbcrfe & Gr\xc3\xbc\xc3\x9fe"' in a.raw('LIST "" "Entw*"') and "Entwürfe & Grüße" in b.listed(
        'LIST "" "E*"'
    )
    assert b.status("Entw&APw-rfe &- Gr&APwA3w-e".join('""'), "MESSAGES") == [1] == a.status('"Entwürfe & Grüße"', "MESSAGES")
    assert a.command('CREATE "Entw\N{COMBINING DIAERESIS}"'.encode()).status == "OK"  # NFC (RFC 5198): "Entẅ"
    assert "Entẅ" in a.listed('LIST "" "Ent*"')
    for command in (b'CREATE "\xff"', b'SELECT "\xc3("'):
        assert a.command(command).status in ("BAD", "NO")
    assert a.command("SEARCH CHARSET UTF-8 ALL").status == "BAD" and a.command("SEARCH CHARSET US-ASCII ALL").status == "BAD"
    assert a.searched('SUBJECT "Grüße"'.encode()) == list(range(1, 10))
