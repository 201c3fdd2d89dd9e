"""What becomes of a message by a Sieve script: the examples of RFC 5228, 5229, 5230, 5231, 5232, 5233, 5260, 5490, 5429, and what
goes wrong."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto import sieve_message
from relaymta.proto.sieve import EXTENSIONS, SCRIPT_MOST, compile
from relaymta.proto.sieve_message import Message
from relaymta.proto.sieve_outcome import Answered, Discarded, Filed, Kept, Outcome, Redirected, Rejected
from relaymta.proto.sieve_run import run

REQUIRE = b"require [%b];\n" % b",".join(b'"%b"' % one.encode() for one in EXTENSIONS)
NOW = 1_795_842_000  # Saturday 2026-11-28 05:00:00 UTC

# RFC 5228 1.1 shows these two.
A = (
    b"Date: Tue, 1 Apr 1997 09:06:31 -0800 (PST)\r\nFrom: coyote@desert.example.org\r\nTo: roadrunner@acme.example.com\r\n"
    b"Subject: I have a present for you\r\n\r\nLook, I'm sorry about the whole anvil thing, and I really\r\n"
    b"didn't mean to try and drop it on you from the top of the\r\ncliff.  I want to try to make it up to you.  I've got some\r\n"
    b"great birdseed over here at my place--top of the line\r\nstuff--and if you come by, I'll have it all wrapped up\r\n"
    b"for you.\r\n"
)  # fmt: skip
B = (
    b"From: youcouldberich!@reply-by-postal-mail.invalid\r\nSender: b1ff@de.res.example.com\r\nTo: rube@landru.example.com\r\n"
    b"Date: Mon, 31 Mar 1997 18:26:10 -0800\r\nSubject: $$$ YOU, TOO, CAN BE A MILLIONAIRE! $$$\r\n\r\n"
    b"YOU MAY HAVE ALREADY WON\r\n"
)  # fmt: skip
ME = b"From: ann@a.example\r\nTo: bob@b.example\r\nSubject: hi\r\nMessage-ID: <1@a.example>\r\n"


def outcome(
    script: str | bytes,
    message: bytes = A,
    *,
    sender: str = "ann@a.example",
    recipient: str = "bob@b.example",
    addresses: Iterable[str] = ("bob@b.example",),
    mailboxes: Iterable[str] = (),
    separator: str = "+",
) -> Outcome:
    """What a script makes of a message."""
    text = script if isinstance(script, bytes) else script.encode()
    compiled = compile(text if text.startswith(b"require") else REQUIRE + text)
    if not compiled.reads_body:
        message, size = message.partition(b"\r\n\r\n")[0] + b"\r\n\r\n", len(message)
    else:
        size = len(message)
    return run(
        compiled, Message(message, size), sender=sender, recipient=recipient, addresses=addresses,
        exists=set(mailboxes).__contains__, seconds=NOW, separator=separator,
    )  # fmt: skip


def filed(script: str | bytes, message: bytes = A, **more: object) -> list[str]:
    """The mailboxes that a message is filed in."""
    found = outcome(script, message, **more)  # type: ignore[arg-type]
    assert not found.error
    return ["INBOX" if isinstance(one, Kept) else one.mailbox for one in found.actions if isinstance(one, (Kept, Filed))]


def true(test: str, message: bytes = A, **more: object) -> bool:
    """Whether a test is true."""
    return filed(f'if {test} {{ fileinto "yes"; }}', message, **more) == ["yes"]


# RFC 5228


def test_what_is_kept_by_itself() -> None:
    assert outcome("") == Outcome((Kept((), 0, True),))
    assert outcome("").implicit_keep
    assert outcome("if size :over 500K { discard; }").implicit_keep
    assert outcome("stop; discard;").implicit_keep
    assert outcome("keep;") == Outcome((Kept((), 2, False),))
    assert not outcome("keep;").implicit_keep


def test_actions_say_where_they_are_in_the_script() -> None:
    found = outcome('\nfileinto "a";\n\n redirect\n"x@y.example";')
    assert found.actions == (Filed("a", (), False, 3), Redirected("x@y.example", 5))


def test_comments_and_sizes() -> None:
    script = "if size :over 100K { /* this is a comment\n this is still a comment */ discard /* this is a comment\n */ ; }"
    assert outcome(script).implicit_keep
    assert outcome(script, A + b"x" * 102_400).actions == (Discarded(3),)
    assert [true(f"size :{word} {len(A)}") for word in ("over", "under")] == [False, False]
    assert true(f"size :over {len(A) - 1}") and true(f"size :under {len(A) + 1}")


def test_if_elsif_else() -> None:
    script = (
        'if header :contains "from" "coyote" { discard; } elsif header :contains ["subject"] ["$$$"] { discard; }'
        ' else { fileinto "INBOX"; }'
    )
    assert outcome(script, A).actions == outcome(script, B).actions == (Discarded(2),)
    assert filed(script, b"Subject: x\r\n\r\n") == ["INBOX"]
    script = (
        'if header :contains ["From"] ["coyote"] { redirect "acm@example.com"; } elsif header :contains "Subject" "$$$"'
        ' { redirect "postmaster@example.com"; } else { redirect "field@example.com"; }'
    )
    assert outcome(script, A).actions == (Redirected("acm@example.com", 2),)
    assert outcome(script, B).actions == (Redirected("postmaster@example.com", 2),)
    assert outcome(script, ME).actions == (Redirected("field@example.com", 2),)


def test_fileinto_and_discard() -> None:
    assert filed('if header :contains ["from"] "coyote" { fileinto "INBOX/harassment"; }') == ["INBOX/harassment"]
    assert filed('fileinto "inbox/x";') == ["INBOX/x"]
    assert outcome('discard; fileinto "a";').actions == (Filed("a", (), False, 2),)
    assert outcome('if not address :matches "from" "*@*.org" { keep; } else { discard; }').actions == (Discarded(2),)


def test_the_extended_example() -> None:
    script = """require ["fileinto"];
if header :is "Sender" "owner-ietf-mta-filters@imc.org" { fileinto "filter"; }
elsif address :DOMAIN :is ["From", "To"] "example.com" { keep; }
elsif anyof (NOT address :all :contains ["To", "Cc", "Bcc"] "me@example.com",
             header :matches "subject" ["*make*money*fast*", "*university*dipl*mas*"]) { fileinto "spam"; }
else { fileinto "personal"; }
"""
    assert filed(script, b"Sender: owner-ietf-mta-filters@imc.org\r\n\r\n") == ["filter"]
    assert filed(script, b"From: x@example.com\r\n\r\n") == ["INBOX"]
    assert filed(script, B) == ["spam"]
    assert filed(script, b"To: me@example.com.x\r\nSubject: How to MAKE some money very fast!\r\n\r\n") == ["spam"]
    assert filed(script, b"To: me@example.com.x\r\n\r\n") == ["personal"]


def test_header_values() -> None:
    caffeine = b"X-Caffeine: C8H10N4O2\r\nX-Folded : a\r\n  b \r\nX-Twice: 1\r\nX-Twice: 2\r\nX-Word: =?utf-8?q?=C3=A4?=\r\n\r\n"
    assert not true('header :is ["X-Caffeine"] [""]', caffeine)
    assert true('header :contains ["x-caffeine"] [""]', caffeine)
    assert not true('header :contains "X-None" ""', caffeine)
    assert true('header "x-folded" "a  b"', caffeine)
    assert true('header "x-twice" "2"', caffeine)
    assert true('header "x-word" "ä"', caffeine)
    assert true('header :matches "x-word" "??"', caffeine)  # octets
    assert true('exists ["x-word", "X-TWICE"]', caffeine) and not true('exists ["x-word", "x"]', caffeine)
    assert not true('exists "x-word:"', caffeine)
    assert true('not header :matches "Cc" "?*"', b"Cc:  \r\n\r\n")


def test_address_parts() -> None:
    message = b'From: "Tim T." <tim@Example.com> (him)\r\nTo: a: b@c.example, "x y"@d.example;, root\r\n\r\n'
    assert true('address :is :all "from" "tim@example.com"', message)
    assert true('address :localpart "from" "TIM"', message) and not true('address :contains "from" "T."', message)
    assert not true('address :comparator "i;octet" "from" "tim@example.com"', message)
    assert true('address :localpart "to" "x y"', message) and true('address "to" "\\"x y\\"@d.example"', message)
    assert true('address "to" "root"', message)
    assert not true('address :localpart "to" "root"', message) and not true('address :domain "to" ""', message)
    assert not true('set "n" "subject"; if address "${n}" "x"'.partition("if ")[2], b"Subject: x\r\n\r\n")
    assert not true('address :matches "cc" "*"', message)


def test_the_envelope() -> None:
    assert true('envelope :all :is "from" "tim@example.com"', sender="tim@example.com")
    assert true('envelope :localpart "TO" "bob+x"', recipient="bob+x@b.example")
    for part in ("all", "localpart", "domain", "user", "detail"):
        assert true(f'envelope :{part} "from" ""', sender="")
    assert outcome('set "x" "y"; if envelope "${x}" "" { discard; }').error == "unknown part of the envelope"


def test_tests_are_evaluated_from_the_left_and_no_further() -> None:
    assert filed('if anyof (true, header :matches "from" "*") { fileinto "v${0}v"; }') == ["vv"]
    assert filed('if allof (header :matches "from" "c*@*", false) { keep; } else { fileinto "${1}"; }') == ["oyote"]


def test_redirects() -> None:
    assert outcome('redirect "Bart <bart@Example.com>"; redirect "bart@example.com";').actions == (
        Redirected("bart@example.com", 2),
    )
    found = outcome('redirect :copy "x@y.example"; fileinto :copy "a";')
    assert found.actions == (Filed("a", (), False, 2), Kept(), Redirected("x@y.example", 2))
    assert outcome('redirect "${1}";').error == "not an address: no address"


def test_what_fails_keeps_the_message() -> None:
    found = outcome('fileinto "a";\nredirect "x@y.example";\nfileinto "${none}";\ndiscard;')
    assert found == Outcome((Kept(),), "not the name of a mailbox: the name is empty", 4)


# Extensions


def test_variables() -> None:
    assert filed('set "a" "x"; set "b" "${A}${none}-${a"; fileinto "${b}";') == ["x-${a"]
    assert filed('set "company" "ACME"; fileinto "${BAD${Company}.${President, ${Company} Inc.}";') == [
        "${BADACME.${President, ACME Inc.}"
    ]
    assert filed('set "dollar" "$"; fileinto "regarding ${dollar}{beep}";') == ["regarding ${beep}"]
    assert filed('set "name" "Ethelbert"; fileinto "dear${hex:20 24 7b 4e}ame}";') == ["dear Ethelbert"]
    assert filed('set "fo" "x"; fileinto "${f\\o}";') == ["x"]


@pytest.mark.parametrize(
    ("modifiers", "value", "expected"),
    [
        ("", "juMBlEd lETteRS", "juMBlEd lETteRS"),
        (":length", "juMBlEd lETteRS", "15"),
        (":length", "äöü", "3"),
        (":lower", "juMBlEd Ä", "jumbled Ä"),
        (":upper", "juMBlEd ä", "JUMBLED ä"),
        (":upperfirst", "juMBlEd", "JuMBlEd"),
        (":upperfirst :lower", "juMBlEd", "Jumbled"),
        (":lowerfirst :upper", "juMBlEd", "jUMBLED"),
        (":quotewildcard", "Rock*?\\\\", "Rock\\*\\?\\\\"),
        (":length :quotewildcard", "*", "2"),
    ],
)
def test_modifiers(modifiers: str, value: str, expected: str) -> None:
    quoted = expected.replace("\\", "\\\\")
    assert filed(f'set {modifiers} "a" "{value}"; if string :comparator "i;octet" "${{a}}" "{quoted}" {{ fileinto "y"; }}') == [
        "y"
    ]


def test_match_variables() -> None:
    message = b"Subject: [acme-users] [fwd] version 1.0 is out\r\nTo: coyote@ACME.Example.COM\r\nList-ID: x <a@b>\r\n\r\n"
    assert filed('if header :matches "Subject" "[*] *" { fileinto "${1}|${02}"; }', message) == [
        "acme-users|[fwd] version 1.0 is out"
    ]
    script = 'if address :matches ["To", "Cc"] ["coyote@**.com", "wile@**.com"] { fileinto "${0}|${1}|${2}"; }'
    assert filed(script, message) == ["coyote@ACME.Example.COM||ACME.Example"]
    assert filed('if header :matches "List-ID" "*<*@*" { fileinto "lists/${2}"; }', message) == ["lists/a"]
    script = 'if header :matches "to" "*@*" { if header :matches "subject" "x*" { keep; } fileinto "${1}${9}"; }'
    assert filed(script, message) == ["coyote"]


def test_string() -> None:
    assert filed('set "s" "${s} pending"; if string :matches " ${s} " "* pending *" { fileinto "y"; }') == ["y"]
    assert true('string :count "eq" :comparator "i;ascii-numeric" ["a", "", "b"] "2"')


def test_long_values_are_cut() -> None:
    script = 'set "a" "%s"; set :length "n" "${a}"; fileinto "${n}";' % ("ä" * 5000)
    assert filed(script) == ["4000"]
    double = 'set "a" "%s";' % ("x" * 4000) + "".join('set "a" "${a}${a}${a}";' for _ in range(100))
    assert filed(double + 'set :length "n" "${a}${a}"; fileinto "${n}";') == ["8000"]
    assert filed(double + 'set :length "n" "%s"; fileinto "${n}";' % ("${a}" * 100)) == ["65536"]


def test_flags() -> None:
    def flags(script: str) -> tuple[str, ...]:
        (found,) = outcome(script).actions
        assert isinstance(found, Kept | Filed)
        return found.flags

    same = [
        '["\\\\Deleted", "\\\\Answered"]',
        '"\\\\Deleted \\\\Answered"',
        '"\\\\Deleted  \\\\ANSWERED "',
        '["\\\\Deleted","\\\\Answered",""]',
    ]
    assert {flags(f'addflag "v" {one}; keep :flags "${{v}}";') for one in same} == {("\\Deleted", "\\Answered")}
    assert flags('addflag "\\\\deleted"; addflag "x"; addflag "X \\\\Seen"; removeflag "X";') == ("\\Deleted", "\\Seen")
    assert flags('setflag "a b"; setflag "c"; fileinto "x";') == ("c",)
    assert flags('setflag "a"; keep; addflag "b";') == ("a",)
    assert flags('setflag "a"; keep :flags ""; ') == ()
    assert flags('keep :flags ["\\\\Recent", "\\\\Bogus", "(", "ä", "ok"];') == ("ok",)
    assert flags('fileinto :flags "a" "x"; fileinto :flags "b" "x";') == ("b",)
    assert len(flags("keep :flags [" + ",".join(f'"f{number}"' for number in range(1000)) + "];")) == 64


def test_hasflag() -> None:
    def has(test: str, front: str = 'setflag "A B";') -> bool:
        return filed(f'{front} if hasflag {test} {{ fileinto "yes"; }}') == ["yes"]

    junk = 'set "MyVar" "NonJunk Junk gnus-forward $Forwarded NotJunk JunkRecorded $Junk $NotJunk";'
    assert has(':is "b A"') and has('["b", "A"]') and not has('"c"')
    for test in ('"Junk"', '"forward"', '["label", "forward"]', '["junk", "forward"]', '"junk forward"', '"forward junk"'):
        assert has(f':contains "MyVar" {test}', junk)
    assert not has(':contains "MyVar" "label"', junk) and not has(':contains "MyVar" ["label1", "label2"]', junk)
    assert has(':count "ge" :comparator "i;ascii-numeric" "MyFlags" "2"', 'set "MyFlags" "A B a";')
    assert not has(':count "ge" :comparator "i;ascii-numeric" "MyFlags" "3"', 'set "MyFlags" "A B a";')


def test_the_extended_example_of_flags() -> None:
    script = """require ["fileinto", "imap4flags", "variables"];
if size :over 1M { addflag "MyFlags" "Big"; if header :is "From" "boss@company.example.com" { addflag "MyFlags" "\\\\Flagged"; }
  fileinto :flags "${MyFlags}" "Big messages"; }
if header :is "From" "grandma@example.net" { addflag "MyFlags" ["\\\\Answered", "$MDNSent"];
  fileinto :flags "${MyFlags}" "GrandMa"; }
if header :is "Sender" "owner-ietf-mta-filters@example.org" { set "MyFlags" "\\\\Flagged $Work"; keep :flags "${MyFlags}"; }
elsif anyof address :domain :is ["From", "To"] "company.example.com" { keep :flags "${MyFlags}"; }
"""
    script = script.replace(
        'anyof address :domain :is ["From", "To"] "company.example.com"', 'address :domain "from" "company.example.com"'
    )
    big = b"x" * (1 << 20)
    found = outcome(script, b"From: grandma@example.net\r\n\r\n" + big)
    assert found.actions == (
        Filed("Big messages", ("Big",), False, 3), Filed("GrandMa", ("Big", "\\Answered", "$MDNSent"), False, 5)
    )  # fmt: skip
    found = outcome(script, b"From: boss@company.example.com\r\n\r\n" + big)
    assert found.actions == (Filed("Big messages", ("Big", "\\Flagged"), False, 3), Kept(("Big", "\\Flagged"), 7, False))
    found = outcome(script, b"Sender: owner-ietf-mta-filters@example.org\r\n\r\n")
    assert found.actions == (Kept(("\\Flagged", "$Work"), 6, False),)


def test_subaddresses() -> None:
    message = b"To: ken+sieve@example.org, ann@example.org, x+@example.org\r\n\r\n"
    assert true('address :user "to" "ken"', message) and true('address :detail "to" "sieve"', message)
    assert true('address :detail :is "to" ""', message) and true('address :user "to" "ann"', message)
    assert not true('address :detail :matches "to" "*"', b"To: ann@example.org\r\n\r\n")
    assert true('address :user "to" "ken+sieve"', message, separator="") and not true(
        'address :detail "to" "sieve"', message, separator=""
    )
    assert true('address :detail "to" "y"', b"To: x-y@example.org\r\n\r\n", separator="-")


def test_relations() -> None:
    message = b"To: a@x, b@x\r\nCc: c@x\r\nReceived: 1\r\nReceived: 2\r\nX-Priority: 3\r\n\r\n"
    assert true('address :count "ge" :comparator "i;ascii-numeric" ["to", "cc"] ["3"]', message)
    assert true('header :count "eq" :comparator "i;ascii-numeric" "received" "2"', message)
    assert true('header :value "ge" :comparator "i;ascii-numeric" ["x-priority"] ["3"]', message)
    assert not true('header :value "lt" :comparator "i;ascii-numeric" "x-priority" "3"', message)
    assert true('header :count "eq" "x-none" "0"', message)


def test_mailboxes() -> None:
    assert true('mailboxexists ["a/b", "inbox"]', mailboxes=["a/b"])
    assert not true('mailboxexists ["a/b", "c"]', mailboxes=["a/b"]) and not true('mailboxexists "a//b"', mailboxes=["a//b"])
    found = outcome('fileinto :create "a"; fileinto "a";')
    assert found.actions == (Filed("a", (), True, 2),)


def test_dates() -> None:
    message = (
        b"Date: Sat, 28 Nov 2026 23:30:05 -0130\r\nReceived: by x; Thu, 1 Jan 2026 00:00:60 +0000\r\n"
        b"X: Tue, 31 Feb 2026 00:00 +0000\r\n\r\n"
    )
    parts = {
        "year": "2026", "month": "11", "day": "29", "date": "2026-11-29", "julian": "61373", "hour": "01", "minute": "00",
        "second": "05", "time": "01:00:05", "iso8601": "2026-11-29T01:00:05Z", "std11": "Sun, 29 Nov 2026 01:00:05 +0000",
        "zone": "+0000", "weekday": "0",
    }  # fmt: skip
    for part, value in parts.items():
        assert true(f'date "date" "{part}" "{value}"', message)
    assert true('date :originalzone "date" "iso8601" "2026-11-28T23:30:05-01:30"', message)
    assert true('date :zone "-1000" "DATE" "Date" "2026-11-28"', message)
    assert true('date "received" "iso8601" "2026-01-01T00:00:59Z"', message)
    assert not true('date :matches "x" "year" "*"', message) and not true('date :matches "none" "year" "*"', message)
    assert true('date :count "eq" "x" "year" "0"', message)
    for value in (
        b"Mon, 1 Jan 10000 00:00:00 +0000",
        b"Mon, 1 Jan 0001 00:00:00 +1400",
        b"x" * 100000,
        b"1 Jan 1 0:0 +9999",
        b"\xff",
    ):
        assert not true('date :matches :zone "-2300" "date" "year" "2026"', b"Date: %b\r\n\r\n" % value)


def test_now() -> None:
    assert true('currentdate "iso8601" "2026-11-28T05:00:00Z"') and true('currentdate :zone "+0530" "time" "10:30:00"')
    assert filed(
        'if currentdate :matches "month" "*" { set "month" "${1}"; } if currentdate :matches "year" "*" { set "year" "${1}"; }'
        ' fileinto "${month}-${year}";'
    ) == ["11-2026"]
    assert true('allof(currentdate :value "ge" "date" "2026-11-28", currentdate :value "le" "date" "2026-11-28")')


OUTER = b"""From: Whomever
To: Someone
Content-Type: multipart/mixed; boundary=outer

& This is a multi-part message in MIME format.

--outer
Content-Type: multipart/alternative; boundary=inner

& This is a nested multi-part message in MIME format.

--inner
Content-Type: text/plain; charset="us-ascii"

$ Hello

--inner
Content-Type: text/html; charset="us-ascii"

% <html><body>Hello</body></html>

--inner--

& This is the end of the inner MIME multipart.

--outer
Content-Type: message/rfc822

From: Someone Else
Subject: ! hello request

$ Please say Hello

--outer--

& This is the end of the outer MIME multipart.
""".replace(b"\n", b"\r\n")


@pytest.mark.parametrize(  # RFC 5173 5.2
    ("types", "found"),
    [("multipart", "&"), ("text/plain", "$"), ("text/html", "%"), ("text", "$%"), ("message/rfc822", "!"), ("", "&$%!"),
     ("text/", ""), ("/plain", ""), ("text/plain/x", ""), ("TEXT/Plain", "$")],
)  # fmt: skip
def test_the_parts_of_a_body(types: str, found: str) -> None:
    assert "".join(mark for mark in "&$%!" if true(f'body :content "{types}" :contains "{mark} "', OUTER)) == found
    assert not true(f'body :content "{types}" :contains "boundary"', OUTER)


def test_containers_are_in_two_pieces() -> None:
    pieces = [
        "& This is a multi*",
        "*& This is a nested*",
        "*& This is the end of the inner*",
        "*& This is the end of the outer*",
    ]
    for piece in pieces:
        assert true(f'body :content "multipart" :matches "{piece}"', OUTER)
    assert not true('body :content "multipart" :matches "*multi-part*end*"', OUTER) and not true(
        'body :content "" :contains "--"', OUTER
    )


def test_the_body_as_it_is() -> None:
    encoded = b"Content-Transfer-Encoding: quoted-printable\r\n\r\nMAKE=20MONEY\r\nF=\r\nAST\r\n"
    assert true('body :contains "make money\r\nfast"', encoded) and true('body :raw :contains "MAKE=20"', encoded)
    assert not true('body :raw :contains "make money"', encoded)
    assert true('body :text :matches "*\nFAST*"', encoded)
    for header_only in (b"Subject: x\r\n", b"Subject: x", b""):
        assert not true('body :contains ""', header_only) and not true('body :raw :contains ""', header_only)
    assert true('body :raw :is ""', b"Subject: x\r\n\r\n") and true('body :contains ""', b"Subject: x\r\n\r\n")


def test_refusals() -> None:
    for word in ("reject", "ereject"):
        assert outcome(f'{word} "no";').actions == (Rejected(b"no", 2),)
        assert outcome(f'{word} "no";', sender="").actions == (Discarded(2),)
        assert outcome(f'discard; {word} "no";').actions == (Rejected(b"no", 2),)
        assert outcome(f'{word} "no"; reject "no";').error
        for other in ("keep;", 'fileinto "a";', 'redirect :copy "a@b.example";', 'vacation "x";'):
            assert outcome(f'{word} "no"; {other}').actions == outcome(f'{other} {word} "no";').actions == (Kept(),)


# vacation


def reply(script: str = 'vacation "away";', message: bytes = ME, **more: object) -> Answered | str:
    """The reply to a message, or why there is none."""
    found = outcome(script, message + b"\r\n", **more)  # type: ignore[arg-type]
    assert not found.error and found.implicit_keep
    if found.notes:
        assert len(found.actions) == 1
        return found.notes[0][1]
    return found.actions[-1]  # type: ignore[return-value]


def test_a_reply() -> None:
    found = reply('vacation :days 23 :addresses ["tjs@example.edu"] "I\'m away";')
    assert isinstance(found, Answered) and len(found.key) == 16
    assert found._replace(key=b"") == Answered(
        "ann@a.example", ("", "bob@b.example"), "Auto: hi", b"I'm away", False, 23, b"", b"<1@a.example>", (b"<1@a.example>",), 2
    )


def test_what_a_reply_says() -> None:
    def said(script: str, message: bytes = ME) -> Answered:
        found = reply(script, message)
        assert isinstance(found, Answered)
        return found

    assert [said(f'vacation :days {days} "x";').days for days in (0, 1, 365, 400)] == [1, 1, 365, 365]
    assert said('vacation "x";').days == 7
    assert said('vacation :subject "S\nx" :mime "y";')[2:5] == ("S x", b"y", True)
    assert said('vacation "x";', ME.replace(b"Subject: hi", b"Subject: =?utf-8?q?=C3=A4?=")).subject == "Auto: ä"
    assert said('vacation "x";', ME.replace(b"Subject: hi\r\n", b"")).subject == "Automated reply"
    assert said('vacation :from "Bob B <BOB@b.example>" "x";').sender == ("Bob B", "BOB@b.example")
    assert said('vacation :from "boss@b.example" "x";').sender == ("", "bob@b.example")
    assert said('if header :matches "subject" "*" { vacation :subject "Re: ${1}" "${1}"; }')[2:4] == ("Re: hi", b"hi")
    found = said('vacation "x";', ME + b"References: <a@b> junk\r\n <c@d>\r\nIn-Reply-To: <e@f>\r\n")
    assert found.references == (b"<a@b>", b"<c@d>", b"<1@a.example>")
    found = said('vacation "x";', ME + b"References: " + b"".join(b"<%d@b>\r\n " % number for number in range(5000)) + b"\r\n")
    assert (
        len(found.references) == 20
        and found.references[0] == b"<0@b>"
        and found.references[-2:] == (b"<4999@b>", b"<1@a.example>")
    )
    assert said('vacation "x";', ME.replace(b"<1@a.example>", b"<x y>"))[7:9] == (b"", ())


@pytest.mark.parametrize(
    ("field", "why"),
    [
        (b"Auto-Submitted: auto-replied", "Auto-Submitted"),
        (b"Auto-Submitted: no", ""),
        (b"Auto-Submitted: No ; x=y", ""),
        (b"Auto-Submitted:", "Auto-Submitted"),
        (b"Precedence: Bulk", "Precedence"),
        (b"Precedence: list", "Precedence"),
        (b"Precedence: junk", "Precedence"),
        (b"Precedence: first-class", ""),
        (b"List-Id: <x.example>", "mailing list"),
        (b"list-unsubscribe: <x>", "mailing list"),
        (b"List-Post: x", "mailing list"),
        (b"Listing: x", ""),
    ],
)
def test_messages_that_get_no_reply(field: bytes, why: str) -> None:
    found = reply(message=ME + field + b"\r\n")
    assert why in found if why and isinstance(found, str) else (not why and isinstance(found, Answered))


@pytest.mark.parametrize(
    "sender",
    ["", "bob@b.example", "BOB@B.example", "bob+x@b.example", "MAILER-DAEMON@a.example", "owner-x@a.example",
     "x-request@a.example", "listserv@a.example", "Majordomo@a.example"],
)  # fmt: skip
def test_senders_that_get_no_reply(sender: str) -> None:
    assert isinstance(reply(sender=sender, recipient="bob+x@b.example"), str)


def test_only_messages_to_the_user_get_a_reply() -> None:
    def replies(header: bytes, script: str = 'vacation "x";', **more: object) -> bool:
        return isinstance(reply(script, b"From: ann@a.example\r\n" + header + b"\r\n", **more), Answered)

    for name in (b"To", b"Cc", b"Bcc", b"Resent-To", b"Resent-Cc", b"Resent-Bcc"):
        assert replies(name + b": x@y.example, team: Bob <Bob@B.Example>;")
    for header in (
        b"From: bob@b.example",
        b"To: bob@x.example",
        b"To: undisclosed-recipients:;",
        b"To: bob@b.example <x@y.example>",
    ):
        assert not replies(header)
    assert not replies(b"To: bob@home.example") and replies(
        b"To: bob@home.example", 'vacation :addresses "BOB@home.example" "x";'
    )
    assert replies(b"To: bob@home.example", addresses=("bob@b.example", "bob@home.example"))
    assert replies(b"To: bob+x@b.example", recipient="bob+x@b.example") and replies(
        b"To: bob@b.example", recipient="bob+x@b.example"
    )
    assert replies(b"To: bob@b.example", recipient="bob+x@b.example", addresses=())


def test_one_reply_a_script() -> None:
    assert outcome('vacation "a"; vacation "b";').error == "vacation twice"


def test_replies_and_other_actions() -> None:
    found = outcome('discard; vacation "x";', ME)
    assert [type(one) for one in found.actions] == [Answered, Discarded]
    found = outcome('redirect "x@y.example"; vacation "x";', ME)
    assert [type(one) for one in found.actions] == [Redirected, Answered]


# Loops and bounds


def test_loops() -> None:
    found = outcome('redirect "x@y.example";', ME + b"Delivered-To: Bob@B.example\r\n\r\n")
    assert found == Outcome((Kept(),), loop="it was delivered to bob@b.example before")
    assert not outcome("", ME + b"Delivered-To: eve@b.example\r\n\r\n").loop
    for before in (b"bob+1@b.example", b"robert@b.example", b"<robert+1@B.example>"):
        message = ME + b"Delivered-To: %b\r\n\r\n" % before
        assert outcome("discard;", message, recipient="bob+2@b.example", addresses=["robert@b.example"]).loop
    assert not outcome("", ME + b"Delivered-To: bob+1@b.example\r\n\r\n", recipient="bob+2@b.example", separator="").loop
    found = outcome("discard;", ME + b"Delivered-To: eve@b.example\r\n" * 51 + b"\r\n")
    assert found == Outcome((Kept(),), loop="it has 51 Delivered-To fields")
    found = outcome('redirect "x@y.example";', ME + b"Received: x\r\n" * 51 + b"\r\n")
    assert found == Outcome((Kept(),), loop="it has 51 Received fields")
    assert not outcome("", ME + b"Received: x\r\n" * 50 + b"\r\n").loop


def test_what_is_counted_costs() -> None:
    people = b"To: " + b"a@b.example," * 2000 + b"c@b.example\r\n\r\n"
    assert outcome('if address :count "lt" "to" "1" { discard; }' * 10, people).error == ""
    assert outcome('if address :count "lt" "to" "1" { discard; }' * 100, people).error == "too much has to be compared"


def test_numbers_of_actions() -> None:
    def many(number: int, form: str) -> str:
        return outcome("".join(form % place for place in range(number))).error

    assert many(4, 'redirect "x%d@y.example";') == "" and many(5, 'redirect "x%d@y.example";') == "more than 4 redirects"
    assert many(10, 'fileinto "x%d";') == "" and many(11, 'fileinto "x%d";') == "more than 10 mailboxes"
    assert many(10, 'fileinto "x%d"; keep; fileinto "x0";') == ""


def test_steps() -> None:
    assert outcome("keep;" * 10_000).error == ""
    found = outcome("keep;" * 9_999 + "\nif true { discard; }")
    assert found == Outcome((Kept(),), "more than 10000 commands and tests", 3)


@pytest.mark.parametrize(
    "script",
    [
        'if body :matches "%s" { discard; }' % ("*a" * 20000),
        'if body :matches "%s" { discard; }' % ("*a?a" * 10000),
        "if body :contains [" + ",".join(f'"x{number}"' for number in range(7000)) + "] { discard; }",
        'if header :matches "subject" "%s" { discard; }' % ("*a" * 20000 + "b"),
        'if header :contains ["x"%s] "y" { discard; }' % (',"x"' * 15000),
        'if address :contains "to" [' + ",".join(f'"x{number}"' for number in range(7000)) + "] { discard; }",
        'if header :matches "subject" "*" { set "a" "${1}"; } if string :contains ['
        + ",".join(['"${a}${a}${a}${a}"'] * 2000)
        + '] "x" { discard; }',
        'set "a" "%s"; ' % ("x " * 2000) + "if hasflag [" + ",".join(['"a"'] * 10_000) + '] "y" { discard; }',
        'set "a" "%s"; ' % ("x " * 2000) + 'addflag "a" "${a}";' * 2500,
        'set "a" "%s"; ' % ("( " * 2000) + 'keep :flags "${a}";' * 2500,
    ],
)
def test_hostile_scripts_end(script: str) -> None:
    message = b"Subject: %b\r\nTo: %b\r\n\r\n%b" % (b"a" * 100_000, b"a@b, " * 10_000, b"a" * 1_000_000)
    found = outcome(script[: SCRIPT_MOST - 400], message)
    assert found.actions in ((Kept(),), (Discarded(2),)) and found.error in ("", "too much has to be compared")


def test_messages_of_many_parts() -> None:
    message = b"Content-Type: multipart/mixed; boundary=x\r\n\r\n" + b"--x\r\n\r\na\r\n" * 9_999 + b"--x--\r\n"
    assert outcome('if body :contains "b" { discard; }', message).implicit_keep
    script = "if anyof(" + ",".join(['body :content "image" "b"'] * 2_000) + ") { discard; }"
    assert outcome(script, message).error == "too much has to be compared"


def test_the_body_is_taken_apart_once(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def counted(name: str) -> None:
        made = getattr(sieve_message, name)
        monkeypatch.setattr(sieve_message, name, lambda *arguments: (done.append(name), made(*arguments))[1])

    for name in ("scan", "part_text", "header_text"):
        counted(name)
    tests = ['body :content "image" "b"', 'body :raw "b"', 'body :contains "b"', 'header "subject" "b"']
    outcome(f"if anyof({','.join(tests * 10)}) {{ discard; }}", ME + b"\r\na\r\n")
    assert sorted(done) == ["header_text", "part_text", "scan"]


@given(st.binary(max_size=300))
def test_any_message_has_an_outcome(data: bytes) -> None:
    script = """if anyof(header :matches "from" "*@*", address :detail "to" "x", body :content "" :contains "y", exists "a",
    date :originalzone "date" "year" "2000", body :raw :is "z") { fileinto "${1}"; } vacation :subject "${0}" "x";
    reject "${2}";"""
    found = outcome(script, b"From: " + data)
    assert found.actions
