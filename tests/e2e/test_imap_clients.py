"""IMAP: programs that people use read, change and synchronise mail, in the clear and over TLS. What arrives is octet for octet
what was put in, with its flags and date and in the mailbox of its name; what a program changes, another session finds."""

import imaplib
import itertools
import re
from pathlib import Path

import pytest

from tests.conftest import PROVE
from tests.support import imap_programs as programs
from tests.support.daemon import wait_for
from tests.support.imap_mail import (
    FOLDERS,
    MAILS,
    UNCLOSED,
    WIRE,
    Found,
    Mail,
    changed,
    contents,
    expected,
    fill,
    found,
    message,
    messages,
    names,
    numbered,
    quoted,
    same,
    session,
)
from tests.support.imap_servers import SERVERS, Account, ImapServer, started

COUNT = 5000 if PROVE else 300
SECURITY = ("clear", "starttls", "implicit")
DRAFTS, KOELN, NORD = "Entwürfe & Ähnliches", "Arbeit/Köln", "Süd & Nord"
INBOX = FOLDERS["INBOX"]
_count = itertools.count()


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory):
    with started(request.param, tmp_path_factory.mktemp("imap")) as running:
        yield running


@pytest.fixture(params=SECURITY)
def account(request, server: ImapServer) -> Account:
    """A new user, whom a client reaches in each of the ways."""
    return server.account(f"user{next(_count)}")._replace(security=request.param)


def undated(folders: dict[str, list[Found]]) -> dict[str, list[Found]]:
    return {name: sorted(one._replace(date=0) for one in mails) for name, mails in folders.items()}


def wire(folders: dict[str, list[Found]]) -> dict[str, list[Found]]:
    """By the names as IMAP4rev1 writes them."""
    return {WIRE[name]: mails for name, mails in folders.items()}


def without(mails: list[Mail], *subjects: str) -> list[Mail]:
    return [mail for mail in mails if found(*mail).subject not in subjects]


def named(subject: str) -> Mail:
    return next(mail for mail in INBOX if found(*mail).subject == subject)


def state(account: Account, name: str = "INBOX") -> bytes:
    """What any change of the mailbox changes."""
    with session(account) as client:
        return client.status(quoted(name), "(MESSAGES UIDNEXT UIDVALIDITY HIGHESTMODSEQ UNSEEN)")[1][0]


def in_session(account: Account, name: str, *commands: tuple[str, ...]) -> None:
    """What another client does meanwhile, by UID."""
    with session(account) as client:
        client.select(quoted(name))
        for command in commands:
            status, said = client.uid(*command)
            assert status == "OK", said


def test_imaplib_changes_mailboxes(account):
    fill(account, FOLDERS)
    same(contents(account), expected(FOLDERS))
    with session(account) as client:
        assert {"UIDPLUS", "MOVE", "IDLE", "LITERAL+"} <= set(client.capability()[1][0].decode().split())
        assert client.create(quoted(NORD))[0] == "OK" and client.subscribe(quoted(NORD))[0] == "OK"
        assert any(WIRE[NORD].encode() in line for line in client.lsub()[1])
        assert client.rename(quoted(KOELN), '"Arbeit/2026/K&APY-ln"')[0] == "OK"
        assert client.rename('"Arbeit/2026/K&APY-ln"', quoted(KOELN))[0] == "OK"
        assert client.create("gone")[0] == "OK" and client.delete("gone")[0] == "OK"
        assert client.select("gone")[0] == "NO"
    same(contents(account), expected(FOLDERS))


def test_imaplib_copies_moves_and_expunges_by_uid(account):
    fill(account, {"INBOX": INBOX, NORD: []})
    with session(account) as client:
        client.select()
        uids = [uid for uid, _ in messages(client)]
        assert uids == sorted(uids) and [one for _, one in messages(client)] == [found(*mail) for mail in INBOX]
        validity = int(re.search(rb"UIDVALIDITY (\d+)", client.status(quoted(NORD), "(UIDVALIDITY)")[1][0])[1])
        said = client.append(quoted(NORD), "($Work)", '" 1-Feb-2024 01:02:03 -0700"', MAILS[0].data)[1][0]
        assert said.startswith(b"[APPENDUID %d 1] " % validity)
        assert client.uid("COPY", f"{uids[2]},{uids[0]}", quoted(NORD))[0] == "OK"
        assert client.response("COPYUID")[1] == [b"%d %d,%d 2:3" % (validity, uids[0], uids[2])]
        imaplib.Commands.setdefault("MOVE", ("SELECTED",))
        assert client.uid("MOVE", f"{uids[3]}:{uids[4]}", quoted(NORD))[0] == "OK"
        assert client.response("COPYUID")[1] == [b"%d %d:%d 4:5" % (validity, uids[3], uids[4])]
        assert len(client.response("EXPUNGE")[1]) == 2
        client.uid("STORE", f"{uids[5]}:{uids[7]}", "+FLAGS.SILENT", r"(\Deleted rot)")
        assert client.uid("EXPUNGE", f"{uids[5]},{uids[0]}")[0] == "OK"  # the second is not deleted
        assert client.response("EXPUNGE")[1] == [b"4"]
        client.uid("STORE", str(uids[7]), "-FLAGS", r"(\Deleted)")
        found_there = client.uid("SEARCH", "OR", "DELETED", "SUBJECT", '"folded"')[1]
        assert found_there == [b"%d %d" % (uids[6], uids[9])]
        assert client.close()[0] == "OK"  # expunges
    date = 1_706_774_523
    copies = [Mail(MAILS[0].data, ("$Work",), date), MAILS[0], MAILS[2], *MAILS[3:5]]
    left = [*MAILS[:3], changed(MAILS[7], *MAILS[7].flags, "rot"), *MAILS[8:], UNCLOSED]
    same(contents(account), expected({"INBOX": left, NORD: copies}))


def test_imaplib_in_utf8(account, server):
    if not server.utf8:
        pytest.skip("it does not offer UTF8=ACCEPT")
    text = message("8-bit", "ä\n", "X-Name: Jörg\n").decode("latin-1").encode()
    with session(account) as client:
        assert client.enable("UTF8=ACCEPT")[0] == "OK" and client.utf8_enabled
        assert client.create(f'"{NORD}"')[0] == "OK"
        # Its append() counts "UTF8 (" into the literal: by hand.
        client.send(f'u APPEND "{NORD}" (\\Seen) "14-Nov-2023 22:13:20 +0000" UTF8 (~{{{len(text)}}}\r\n'.encode())
        assert client.readline().startswith(b"+ ")
        client.send(text + b")\r\n")
        heard(client, rb"u OK \[APPENDUID .*")
        assert any(line.decode().endswith(f'"{NORD}"') for line in client.list()[1])
        assert client.select(f'"{NORD}"') == ("OK", [b"1"])
        assert client.fetch("1", "(BODY.PEEK[])")[1][0][1] == text
    same(contents(account), expected({NORD: [Mail(text, ("\\Seen",))]}))


def test_imaplib_is_idle_while_others_change(account):
    fill(account, {"INBOX": MAILS[:3]})
    with session(account) as client:
        client.select()
        client.send(b"i IDLE\r\n")
        assert client.readline().startswith(b"+ ")
        fill(account, {"INBOX": MAILS[3:4]})
        heard(client, rb"\* 4 EXISTS")
        in_session(account, "INBOX", ("STORE", "1", "+FLAGS", r"(\Flagged)"))
        heard(client, rb"\* 1 FETCH \(.*\\Flagged.*\)")
        in_session(account, "INBOX", ("STORE", "2", "+FLAGS", r"(\Deleted)"), ("EXPUNGE", "2"))
        heard(client, rb"\* 2 EXPUNGE")
        client.send(b"DONE\r\n")
        heard(client, rb"i OK .*")
        assert client.noop()[0] == "OK"
        assert client.fetch("2", "(UID)")[1] == [b"2 (UID 3)"]


def heard(client: imaplib.IMAP4, pattern: bytes) -> None:
    """Read lines until this one comes."""
    for _ in range(100):
        if re.fullmatch(pattern, client.readline().rstrip()):
            return
    raise AssertionError(pattern)


def undrafted(mail: Mail) -> Found:
    """The message as mutt and s-nail store or send it, which do not know this flag."""
    return changed(mail, *set(mail.flags) - {"\\Draft"})


def test_mutt_copies_threads_deletes_and_flags(account, tmp_path):
    fill(account, FOLDERS)
    screen = programs.mutt(
        account, tmp_path, "=INBOX",
        f"<tag-pattern>.<enter><tag-prefix><copy-message>{tmp_path}/mail/all<enter><untag-pattern>.<enter>",
        "<search>~s two<enter><tag-thread>", f"<tag-prefix><copy-message>={NORD}<enter>",
        "<search>~s folded<enter><delete-message><search>~s empty<enter><flag-message><sync-mailbox>",
    )  # fmt: skip
    assert "└─>three" in screen
    same(programs.maildir(tmp_path / "mail"), expected({"all": [undrafted(mail) for mail in INBOX]}))
    there = FOLDERS | {NORD: MAILS[:3], "INBOX": [*without(INBOX, "folded", "empty"), changed(named("empty"), "\\Flagged")]}
    same(contents(account), expected(there))


@pytest.mark.parametrize("settings", ["", "set imap_condstore imap_qresync"], ids=["cache", "qresync"])
def test_mutt_comes_back_with_its_cache(account, tmp_path, settings):
    fill(account, {"INBOX": INBOX})
    programs.mutt(account, tmp_path, "=INBOX", settings=settings)
    fill(account, {"INBOX": numbered(1)})
    in_session(
        account, "INBOX",
        ("STORE", "2", "+FLAGS.SILENT", r"(\Deleted)"), ("EXPUNGE", "2"),
        ("STORE", "1,4", "+FLAGS", r"(\Flagged)"), ("STORE", "3", "-FLAGS", r"(\Flagged)"),
    )  # fmt: skip
    copies = [
        f"<untag-pattern>.<enter><tag-pattern>{what}<enter><tag-prefix><copy-message>={to}<enter>"
        for what, to in (("~F", "Arbeit"), ("~A", NORD))
    ]
    programs.mutt(account, tmp_path, "=INBOX", *copies, settings=settings)
    assert ("VANISHED (EARLIER) 2\n" in (tmp_path / ".muttdebug0").read_text(errors="replace")) == ("qresync" in settings)
    flagged = [changed(mail, *mail.flags, "\\Flagged") for mail in (MAILS[0], MAILS[3], MAILS[4])]
    everything = [*flagged, changed(MAILS[2]), *without(INBOX, "one", "two", "three", "dots", "mixed"), *numbered(1)]
    same(contents(account), expected({"INBOX": everything, NORD: everything, "Arbeit": flagged}))


def test_mutt_files_messages(account, tmp_path):
    programs.put(tmp_path / "mail" / "local", MAILS)
    programs.mutt(account, tmp_path, f"{tmp_path}/mail/local", f"<tag-pattern>.<enter><tag-prefix><copy-message>={NORD}<enter>")
    sent = [undrafted(mail)._replace(date=1_700_000_000) for mail in MAILS]  # that of the header field
    same(contents(account), expected({NORD: sent}))


def test_mbsync_both_ways(account, tmp_path):
    fill(account, FOLDERS)
    programs.mbsync(account, tmp_path)
    mail = tmp_path / "mail"
    same(programs.maildir(mail), wire(expected(FOLDERS)))
    programs.put(mail / WIRE[NORD], MAILS[:2])
    programs.put(mail / "INBOX", numbered(2))
    programs.mark(programs.file_of(mail / "INBOX", "one"), "FS")
    programs.file_of(mail / "INBOX", "two").unlink()
    in_session(
        account, "INBOX",
        ("STORE", "3", "FLAGS", r"(\Answered)"), ("STORE", "4", "+FLAGS", r"(\Deleted)"), ("EXPUNGE", "4"),
    )  # fmt: skip
    fill(account, {"Arbeit": MAILS[9:10], DRAFTS: numbered(1)})
    programs.mbsync(account, tmp_path)
    inbox = [changed(MAILS[0], "\\Flagged", "\\Seen"), changed(MAILS[2], "\\Answered"), *INBOX[4:], *numbered(2)]
    there = expected(FOLDERS | {"INBOX": inbox, NORD: MAILS[:2], "Arbeit": MAILS[9:10], DRAFTS: [*FOLDERS[DRAFTS], *numbered(1)]})
    same(contents(account), there)
    same(programs.maildir(mail), wire(there))
    assert nothing_moves(account, tmp_path)


def nothing_moves(account: Account, home: Path) -> bool:
    """Whether mbsync changes nothing on either side."""
    before = state(account), files(home / "mail")
    programs.mbsync(account, home)
    return before == (state(account), files(home / "mail"))


def files(folder: Path) -> set[tuple[str, int]]:
    return {(str(file), file.stat().st_mtime_ns) for file in folder.rglob("*:2,*")}


def test_mbsync_many(server, tmp_path):
    account = server.account(f"user{next(_count)}")
    mails = numbered(COUNT)
    here, there = tmp_path / "here", tmp_path / "there"
    for home in (here, there):
        home.mkdir()
    programs.put(here / "mail" / "INBOX", mails)
    for home in (here, there):
        programs.mbsync(account, home)
        same(contents(account), expected({"INBOX": mails}))
        same(programs.maildir(home / "mail"), expected({"INBOX": mails}))
        assert nothing_moves(account, home)
    in_session(account, "INBOX", ("STORE", "1:*", "+FLAGS.SILENT", r"(\Answered)"))
    programs.mbsync(account, here)
    answered = [changed(mail, *mail.flags, "\\Answered") for mail in mails]
    same(contents(account), expected({"INBOX": answered}))
    same(programs.maildir(here / "mail"), expected({"INBOX": answered}))
    for file in (here / "mail" / "INBOX" / "cur").glob("*[02468]_put*"):
        file.unlink()
    for home in (here, there):
        programs.mbsync(account, home)
        same(contents(account), expected({"INBOX": answered[1::2]}))
        same(programs.maildir(home / "mail"), expected({"INBOX": answered[1::2]}))


# Not by STARTTLS: imaplib2 reads and writes in two threads at once, and sometimes waits for ever behind TLS 1.3's handshake.
@pytest.mark.parametrize("account", ["clear", "implicit"], indirect=True)
def test_offlineimap_both_ways(account, tmp_path):
    there = FOLDERS | {"INBOX": MAILS}  # it parses messages, and so changes those that are not well formed
    fill(account, there)
    programs.offlineimap(account, tmp_path)
    mail = tmp_path / "mail"
    same(undated(programs.maildir(mail)), undated(expected(there)))
    programs.put(mail / NORD, MAILS[:2])
    programs.mark(programs.file_of(mail / "INBOX", "one"), "FS")
    programs.file_of(mail / "INBOX", "two").unlink()
    in_session(
        account, "INBOX",
        ("STORE", "3", "FLAGS", r"(\Answered)"), ("STORE", "4", "+FLAGS", r"(\Deleted)"), ("EXPUNGE", "4"),
    )  # fmt: skip
    fill(account, {DRAFTS: numbered(1)})
    programs.offlineimap(account, tmp_path)
    inbox = [changed(MAILS[0], "\\Flagged", "\\Seen"), changed(MAILS[2], "\\Answered"), *MAILS[4:]]
    expectation = expected(there | {"INBOX": inbox, NORD: MAILS[:2], DRAFTS: [*FOLDERS[DRAFTS], *numbered(1)]})
    same(contents(account), expectation)
    same(undated(programs.maildir(mail)), undated(expectation))
    before = state(account)
    programs.offlineimap(account, tmp_path)
    assert state(account) == before
    same(undated(programs.maildir(mail)), undated(expectation))


def stored(texts: list[bytes]) -> list[str]:
    """The digests of messages that were stored with the ends of lines of Unix."""
    return sorted(found(text.replace(b"\n", b"\r\n")).digest for text in texts)


def digests(*mails: Mail) -> list[str]:
    return sorted(found(*mail).digest for mail in mails)


def test_fetchmail(account, tmp_path):
    fill(account, FOLDERS)
    drafts = FOLDERS[DRAFTS]
    unseen = [mail for mail in drafts if "\\Seen" not in mail.flags]
    for _ in range(2):  # the second time there is nothing
        assert stored(programs.fetchmail(account, tmp_path, DRAFTS, "keep")) == digests(*unseen)
    seen = [changed(mail, *mail.flags, "\\Seen") for mail in drafts]
    same(contents(account), expected(FOLDERS | {DRAFTS: seen}))
    assert stored(programs.fetchmail(account, tmp_path, "INBOX", "fetchall", "nokeep")) == digests(*unseen, *INBOX)
    same(contents(account), expected(FOLDERS | {DRAFTS: seen, "INBOX": []}))


def test_fetchmail_is_idle_until_mail_comes(account, tmp_path):
    fill(account, {"INBOX": MAILS[:1]})
    with programs.idle_fetchmail(account, tmp_path) as texts:
        wait_for(lambda: len(texts()) == 1, what="the first message")
        fill(account, {"INBOX": MAILS[2:3]})
        wait_for(lambda: stored(texts()) == digests(MAILS[0], MAILS[2]), what="the message that comes")
        fill(account, {"INBOX": MAILS[8:9]})
        wait_for(lambda: stored(texts()) == digests(MAILS[0], MAILS[2], MAILS[8]), what="the next one")


@pytest.mark.parametrize("account", ["clear", "implicit"], indirect=True)  # it has no STARTTLS for IMAP
def test_getmail(account, tmp_path):
    there = FOLDERS | {"INBOX": MAILS}  # it parses messages, and so changes those that are not well formed
    fill(account, there)
    mails = [mail for folder in there.values() for mail in folder]
    for _ in range(2):  # the second time it knows them by UIDVALIDITY and UID
        assert stored(programs.getmail(account, tmp_path, "ALL", "read_all = false")) == digests(*mails)
    same(contents(account), expected(there))
    fill(account, {DRAFTS: numbered(1)})
    texts = programs.getmail(account, tmp_path, DRAFTS, "read_all = false", "delete = true")
    assert stored(texts) == digests(*mails, *numbered(1))
    same(contents(account), expected(there | {DRAFTS: []}))


def test_curl(account, tmp_path):
    fill(account, FOLDERS)
    upload = tmp_path / "upload"
    upload.write_bytes(UNCLOSED.data)

    def curl(path: str, *options: str) -> bytes:
        return programs.curl(account, path, *options)

    listed = curl("").decode().splitlines()
    assert {line.rpartition(' "/" ')[2].strip('"') for line in listed} >= {WIRE[name] for name in FOLDERS}
    for number, mail in enumerate(INBOX, 1):
        assert curl(f"INBOX/;UID={number}") == mail.data
    assert curl(programs.path_of(DRAFTS) + "/;MAILINDEX=2") == FOLDERS[DRAFTS][1].data
    assert curl("INBOX/;UID=2/;SECTION=HEADER.FIELDS%20(SUBJECT)") == b"Subject: two\r\n\r\n"
    assert curl("INBOX?SUBJECT%20two") == b"* SEARCH 2\r\n"
    assert curl("INBOX?TEXT%20hello%20UNSEEN%20NOT%20DELETED") == b"* SEARCH\r\n"
    curl("", "-X", f"CREATE {quoted(NORD)}")
    curl(programs.path_of(NORD), "-T", str(upload))
    assert curl("", "-X", f"STATUS {quoted(NORD)} (MESSAGES UNSEEN)").split(b" (")[1] == b"MESSAGES 1 UNSEEN 0)\r\n"
    curl("INBOX", "-X", f"UID COPY 2:3 {quoted(KOELN)}")
    curl("INBOX", "-X", r"STORE 1 +FLAGS (\Deleted)")
    assert curl("INBOX", "-X", "EXPUNGE") == b"* 1 EXPUNGE\r\n"
    there = contents(account)
    (sent,) = there.pop(NORD)
    assert (sent.digest, sent.flags) == (found(*UNCLOSED).digest, ("\\Seen",))
    seen = [changed(mail, *mail.flags, "\\Seen") for mail in INBOX[1:]]
    drafts = [changed(mail, *mail.flags, *["\\Seen"] * (mail is MAILS[1])) for mail in FOLDERS[DRAFTS]]
    copies = [changed(mail, *mail.flags, "\\Seen") for mail in MAILS[1:3]]
    assert there == expected({"INBOX": seen, DRAFTS: drafts, KOELN: [*FOLDERS[KOELN], *copies]})


def test_s_nail(account, tmp_path):
    fill(account, FOLDERS)
    said = programs.s_nail(
        account, tmp_path, "folders @", "headers", "echo SEARCH", "from '(subject two)'", "from '(body inner)'", "echo END",
        f"copy 1-5 maildir://{tmp_path}/out", f"copy 2 '+{DRAFTS}'", f"save 10 '+{KOELN}'", "delete 3 4", "flag 7",
        f"imap create {WIRE['Arbeit']}/new", "quit",
    )  # fmt: skip
    assert {DRAFTS, "INBOX"} <= set(said.splitlines()) and all(found(*mail).subject in said for mail in INBOX)
    (searched,) = re.findall(r"SEARCH\n(.*?)END\n", said, re.DOTALL)
    assert [line.split()[-1] for line in searched.splitlines()] == ["two", "attached"]
    assert digests(*ended(INBOX[:5])) == sorted(one.digest for one in programs.maildir(tmp_path)["out"])
    seen = [changed(mail, *mail.flags, "\\Seen") for mail in (MAILS[0], MAILS[9])]
    inbox = [*seen, *without(INBOX, "one", "three", "dots", "empty", "folded"), changed(MAILS[6], "\\Flagged")]
    copies = {DRAFTS: [*FOLDERS[DRAFTS], MAILS[1]], KOELN: [*FOLDERS[KOELN], MAILS[9]]}
    same(contents(account), expected({"INBOX": inbox, **copies}))
    with session(account) as client:
        assert "Arbeit/new" in names(client)


def test_s_nail_files_messages(account, tmp_path):
    fill(account, {NORD: []})
    mails = without(MAILS, "empty")
    programs.put(tmp_path / "local", mails)
    programs.s_nail(account, tmp_path, f"folder maildir://{tmp_path}/local", f"copy * '+{NORD}'", "quit")
    sent = [undrafted(mail) for mail in ended(mails)]
    same(undated(contents(account)), undated(expected({NORD: sent})))  # its dates are wrong where there is a time zone


def ended(mails: list[Mail]) -> list[Mail]:
    """The messages as s-nail files them, with an empty line at the end."""
    return [mail._replace(data=mail.data + b"\r\n") for mail in mails]


def test_doveadm_pulls_everything(account):
    keywords = [Mail(message("keywords"), ("$Forwarded", "rot", "\\Seen")), Mail(message("other"), ("blau",))]
    there = FOLDERS | {"INBOX": [*INBOX, *keywords], NORD: numbered(COUNT // 10)}
    fill(account, there)
    pulled = programs.doveadm(account)
    same(contents(account), expected(there))
    same(pulled, wire(expected(there)))
