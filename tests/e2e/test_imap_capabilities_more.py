"""Capabilities that are offered to IMAP clients, as their RFCs have them: mailboxes, quota, synchronization, APPEND."""

import datetime
from collections.abc import Iterator

import pytest

from tests.support.imap_relay import ImapRelay, message
from tests.support.mailboxes import verified

LIMIT = 3_000_000


@pytest.fixture(scope="module")
def relay(tmp_path_factory) -> Iterator[ImapRelay]:
    with ImapRelay(tmp_path_factory.mktemp("offers"), f"limits.message_size={LIMIT}") as relay:
        yield relay
        verified(relay)


# Synchronization


def test_condstore(relay, user):
    a, b = relay.session(user, worker=0), relay.session(user, worker=1)
    b.put("INBOX", "one", "two", "three")
    b.ok("SELECT INBOX")
    first = a.ok("SELECT INBOX (CONDSTORE)")
    (highest,) = (one.code[1] for one in first.named("OK") if one.code[0] == "HIGHESTMODSEQ")
    assert a.status("INBOX", "HIGHESTMODSEQ") == [highest]
    modseqs = {number: one["MODSEQ"] for number, one in a.fetch("1:3 (MODSEQ)").items()}
    assert sorted(modseqs.values())[-1] == highest and all(0 < one < 1 << 63 for one in modseqs.values())
    b.ok("STORE 2 +FLAGS.SILENT (\\Draft)")
    (told,) = a.ok("NOOP").named("FETCH")
    assert told.data["MODSEQ"] > highest and "\\Draft" in told.data["FLAGS"] and told.data["UID"] == 2
    now = told.data["MODSEQ"]
    assert list(a.fetch(f"1:* (FLAGS) (CHANGEDSINCE {highest})")) == [2] and a.fetch(f"1:* (UID) (CHANGEDSINCE {now})") == {}
    assert a.fetch("UID FETCH 1:* (UID) (CHANGEDSINCE 0)") == {
        number: {"UID": number, "MODSEQ": modseqs[number] if number != 2 else now} for number in (1, 2, 3)
    }
    answer = a.ok(f'SEARCH MODSEQ "/flags/\\\\draft" all {now}')
    assert answer.named("SEARCH")[0].data == ([2], now)
    assert a.ok(f"SEARCH MODSEQ {now + 1}").named("SEARCH")[0].data == ([], None)
    assert a.ok(f"UID SEARCH OR MODSEQ {now} 1").named("SEARCH")[0].data == ([1, 2], now)
    a.put("INBOX", "four")
    assert a.fetch("4 (MODSEQ)")[4]["MODSEQ"] > now  # higher than all (RFC 7162 3.1)
    a.ok("COPY 1 Archive")
    for command in (
        "FETCH 1 (FLAGS) (CHANGEDSINCE x)", "STORE 1 (UNCHANGEDSINCE -1) FLAGS ()", "STORE 1 (CHANGEDSINCE 1) FLAGS ()",
        f"SEARCH MODSEQ {1 << 63}", "SELECT INBOX (BLURDY)", "FETCH 1 (FLAGS) (VANISHED)",
        "UID FETCH 1 (FLAGS) (CHANGEDSINCE 1 VANISHED)",
    ):  # fmt: skip
        assert a.command(command).status == "BAD", command


@pytest.mark.parametrize(
    "command",
    ["STATUS Sent (HIGHESTMODSEQ)", "FETCH 1 (MODSEQ)", "FETCH 1 (UID) (CHANGEDSINCE 1)", "SEARCH MODSEQ 1", "ENABLE CONDSTORE",
     "STORE 1 (UNCHANGEDSINCE 1000) FLAGS (x)", "UID SEARCH RETURN () MODSEQ 1", 'LIST "" Sent RETURN (STATUS (HIGHESTMODSEQ))'],
)  # fmt: skip
def test_condstore_is_enabled_by(relay, user, command):
    a, b = relay.pair(user, 2)
    b.ok("STORE 2 FLAGS (y)")
    assert "MODSEQ" not in a.ok("NOOP").named("FETCH")[0].data
    told = a.ok(command).untagged
    if command.startswith("ENABLE"):  # which is not meant to be used now
        told = a.ok("NOOP").untagged
    assert "HIGHESTMODSEQ" in [one.code[0] for one in told if one.code]  # RFC 7162 3.1: the first one, with a mailbox selected
    b.ok("STORE 2 FLAGS (z)")
    told = [one.data for one in a.ok("NOOP").named("FETCH") if one.number == 2]
    assert told[0]["MODSEQ"] == b.status("INBOX", "HIGHESTMODSEQ")[0]
    assert "HIGHESTMODSEQ" not in [one.code[0] for one in a.ok(command).named("OK") if one.code]


def test_qresync(relay, user):
    a, b = relay.session(user, worker=0), relay.session(user, "ENABLE QRESYNC", worker=1)
    uids = a.put("INBOX", *map(str, range(1, 11)))
    assert uids == list(range(1, 11))
    first = b.ok("SELECT INBOX")
    codes = {one.code[0]: one.code[1] for one in first.named("OK")}
    validity, modseq = codes["UIDVALIDITY"], codes["HIGHESTMODSEQ"]
    a.ok("SELECT INBOX")
    a.ok("STORE 4 +FLAGS (\\Flagged)")
    a.expunge("2,5:6")
    told = b.ok("NOOP").untagged
    assert ("VANISHED", (False, [(2, 2), (5, 6)])) in [(one.name, one.data) for one in told]
    (flagged,) = [one for one in told if one.name == "FETCH"]
    assert flagged.data["UID"] == 4 and flagged.number == 3  # by the numbers after VANISHED
    a.ok("STORE 1:2 +FLAGS.SILENT (x)")

    def resynchronized(arguments: str) -> tuple[list[tuple[int, int]], list[int]]:
        """What has vanished earlier, and the UIDs of changed messages; in this order."""
        c = relay.session(user, "ENABLE QRESYNC", worker=1)
        told = [one for one in c.ok(f"SELECT INBOX (QRESYNC ({arguments}))").untagged if one.name in ("VANISHED", "FETCH")]
        assert [one.name for one in told] == sorted((one.name for one in told), reverse=True)
        assert all(one.data[0] for one in told if one.name == "VANISHED")
        assert all({"UID", "FLAGS", "MODSEQ"} <= set(one.data) for one in told if one.name == "FETCH")
        vanished = [pair for one in told if one.name == "VANISHED" for pair in one.data[1]]
        return vanished, [one.data["UID"] for one in told if one.name == "FETCH"]

    for arguments, found in {
        f"{validity} {modseq}": ([(2, 2), (5, 6)], [1, 3, 4]), f"{validity} {modseq} 1:4": ([(2, 2)], [1, 3, 4]),
        f"{validity} {modseq} 5:9": ([(5, 6)], []), f"{validity + 1} {modseq}": ([], []),
        f"{validity} {b.status('INBOX', 'HIGHESTMODSEQ')[0]}": ([], []),
        f"{validity} {modseq} 1:10 (1,2 1,3)": ([(2, 2), (5, 6)], [1, 3, 4]),
    }.items():  # fmt: skip
        assert resynchronized(arguments) == found, arguments
    b.ok("NOOP")
    told = b.ok(f"UID FETCH 1:* (FLAGS) (CHANGEDSINCE {modseq} VANISHED)").untagged
    assert (told[0].name, told[0].data) == ("VANISHED", (True, [(2, 2), (5, 6)])) and {one.name for one in told[1:]} == {"FETCH"}
    b.ok("UID STORE 7,9 +FLAGS.SILENT (\\Deleted)")
    for command, vanished in (("UID EXPUNGE 7", [(7, 7)]), ("EXPUNGE", [(9, 9)])):
        answer = b.ok(command)
        assert answer.named("VANISHED")[0].data == (False, vanished) and "EXPUNGE" not in answer.names
        assert answer.last.code == ("HIGHESTMODSEQ", a.status("INBOX", "HIGHESTMODSEQ")[0])  # RFC 7162 3.2.7, 3.2.9
    assert b.ok("EXPUNGE").last.code is None
    b.ok("STORE 1 +FLAGS.SILENT (\\Deleted)")
    assert b.ok("CLOSE").last.code is None  # it MUST NOT be there (3.2.8)
    plain = relay.session(user)
    assert plain.command(f"SELECT INBOX (QRESYNC ({validity} {modseq}))").status == "BAD"
    assert plain.command("FETCH 1 UID").status == "BAD"  # nothing is selected
    for arguments in ("1", "1 1 1:*", "0 1", "1 1 1:3 (1:2 1)", "1 1 (1 1", "x 1"):
        assert b.command(f"SELECT INBOX (QRESYNC ({arguments}))").status == "BAD", arguments
    assert b.ok("EXAMINE INBOX").untagged and b.ok("SELECT Sent").untagged[0].code == ("CLOSED", None)  # 3.2.11


def test_qresync_tells_no_modseq_above_what_is_held_back(relay, user):
    a, b = relay.pair(user, 3, "ENABLE QRESYNC")
    b.ok("STORE 1 +FLAGS (x)")
    b.expunge("2")
    b.ok("UID STORE 3 +FLAGS (y)")
    told = a.ok("FETCH 1 (UID)").untagged
    removed = b.status("INBOX", "HIGHESTMODSEQ")[0] - 1  # of the message that is not told as gone
    assert "VANISHED" not in [one.name for one in told] and any(one.data.get("UID") == 3 for one in told if one.name == "FETCH")
    (highest,) = [one.code[1] for one in told if one.name == "OK" and one.code[0] == "HIGHESTMODSEQ"]
    assert highest < removed  # RFC 7162 3.2, 6
    told = a.ok("NOOP").untagged
    assert told[0].name == "VANISHED" and told[-1].code == ("HIGHESTMODSEQ", b.status("INBOX", "HIGHESTMODSEQ")[0])


# Mailboxes


def test_children(relay, user):
    a = relay.session(user, "CREATE a/b", "SUBSCRIBE c/gone")
    listed = a.listed('LIST "" "*"')
    assert "\\HasChildren" in listed["a"] and "\\HasNoChildren" in listed["a/b"] and "c" not in listed
    assert all(("\\HasChildren" in one) != ("\\HasNoChildren" in one) for one in listed.values())
    assert a.listed('LIST "" "%" RETURN (CHILDREN)')["a"] == ["\\HasChildren"]
    a.ok("DELETE a/b")
    assert "\\HasNoChildren" in a.listed('LIST "" "a"')["a"]


def test_list_extended(relay, user):
    """The examples of RFC 5258 5."""
    a = relay.session(user)
    for name in ("Fruit/Apple", "Fruit/Banana", "Tofu", "Vegetable/Broccoli", "Vegetable/Corn"):
        a.ok(f"CREATE {name}")
    for name in ("Drafts", "Sent", "Archive", "Junk", "Trash"):
        a.ok(f"UNSUBSCRIBE {name}")
    for name in ("Fruit/Banana", "Fruit/Peach", "Vegetable", "Vegetable/Broccoli"):
        a.ok(f"SUBSCRIBE {name}")

    def names(command: str) -> set[str]:
        return set(a.listed(command))

    subscribed = {"INBOX", "Fruit/Banana", "Fruit/Peach", "Vegetable", "Vegetable/Broccoli"}
    assert names('LIST (SUBSCRIBED) "" "*"') == subscribed == names('LSUB "" "*"')
    assert "\\NonExistent" in a.listed('LIST (SUBSCRIBED) "" "*"')["Fruit/Peach"]
    assert a.listed('LIST () "" "%" RETURN (CHILDREN)')["Fruit"] == ["\\HasChildren"]
    assert "\\Subscribed" in a.listed('LIST "" "*" RETURN (SUBSCRIBED)')["Vegetable"]
    assert "\\Subscribed" not in a.listed('LIST "" "*" RETURN (SUBSCRIBED CHILDREN)')["Tofu"]
    assert names('LIST "" ("INBOX" "Drafts" "Fruit/%")') == {"INBOX", "Drafts", "Fruit/Apple", "Fruit/Banana"}
    rows = {one.data["name"]: one.data for one in a.ok('LIST (SUBSCRIBED RECURSIVEMATCH) "" "%"').named("LIST")}
    assert set(rows) == {"INBOX", "Fruit", "Vegetable"}
    assert rows["Fruit"]["CHILDINFO"] == rows["Vegetable"]["CHILDINFO"] == [b"SUBSCRIBED"]
    assert "\\Subscribed" in rows["Vegetable"]["attributes"] and "\\Subscribed" not in rows["Fruit"]["attributes"]
    rows = {one.data["name"]: one.data for one in a.ok('LIST (REMOTE RECURSIVEMATCH SUBSCRIBED) "" "*"').named("LIST")}
    assert set(rows) == subscribed and [name for name, row in rows.items() if "CHILDINFO" in row] == ["Vegetable"]
    assert names('LIST "Fruit/" "%"') == {"Fruit/Apple", "Fruit/Banana"} and names('LIST () "" ""') == set()
    assert a.listed('LIST "" ""') == {"": ["\\Noselect"]}
    assert names('LIST (subscribed Subscribed) "" "V*" RETURN (children CHILDREN)') == {"Vegetable", "Vegetable/Broccoli"}
    for command in (
        'LIST (REMOTE RECURSIVEMATCH) "" *',
        'LIST "" "*" RETURN (BLURDY)',
        'LIST (SUBSCRIBED "" *',
        'LIST "" ()',
        "LIST",
    ):
        assert a.command(command).status == "BAD", command


def test_list_status(relay, user):
    a = relay.session(user, "CREATE a/b", "DELETE a")
    a.put("a/b", "one")
    answer = a.ok('LIST "" ("a*" "Sent") RETURN (STATUS (MESSAGES UIDNEXT) CHILDREN)')
    assert {one.data["name"] for one in answer.named("LIST")} >= {"a/b", "Sent"}
    assert dict(one.data for one in answer.named("STATUS")) == {
        "a/b": {"MESSAGES": 1, "UIDNEXT": 2}, "Sent": {"MESSAGES": 0, "UIDNEXT": 1},
    }  # fmt: skip
    for options in ("STATUS", "STATUS ()", "STATUS (BLURDY)", "STATUS MESSAGES"):
        assert a.command(f'LIST "" "*" RETURN ({options})').status == "BAD", options


def test_special_use_and_create_special_use(relay, user):
    a = relay.session(user)
    assert set(a.listed('LIST (SPECIAL-USE) "" "*"')) == {"Archive", "Drafts", "Junk", "Sent", "Trash"}
    answer = a.command("CREATE Everything (USE (\\All))")
    assert (answer.status, answer.code) == ("NO", "USEATTR") and "Everything" not in a.listed('LIST "" "*"')
    for use in ("\\Flagged", "\\Blurdy", "\\Drafts \\Sent"):
        assert a.command(f"CREATE More (USE ({use}))").code == "USEATTR", use
    answer = a.command("CREATE Sent2 (USE (\\Sent))")  # there is one already: refused, or both have it (RFC 6154 3)
    assert answer.status == "OK" or (answer.code == "USEATTR" and "Sent2" not in a.listed('LIST "" "*"'))
    a.ok("DELETE Junk")
    assert a.ok("CREATE Spam (USE (\\junk))").code == "MAILBOXID"
    assert "\\Junk" in a.listed('LIST "" "Spam"')["Spam"]
    a.ok("RENAME Spam Other")
    assert "\\Junk" in a.listed('LIST (SPECIAL-USE) "" "*"')["Other"]
    a.ok("CREATE plain (USE ())")
    for arguments in ("(USE)", "(USE \\Sent)", "(BLURDY (\\Sent))", "(USE (\\Sent)", "USE (\\Sent)"):
        assert a.command(f"CREATE x {arguments}").status == "BAD", arguments


def test_objectid(relay, user):
    a, b = relay.session(user, worker=0), relay.session(user, worker=1)
    made = a.ok("CREATE foo").last.code
    assert made[0] == "MAILBOXID" and a.status("foo", "MAILBOXID") == [made[1]] != a.status("INBOX", "MAILBOXID")
    a.ok("RENAME foo renamed")
    opened = [one.code for one in b.ok("SELECT renamed").named("OK")]
    assert made in opened and made in [one.code for one in b.ok("EXAMINE renamed").named("OK")]
    a.ok("DELETE renamed")
    assert a.ok("CREATE foo").last.code != made
    assert len({one.data[1]["MAILBOXID"] for one in a.ok('LIST "" "*" RETURN (STATUS (MAILBOXID))').named("STATUS")}) == 7
    a.put("INBOX", "one", "two")
    a.ok("SELECT INBOX")
    found = a.fetch("1:* (EMAILID THREADID)")
    idents = [found[number]["EMAILID"] for number in (1, 2)]
    assert idents[0] != idents[1] and [found[number]["THREADID"] for number in (1, 2)] == [None, None]
    a.ok("COPY 1 foo")
    a.ok("MOVE 2 foo")
    b.ok("SELECT foo")
    assert [one["EMAILID"] for one in b.fetch("1:* (EMAILID)").values()] == idents
    assert b.searched(f"EMAILID {idents[1]}") == [2] and b.searched(f"EMAILID {idents[1].swapcase()}") == []
    assert b.searched("THREADID Tabc") == [] and b.command("SEARCH EMAILID {1+}\r\n*").status == "BAD"


# APPEND, quota, dates


def test_status_size(relay, user):
    a = relay.session(user)
    a.put("INBOX", "one", "two")
    a.ok("SELECT INBOX")
    assert a.status("INBOX", "SIZE") == [sum(one["RFC822.SIZE"] for one in a.fetch("1:* (RFC822.SIZE)").values())]
    assert a.status("Sent", "SIZE", "MESSAGES", "UNSEEN", "RECENT", "DELETED", "DELETED-STORAGE") == [0] * 6
    for items in ("()", "(BLURDY)", "SIZE", "(SIZE"):
        assert a.command(f"STATUS INBOX {items}").status == "BAD", items
    assert a.command("STATUS nowhere (SIZE)").code == "NONEXISTENT"


def test_appendlimit(relay, user):
    a = relay.session(user)
    assert a.status("INBOX", "APPENDLIMIT") == [LIMIT]
    assert a.ok('LIST "" "Sent" RETURN (STATUS (APPENDLIMIT))').named("STATUS")[0].data == ("Sent", {"APPENDLIMIT": LIMIT})
    exact = message("exact", "x" * (LIMIT - len(message("exact", ""))))
    assert a.append("INBOX", exact).status == "OK"
    tag = a.start(b"APPEND INBOX {%d}" % (LIMIT + 1))
    answer = a.finish(tag)
    assert (answer.status, answer.code) == ("NO", "TOOBIG")
    assert a.status("INBOX", "MESSAGES", "SIZE") == [1, LIMIT]


def test_quota(relay, user):
    a = relay.session(user)
    root = f"{user}@local.example"
    answer = a.ok("GETQUOTAROOT Sent")  # nothing is limited, and a quota root has one resource at least (RFC 9208 7)
    assert answer.names == ["QUOTAROOT"] and answer.untagged[0].data == ("Sent", [])
    assert a.command(f'GETQUOTA "{root}"').code == a.command('GETQUOTA ""').code == "NONEXISTENT"
    relay.quota(user, octets=100_000, messages=10)
    answer = a.ok("GETQUOTAROOT Sent")
    assert answer.names == ["QUOTAROOT", "QUOTA"] and answer.untagged[0].data == ("Sent", [root])
    assert a.ok("GETQUOTAROOT not/yet/there").untagged[0].data == ("not/yet/there", [root])  # RFC 9208 4.1.2
    a.put("INBOX", "one")
    assert a.ok(f"GETQUOTA {root}").untagged[0].data == (root, {"STORAGE": (1, 97), "MESSAGE": (1, 10)})
    answer = a.command(f"SETQUOTA {root} (STORAGE 5)")
    assert (answer.status, answer.code) == ("NO", "NOPERM")
    for command in ("GETQUOTA", "GETQUOTAROOT", f"SETQUOTA {root}", f"SETQUOTA {root} (STORAGE x)"):
        assert a.command(command).status == "BAD", command


def test_quota_res_storage(relay, user):
    a = relay.session(user)
    relay.quota(user, octets=10_000)
    assert a.append("INBOX", message("large", "x" * 6000)).status == "OK"
    assert a.append("INBOX", message("large", "x" * 6000)).code == "OVERQUOTA"
    a.ok("SELECT INBOX")
    assert a.command("COPY 1 Sent").code == "OVERQUOTA" and a.status("Sent", "MESSAGES") == [0]
    a.ok("STORE 1 +FLAGS (\\Deleted)")
    assert a.status("INBOX", "DELETED-STORAGE", "DELETED") == [len(message("large", "x" * 6000)), 1]
    a.ok("EXPUNGE")
    assert a.ok("GETQUOTAROOT INBOX").named("QUOTA")[0].data[1] == {"STORAGE": (0, 9)}
    assert a.append("INBOX", message("large", "x" * 6000)).status == "OK"


def test_quota_res_message(relay, user):
    a, b = relay.pair(user, 3)
    relay.quota(user, messages=4)
    assert a.command("COPY 1:2 Sent").code == "OVERQUOTA" and a.ok("COPY 1 Sent").code == "COPYUID"
    assert a.append("Sent", message("x")).code == "OVERQUOTA" and a.ok("MOVE 1 Sent").untagged
    a.ok("STORE 1:2 +FLAGS (\\Deleted)")
    assert a.status("INBOX", "DELETED") == [2]
    a.ok("CLOSE")
    assert b.ok("GETQUOTAROOT INBOX").named("QUOTA")[0].data[1] == {"MESSAGE": (2, 4)} and a.put("INBOX", "x") == [4]


def test_multiappend(relay, user):
    a, b = relay.pair(user, 1)
    texts = [message(f"m{number}", "y" * number) for number in range(3)]
    arguments = (b"(\\Seen) ", b'" 5-Jan-2020 01:02:03 +0000" ', b"")
    literals = b" ".join(b"%b{%d+}\r\n%b" % (more, len(text), text) for more, text in zip(arguments, texts, strict=True))
    answer = a.command(b"APPEND INBOX " + literals)
    assert answer.last.code == ("APPENDUID", (b.status("INBOX", "UIDVALIDITY")[0], [(2, 4)]))
    assert [one.number for one in answer.named("EXISTS")] == [4]
    found = a.fetch("2:4 (FLAGS INTERNALDATE BODY.PEEK[])")
    assert [found[number]["BODY[]"] for number in (2, 3, 4)] == texts and "\\Seen" in found[2]["FLAGS"]
    assert found[3]["INTERNALDATE"] == " 5-Jan-2020 01:02:03 +0000"
    tag = a.start(b"APPEND INBOX {%d}" % len(texts[0]))
    for number, text in enumerate(texts):
        assert a.response().tag == "+"
        more = b" (x) {%d}" % len(texts[number + 1]) if number < 2 else b""
        a.send(text + more + b"\r\n")
    assert a.finish(tag).last.code[1][1] == [(5, 7)]
    for broken in (b"{%d+}\r\n%b (\\Recent) {3+}\r\nabc", b"{%d+}\r\n%b {0+}\r\n", b"{%d+}\r\n%b x", b"{%d+}\r\n%b {5000000}"):
        assert a.command(b"APPEND INBOX " + broken % (len(texts[0]), texts[0])).status in ("NO", "BAD"), broken
    assert b.status("INBOX", "MESSAGES") == [7]  # all or nothing (RFC 3502 6.3.11)


def test_savedate(relay, user):
    a = relay.session(user)
    a.append("INBOX", message("old"), '" 1-Feb-2001 00:00:00 +0000"')
    a.ok("SELECT INBOX")

    def saved() -> datetime.datetime:
        return datetime.datetime.strptime(a.fetch("1 (SAVEDATE)")[1]["SAVEDATE"].strip(), "%d-%b-%Y %H:%M:%S %z")

    now = datetime.datetime.now(datetime.UTC)
    first = saved()
    assert abs((now - first).total_seconds()) < 600 and a.fetch("1 (INTERNALDATE)")[1]["INTERNALDATE"].startswith(" 1-Feb-2001")
    days = [(first + datetime.timedelta(days=number)).strftime("%d-%b-%Y") for number in (-1, 0, 1)]
    assert a.searched(f"SAVEDON {days[1]}") == [1] == a.searched(f"SAVEDSINCE {days[0]}") == a.searched(f"SAVEDBEFORE {days[2]}")
    assert a.searched(f"SAVEDBEFORE {days[1]}") == [] == a.searched(f"SAVEDSINCE {days[2]}")
    assert a.searched("BEFORE 2-Feb-2001") == [1] == a.searched("SAVEDATESUPPORTED")
    a.ok("COPY 1 Sent")
    assert saved() == first  # of the source (RFC 8514 3)
    a.ok("SELECT Sent")
    assert saved() >= first and a.fetch("1 (INTERNALDATE)")[1]["INTERNALDATE"].startswith(" 1-Feb-2001")


# Webmail


def test_sort(relay, user):
    a = relay.session(user)
    a.put("INBOX", "b", "Re: a", "c")
    a.ok("SELECT INBOX")
    assert a.ok("SORT (SUBJECT) UTF-8 ALL").named("SORT")[0].data == ([2, 1, 3], None)
    assert a.ok("UID SORT (REVERSE SUBJECT) US-ASCII 1:2").named("SORT")[0].data == ([1, 2], None)


@pytest.mark.parametrize("algorithm", ["REFERENCES", "ORDEREDSUBJECT"])
def test_thread(relay, user, algorithm):
    a = relay.session(user)
    a.put("INBOX", "b", "a", "Re: b")
    a.ok("SELECT INBOX")
    assert sorted(a.ok(f"THREAD {algorithm} UTF-8 ALL").named("THREAD")[0].data) == [[1, 3], [2]]


def test_preview(relay, user):
    a = relay.session(user)
    a.put("INBOX", "one")
    a.ok("SELECT INBOX")
    assert a.fetch("1 (PREVIEW)")[1]["PREVIEW"] == b"x" == a.fetch("1 (PREVIEW (LAZY))")[1]["PREVIEW"]
