"""Two other implementations: what our interpreter does with a message is what Pigeonhole does, over a table of scripts and
messages; what `sievelib` accepts we accept, and what we refuse it refuses, but for what is listed."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sievelib.parser import Parser

from tests.proto.sieve_oracle import REFUSED, Pigeonhole, ours
from tests.support.programs import need

REQUIRE = (
    b'require ["fileinto","reject","envelope","copy","vacation","imap4flags","subaddress","relational",'
    b'"comparator-i;ascii-numeric","mailbox","body","encoded-character","variables","date"];\n'
)

PLAIN = b"""From: Ann Lee <ann@a.example>
To: bob@b.example, "Eve, M." <eve+work@c.example>
Cc: team: dan@D.example, kim@d.example;
Subject: [acme-users] [fwd] version 1.0 is out
X-Priority: 3
X-Empty:
Date: Sat, 28 Nov 2026 05:06:07 +0130
Message-ID: <1@a.example>

Hello $$$ world
"""
ENCODED = b"""From: =?utf-8?q?J=C3=BCrgen?= <juergen@a.example>
To: bob+lists@b.example
Subject: =?iso-8859-1?q?caf=E9_?= =?utf-8?b?4oKsIDEwMA==?=
 folded  line
List-Id: Users of ACME <users.acme.example>
Received: from x by y; Thu, 1 Jan 2026 00:00:00 +0000
Received: from z by x; Wed, 31 Dec 2025 23:59:59 -0500
X-Number: 0042abc
Date: nonsense

body
"""
MIME = b"""From: ann@a.example
To: undisclosed-recipients:;
Subject: parts
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=outer

prologue MIME
--outer
Content-Type: multipart/alternative; boundary=inner

inner prologue MIME
--inner
Content-Type: text/plain; charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable

Hello caf=E9 miss=
ile
--inner
Content-Type: text/html; charset="us-ascii"

<html><body>Hello</body></html>
--inner--

end of inner
--outer
Content-Type: audio/mp3
Content-Transfer-Encoding: base64

aGVsbG8gbXVzaWM=
--outer--

epilogue
"""
BARE = b"Subject: only\nFrom: \n"
MESSAGES = {
    "plain": PLAIN.replace(b"\n", b"\r\n"),
    "encoded": ENCODED.replace(b"\n", b"\r\n"),
    "mime": MIME.replace(b"\n", b"\r\n"),
    "bare": BARE.replace(b"\n", b"\r\n"),
}

# Tests: each is tried as `if TEST { fileinto "yes"; }`.
TESTS = r"""
header :contains "subject" "ACME"
header :contains :comparator "i;octet" "subject" "ACME"
header :is "subject" "only"
header :matches "subject" "[*] *"
header :matches "subject" "?*"
header :matches "subject" "*1.0*"
header :matches "subject" "*1\\.0*"
header :matches "subject" "\\[acme*"
header :matches "subject" "*v?rs??n*o*"
header :matches "subject" ["x", "*out"]
header :matches "X-Empty" ""
header :contains "X-Empty" ""
header :is ["x-empty", "x-none"] ""
header :contains "x-none" ""
header :matches "cc" "?*"
header :contains "subject" "café"
header :contains "subject" "€ 100 folded"
header :matches "subject" "caf?? *"
header :is "subject" "café € 100 folded  line"
header :contains ["from", "to"] "jürgen"
header :contains "list-id" ""
header :is "from:" ""
not header :is "from" ""
exists "from"
exists ["from", "subject"]
exists ["from", "x-none"]
exists "FROM"
size :over 200
size :under 200
size :over 1K
size :under 1M
address "from" "ann@a.example"
address :is :localpart ["from", "to"] ["eve+work", "x"]
address :domain "to" "C.EXAMPLE"
address :all :contains "cc" "dan"
address :domain :is "cc" "d.example"
address :matches "to" "*@b.example"
address :user "to" "eve"
address :detail "to" "work"
address :detail "to" ""
address :detail :matches "to" "*"
address :localpart "from" ""
address :contains "from" ""
address :count "eq" :comparator "i;ascii-numeric" ["to", "cc"] "4"
address :count "ge" :comparator "i;ascii-numeric" "to" ["1", "2"]
envelope "from" "ann@a.example"
envelope :localpart "to" "bob+lists"
envelope :user "to" "bob"
envelope :detail "to" "lists"
envelope :domain "from" "b.example"
envelope :all :contains ["to", "from"] "@b."
header :count "gt" :comparator "i;ascii-numeric" "received" "1"
header :count "eq" :comparator "i;ascii-numeric" "received" "0"
header :count "lt" :comparator "i;ascii-numeric" ["subject", "x-none"] "2"
header :value "lt" :comparator "i;ascii-numeric" "x-priority" "10"
header :value "gt" "x-priority" "10"
header :value "eq" :comparator "i;ascii-numeric" "x-number" "42"
header :is :comparator "i;ascii-numeric" "x-number" "42"
header :is :comparator "i;ascii-numeric" "subject" "xyz"
header :value "ge" :comparator "i;ascii-numeric" "subject" "1"
header :value "ne" "subject" "parts"
allof (true, exists "from", not false)
anyof (false, exists "x-none")
not allof (false)
body :contains "hello"
body :contains "missile"
body :raw :contains "miss="
body :raw :contains "missile"
body :content "text/html" :contains "html"
body :content "text/plain" :contains "html"
body :content "text" :contains "café"
body :content "audio/mp3" :contains ""
body :content "audio" :contains "music"
body :content "image" :contains ""
body :content ["image", "text/html"] :contains "hello"
body :content "multipart/" :contains ""
body :contains ""
body :raw :contains ""
body :raw :is "x"
body :raw :matches "*world*"
date :originalzone "date" "hour" "05"
date :zone "+0000" "date" "hour" "03"
date :zone "-0800" "date" "date" "2026-11-27"
date :value "ge" :zone "+0000" "date" "year" "2026"
date :originalzone "date" "weekday" "6"
date :originalzone "date" "iso8601" "2026-11-28T05:06:07+01:30"
date :originalzone "date" "std11" "Sat, 28 Nov 2026 05:06:07 +0130"
date :originalzone "date" "zone" "+0130"
date :zone "+0000" "date" "julian" "61372"
date :zone "+0000" "received" "date" "2026-01-01"
date :zone "+0000" "received" "time" "00:00:00"
date :zone "+0000" "received" "iso8601" "2026-01-01T00:00:00Z"
date :count "eq" :comparator "i;ascii-numeric" "date" "year" "1"
date :originalzone :matches "date" "minute" "0?"
currentdate :value "gt" "year" "2020"
currentdate :zone "+0100" "zone" "+0100"
currentdate :count "eq" :comparator "i;ascii-numeric" "year" "1"
string "a" "A"
string :is :comparator "i;octet" "a" "A"
string :count "eq" :comparator "i;ascii-numeric" ["a", "", "b"] "2"
string :matches "${none}" ""
hasflag "x"
hasflag :count "eq" :comparator "i;ascii-numeric" "0"
mailboxexists "INBOX"
mailboxexists "no such"
header :contains "subject" "${hex: 5b}acme"
header :contains "subject" "${unicode:20AC}"
header :contains "subject" "${hex:4${hex:30}}"
true
false
""".strip().split("\n")

# Whole scripts, behind REQUIRE.
SCRIPTS = r"""
keep;

discard;

stop;

fileinto "a";

fileinto "a"; fileinto "a";

fileinto "INBOX";

keep; fileinto "a"; keep;

fileinto :copy "a";

fileinto :create "a"; fileinto "a";

fileinto :flags "\\Seen" "a"; fileinto :flags ["x", "y"] "a";

keep :flags "\\Seen \\seen x";

addflag "\\Flagged"; addflag ["x y", "x"]; removeflag "X"; fileinto "a";

setflag "a"; setflag "b c"; keep;

setflag "\\Recent \\Bogus ok";

addflag "v" "\\Deleted"; addflag "v" ["\\Answered", ""]; fileinto :flags "${v}" "a";

set "v" "A B"; if hasflag :count "ge" :comparator "i;ascii-numeric" "v" "2" { fileinto "two"; }

setflag "A B"; if hasflag :is "b A" { fileinto "is"; } if hasflag ["b", "c"] { fileinto "list"; }

set "v" "NonJunk Junk gnus-forward"; if hasflag :contains "v" "forward" { fileinto "y"; }
if hasflag :contains "v" "label" { fileinto "n"; }

redirect "x@y.example";

redirect "Some Body <x@y.example>"; redirect "x@y.example";

redirect :copy "x@y.example";

redirect "x@y.example"; discard;

reject "no";

reject "no"; keep;

keep; reject "no";

reject "no"; reject "no";

reject "no"; vacation "x";

fileinto "a"; discard;

vacation "away";

vacation "away"; vacation "away";

vacation :days 3 :subject "s" :from "bob@b.example" :addresses ["x@y.example"] :handle "h" "away";

if true { stop; } keep; fileinto "a";

if false { fileinto "a"; } elsif true { fileinto "b"; } else { fileinto "c"; }

if true { if false { fileinto "a"; } else { fileinto "b"; } } else { fileinto "c"; }

if header :matches "subject" "[*] *" { fileinto "${1}-${2}"; }

if header :matches "list-id" "*<*@*" { fileinto "x${2}"; } elsif header :matches "list-id" "*<*>*" { fileinto "l-${2}"; }

if address :matches ["to", "cc"] ["eve@**.example", "dan@**.example"] { fileinto "m-${1}-${2}-${0}"; }

if header :matches "subject" "*ac?e*" { set "x" "${2}${1}${3}"; fileinto "v${x}"; }

if anyof (true, header :matches "subject" "*") { fileinto "v${0}v"; }

set "a" "juMBlEd lETteRS"; set :length "b" "${a}"; set :lower "c" "${a}"; set :upperfirst "d" "${a}";
set :upperfirst :lower "e" "${a}"; set :quotewildcard "f" "Rock?";
if string "${b}/${c}/${d}/${e}/${f}"
  "15/jumbled letters/JuMBlEd lETteRS/Jumbled letters/Rock\\?" { fileinto "all"; }

set "a" "x"; fileinto "${A}${b}-${c.d";

set "dollar" "$"; set "text" "regarding ${dollar}{beep}"; fileinto "${text}";

set :length "n" "äöü"; fileinto "n${n}";

set "state" "${state} pending"; if string :matches " ${state} " "* pending *" { fileinto "y"; }

if header :contains "subject" "dear${hex:20 24 7b 4e}ame}" { keep; } else { fileinto "no"; }

if currentdate :matches "month" "*" { set "month" "${1}"; }
if currentdate :matches "year" "20*" { fileinto "y${month}"; discard; }

fileinto "ä";

redirect "no address";

redirect "${none}";

if header :regex "subject" "x" { keep; }
""".strip().split("\n\n")
SCRIPTS.append("vacation :mime text:\nContent-Type: text/html\n\n<b>away</b>\n..\n.\n;")

INVALID = r"""
foo;
keep
keep "x";
fileinto;
fileinto "a" "b";
fileinto 1;
fileinto :copy :copy "a";
fileinto :flags "a";
if { keep; }
if true keep;
if true { keep; } else true { keep; }
elsif true { keep; }
keep; else { keep; }
if true { keep; } keep; else { keep; }
if not { keep; }
if anyof true { keep; }
if anyof () { keep; }
if not (true) { keep; }
if keep { keep; }
header "a" "b";
if header "a" { keep; }
if header "a" "b" "c" { keep; }
if header :is :contains "a" "b" { keep; }
if header :comparator "i;bogus" "a" "b" { keep; }
if header :comparator "i;ascii-numeric" :contains "a" "1" { keep; }
if header :value "a" "b" { keep; }
if header :value "zz" "a" "b" { keep; }
if header :bogus "a" "b" { keep; }
if header ["a" "b"] "b" { keep; }
if header [] "b" { keep; }
if address "subject" "b" { keep; }
if address :all :domain "from" "b" { keep; }
if envelope "bogus" "b" { keep; }
if size 100 { keep; }
if size :over :under 100 { keep; }
if size :over "100" { keep; }
if exists { keep; }
if body :raw :text "x" { keep; }
if date :zone "+0000" :originalzone "date" "hour" "x" { keep; }
if currentdate :originalzone "hour" "x" { keep; }
set "a b" "x";
set "1" "x";
set "a.b" "x";
set :lower :upper "a" "b";
set "${a}" "b";
set "a" "${unicode:200000}";
set "a" "${unicode:DF01}";
vacation;
vacation :days "x" "y";
vacation :bogus "y";
vacation :from "not an address" "y";
redirect "no address";
redirect "a@b.example, c@d.example";
setflag;
reject;
require "fileinto"; keep; require "copy";
require "bogus";
require "FILEINTO";
"unterminated
/* unterminated
keep; }
if true { keep;
keep;;
stop stop;
fileinto "a", "b";
12;
:tag;
""".strip().split("\n")


# What we refuse and Pigeonhole takes: names of mailboxes and parts of dates that there are not, namespaces (RFC 5229 3: MUST).
STRICTER = r"""
fileinto "a//b";
fileinto "a*";
if date :zone "bogus" "date" "hour" "x" { keep; }
if date "date" "bogus" "x" { keep; }
set "a" "${a.b}";
""".strip().split("\n")

# Where we differ: the comparator of `string` is i;ascii-casemap by default (RFC 5228 2.7.3); what has no address in it has none.
DIFFERENT = {
    'string "a" "A"', 'address :count "ge" :comparator "i;ascii-numeric" "to" ["1", "2"]', 'address :localpart "from" ""',
    'address :contains "from" ""',
}  # fmt: skip
AT_ONCE = 50  # tests in one script

# What sievelib takes though we refuse it: it does not look at what strings name, nor where `require` and `else` are.
SIEVELIB_TAKES = (
    'if true { keep; } else true { keep; }', "set ", 'if address "subject"', "if envelope", 'vacation :from "not', "redirect ",
    "require ", "fileinto ", "if date ",
)  # fmt: skip


@pytest.fixture(scope="module")
def pigeonhole() -> Iterator[Pigeonhole]:
    program = need("sieve-test")
    with tempfile.TemporaryDirectory(prefix="sieve-") as folder:
        Path(folder).chmod(0o755)
        yield Pigeonhole(program, Path(folder))


@pytest.mark.parametrize("name", MESSAGES)
def test_tests_are_as_true_as_they_are_for_pigeonhole(pigeonhole: Pigeonhole, name: str) -> None:
    message = MESSAGES[name]
    for start in range(0, len(TESTS), AT_ONCE):
        tests = TESTS[start : start + AT_ONCE]
        script = REQUIRE + b"".join(b'if %b { addflag "t%d"; }\n' % (one.encode(), place) for place, one in enumerate(tests))
        expected, found = pigeonhole.actions(script, message), ours(script, message)
        assert _true(tests, found) ^ _true(tests, expected) <= DIFFERENT


def _true(tests: list[str], found: object) -> set[str]:
    """Which of the tests are true, by the flags of what is stored."""
    assert isinstance(found, set), found
    ((_, _, flags, _),) = found
    return {test for place, test in enumerate(tests) if f"t{place}" in flags}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_do_what_they_do_for_pigeonhole(pigeonhole: Pigeonhole, script: str) -> None:
    text = REQUIRE + script.encode() + b"\n"
    for message in MESSAGES.values():
        assert ours(text, message) == pigeonhole.actions(text, message)


@pytest.mark.parametrize("script", INVALID)
def test_scripts_are_refused_that_pigeonhole_refuses(pigeonhole: Pigeonhole, script: str) -> None:
    text = REQUIRE + script.encode() + b"\n"
    assert ours(text, MESSAGES["plain"]) == pigeonhole.actions(text, MESSAGES["plain"])


@pytest.mark.parametrize("script", STRICTER)
def test_scripts_are_refused_that_pigeonhole_takes(pigeonhole: Pigeonhole, script: str) -> None:
    text = REQUIRE + script.encode() + b"\n"
    assert ours(text, MESSAGES["plain"]) == REFUSED
    assert pigeonhole.actions(text, MESSAGES["plain"]) != REFUSED


def _sievelib(script: bytes) -> bool:
    """Whether sievelib takes a script."""
    return bool(Parser().parse(script))


@pytest.mark.parametrize("script", [*SCRIPTS, *(f"if {test} {{ keep; }}" for test in TESTS)])
def test_what_sievelib_takes_we_take(script: str) -> None:
    text = REQUIRE + script.encode() + b"\n"
    assert not _sievelib(text) or ours(text, MESSAGES["plain"]) != REFUSED or script == 'redirect "no address";'


@pytest.mark.parametrize("script", [*INVALID, *STRICTER])
def test_what_we_refuse_sievelib_refuses(script: str) -> None:
    text = REQUIRE + script.encode() + b"\n"
    assert ours(text, MESSAGES["plain"]) == REFUSED
    assert not _sievelib(text) or script.startswith(SIEVELIB_TAKES) or script == "keep"
