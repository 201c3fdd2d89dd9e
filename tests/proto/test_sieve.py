"""The Sieve language: what is a script, and where and why another text is none (RFC 5228 8 and the extensions)."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto import sieve
from relaymta.proto.sieve import EXTENSIONS, SCRIPT_MOST, Script, SieveError
from relaymta.proto.sieve_program import BodyTest, Constant, Fileinto, HeaderTest, If, Keep, Not, Vacation
from relaymta.proto.sieve_strings import Text

REQUIRE = b"require [%b];\n" % b",".join(b'"%b"' % one.encode() for one in EXTENSIONS)


def error(text: str | bytes) -> str:
    """Why a text is no script, as it is shown."""
    with pytest.raises(SieveError) as caught:
        sieve.compile(text if isinstance(text, bytes) else text.encode())
    one = caught.value
    assert str(one) == f"line {one.line}:{one.column}: {one.what}"
    return str(one)


def compiled(text: bytes) -> Script:
    """A script that names all extensions."""
    return sieve.compile(REQUIRE + text)


def strings(text: bytes) -> list[bytes]:
    """The keys of the test in `if header "a" TEXT { keep; }`, as they are compiled."""
    (command,) = compiled(b'if header "a" ' + text + b" { keep; }").block
    assert isinstance(command, If)
    test = command.branches[0][0]
    assert isinstance(test, HeaderTest)
    return [key.raw for key in test.match.keys]


# Words


def test_comments_and_white_space_are_between_all_words() -> None:
    text = b'\xef\xbb\xbfrequire/* a * / */"fileinto"#x\r\n;\tif not/**/true{keep;}else{FILEINTO\n"a"/*"*/;}# end'
    assert sieve.compile(text).block == (
        If(((Not(Constant(True)), (Keep(None, 2),)), (Constant(True), (Fileinto(Text(b"a"), None, False, False, 2),))), 2),
    )


def test_an_empty_script_is_one() -> None:
    assert sieve.compile(b"") == Script((), frozenset(), False)
    assert sieve.compile(b"# nothing") == Script((), frozenset(), False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'"a\\"b\\\\c\\d"', b'a"b\\cd'),
        (b'"two\nlines\r\n"', b"two\r\nlines\r\n"),
        (b'"\xff"', b"\xff"),
        (b"text:\na\n..b\n.c\n.\n", b"a\r\n.b\r\n.c\r\n"),
        (b"TEXT: \t# comment\r\n.\r\n", b""),
        (b"text:\r\n. \r\n..\r\n.\r\n", b". \r\n.\r\n"),
    ],
)
def test_strings(text: bytes, value: bytes) -> None:
    assert strings(text) == [value]


@pytest.mark.parametrize(  # RFC 5228 2.4.2.4
    ("text", "value"),
    [
        (b"$${hex:40}", b"$@"),
        (b"${hex: 40 }", b"@"),
        (b"${HEX: 40}", b"@"),
        (b"${hex:40", b"${hex:40"),
        (b"${hex:400}", b"${hex:400}"),
        (b"${hex:4${hex:30}}", b"${hex:40}"),
        (b"${unicode:40}", b"@"),
        (b"${ unicode:40}", b"${ unicode:40}"),
        (b"${UNICODE:40}", b"@"),
        (b"${UnICoDE:0000040}", b"@"),
        (b"${Unicode:40}", b"@"),
        (b"${Unicode:Cool}", b"${Unicode:Cool}"),
        (b"${unicode: 20AC 41\r\n}", "€A".encode()),
        (b"$${hex:24 24}", b"$$$"),
        (b"${hex:ff 0}", b"\xff\0"),
        (b"${unicode:D7FF E000 10FFFF}", "\ud7ff\ue000\U0010ffff".encode()),
    ],
)
def test_encoded_characters(text: bytes, value: bytes) -> None:
    assert strings(b'"' + text + b'"') == [value]


def test_encoded_characters_are_none_without_the_extension() -> None:
    (command,) = sieve.compile(b'if header "a" "${hex:40}" { keep; }').block
    assert b"${hex:40}" in repr(command).encode()


def test_numbers_have_multiples() -> None:
    for text, value in ((b"5", 5), (b"1k", 1024), (b"2M", 2 << 20), (b"3G", 3 << 30), (b"0007", 7)):
        (command,) = sieve.compile(b"if size :over " + text + b" { keep; }").block
        assert f"limit={value})" in repr(command)


# What is no script


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('\n\n             filinto "x";', 'line 3:14: unknown command "filinto" (did you mean "fileinto"?)'),
        ('if heder "a" "b" { keep; }', 'line 1:4: unknown test "heder" (did you mean "header"?)'),
        ('if header "é" :is "b" { keep; }', 'line 1:15: ":is" has to be in front of the other arguments of "header"'),
        ('fileinto "a";', 'line 1:1: "fileinto" needs require "fileinto"'),
        ('require "fileinto";\nfileinto :copy "a";', 'line 2:10: ":copy" needs require "copy"'),
        ('if header :count "ge" "a" "1" { keep; }', 'line 1:11: ":count" needs require "relational"'),
        ('if address :user "to" "x" { keep; }', 'line 1:12: ":user" needs require "subaddress"'),
        ('require "filinto";', 'line 1:9: unknown extension "filinto" (did you mean "fileinto"?)'),
        ('require "vacation-seconds";', 'line 1:9: unknown extension "vacation-seconds" (did you mean "vacation"?)'),
        ('keep; require "copy";', 'line 1:7: "require" has to be in front of all other commands'),
        ('header "a" "b";', 'line 1:1: "header" is a test, not a command: "if" is missing'),
        ("keep", 'line 1:5: expected ";", found the end of the script'),
        ("keep }", 'line 1:6: expected ";", found "}"'),
        ("if true { keep;", 'line 1:16: expected a command or "}", found the end of the script'),
        ("if true keep;", 'line 1:1: "if" lacks a block'),
        ("}", 'line 1:1: expected a command, found "}"'),
        ("keep;;", 'line 1:6: expected a command, found ";"'),
        ("else { keep; }", 'line 1:1: "else" without an "if" or "elsif" in front of it'),
        ("if true { } else { } elsif true { }", 'line 1:22: "elsif" without an "if" or "elsif" in front of it'),
        ("if true { } else true { }", 'line 1:18: "else" takes no test'),
        ("if { }", 'line 1:1: "if" lacks a test'),
        ("if (true) { }", 'line 1:1: "if" takes one test, not a list of tests'),
        ("if anyof true { }", 'line 1:4: the tests of "anyof" have to be in parentheses'),
        ("if true;", 'line 1:1: "if" lacks a block'),
        ("keep { }", 'line 1:1: "keep" takes no block'),
        ("keep true;", 'line 1:6: "keep" takes no test'),
        ('keep "x";', 'line 1:6: too many arguments of "keep"'),
        ("redirect;", 'line 1:1: "redirect" lacks a string'),
        ("redirect 1;", 'line 1:10: expected a string as an argument of "redirect"'),
        ('redirect ["a@b.example"];', 'line 1:10: expected a string as an argument of "redirect"'),
        ('redirect "a@b.example, c@d.example";', "line 1:10: not one address"),
        ('redirect "x: a@b.example;";', "line 1:10: not one address"),
        ('redirect "root";', "line 1:10: not an address with a domain"),
        ("if size :over 1 2 { }", 'line 1:17: too many arguments of "size"'),
        ("if size 1 { }", 'line 1:4: "size" lacks ":over" or ":under"'),
        ("if size :over 99999999999999999999 { }", "line 1:15: the number is too large"),
        ("if size :over 9223372036854775807K { }", "line 1:15: the number is too large"),
        ("if size :over 5x { }", "line 1:15: a number with letters behind it that are not K, M or G"),
        ('if header :is :is "a" "b" { }', 'line 1:15: ":is" twice'),
        ('if header :is :contains "a" "b" { }', 'line 1:15: ":is" and ":contains" exclude each other'),
        ('if header :contain "a" "b" { }', 'line 1:11: unknown argument ":contain" of "header" (did you mean "contains"?)'),
        ("if header :comparator", 'line 1:22: expected a block in "{" and "}", found the end of the script'),
        ("if header :comparator { }", 'line 1:11: ":comparator" lacks a string'),
        (
            'if header :comparator "i;ascii-casemapp" "a" "b" { }',
            'line 1:11: unknown comparator "i;ascii-casemapp" (did you mean "i;ascii-casemap"?)',
        ),
        (
            'if header :comparator "i;ascii-numeric" "a" "b" { }',
            'line 1:11: the comparator "i;ascii-numeric" needs require "comparator-i;ascii-numeric"',
        ),
        ('if address "subject" "b" { }', 'line 1:12: "subject" is not a field of addresses'),
        ('if header [] "b" { }', 'line 1:12: expected a string, found "]"'),
        ('if header ["a" "b"] "b" { }', 'line 1:16: expected "," or "]", found a string'),
        ('"x', "line 1:1: a string that does not end"),
        ("keep; /* x", "line 1:7: a comment that does not end"),
        ('redirect text:\nx\n;', 'line 1:10: a text that does not end: a line with "." alone is missing'),
        ("keep :;", "line 1:6: a colon without the name of an argument behind it"),
        ("keep @;", "line 1:6: unexpected character '@'"),
        ("keep é;", "line 1:6: unexpected character '\\xe9'"),
        ("\0", "line 1:1: a NUL, which is not allowed"),
        ("keep\0;", "line 1:5: a NUL, which is not allowed"),
    ],
)  # fmt: skip
def test_errors_say_where_and_why(text: str, shown: str) -> None:
    assert error(text) == shown


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b'fileinto "";', "not the name of a mailbox: the name is empty"),
        (b'fileinto "a//b";', "not the name of a mailbox: a level of the name is empty"),
        (b'fileinto "\xff";', "not the name of a mailbox: the name is not UTF-8"),
        (b'if envelope "form" "b" { }', 'unknown part of the envelope "form" (did you mean "from"?)'),
        (b'if header :value "gr" "a" "b" { }', 'unknown relation "gr"'),
        (
            b'if header :matches :comparator "i;ascii-numeric" "a" "b" { }',
            'the comparator "i;ascii-numeric" cannot be used with ":matches"',
        ),
        (b'if date :zone "+1" "date" "hour" "b" { }', 'not a time zone such as "+0100"'),
        (b'if date "date" "hours" "b" { }', 'unknown part of a date "hours" (did you mean "hour"?)'),
        (b'set "1" "x";', "not the name of a variable"),
        (b'set "${x}" "x";', "the name of a variable has to be a constant"),
        (b'set "%b" "x";' % (b"a" * 65), "the name of a variable has more than 64 characters"),
        (b'set "a" "${b.c.1.d}";', "unknown namespace of variables 'b.c.1.'"),
        (b'set "a" "${33}";', "match variables go up to ${32}"),
        (b'set "a" "${unicode:200000}";', "there is no character 200000 in Unicode"),
        (b'set "a" "${unicode:110000}";', "there is no character 110000 in Unicode"),
        (b'set "a" "${unicode:D800}";', "there is no character D800 in Unicode"),
        (b'set "a" "${Unicode:DF01}";', "there is no character DF01 in Unicode"),
        (b'set :lower :upper "a" "b";', '":lower" and ":upper" exclude each other'),
        (b'vacation :from "x" "y";', "not an address with a domain"),
        (b'vacation :mime "Content-Type: text/\xe9\n\nx";', 'the header of a ":mime" reason has characters that are not ASCII'),
        (b'if body :raw :content "text" "x" { }', '":raw" and ":content" exclude each other'),
    ],
)
def test_errors_of_extensions(text: bytes, what: str) -> None:
    assert error(REQUIRE + text).partition(": ")[2] == what


def test_variables_of_flags_need_the_extension() -> None:
    assert error('require "imap4flags"; setflag "v" "x";').endswith(': a variable of flags needs require "variables"')
    assert error('require "imap4flags"; if hasflag "v" "x" { }').endswith(': a variable of flags needs require "variables"')


@pytest.mark.parametrize("name", EXTENSIONS)
def test_every_extension_can_be_required(name: str) -> None:
    assert sieve.compile(f'require "{name}";'.encode()).requires == {name}


def test_comparators_of_the_base_may_be_required() -> None:
    sieve.compile(b'require ["comparator-i;octet", "comparator-i;ascii-casemap"];')


def test_whether_the_body_is_read() -> None:
    assert compiled(b'if not body "x" { keep; }').reads_body
    assert not compiled(b'if not header "x" "y" { keep; }').reads_body
    (command,) = compiled(b'if body "x" { keep; }').block
    assert isinstance(command, If) and isinstance(command.branches[0][0], BodyTest)


def test_keys_of_replies() -> None:
    def key(text: bytes) -> bytes:
        (command,) = compiled(text).block
        assert isinstance(command, Vacation)
        return command.key

    assert key(b'vacation "a";') == key(b'vacation :days 3 :addresses "x" "a";')
    assert key(b'vacation :subject "${1}" "a";') == key(b'vacation :subject "${1}" "a";')
    assert key(b'vacation :handle "h" "a";') == key(b'vacation :handle "h" :subject "s" "b";')
    texts = [b'"a"', b'"b"', b':subject "a" "a"', b':mime "a"', b':from "a@b.example" "a"', b':subject "a@b.example" "a"',
             b':handle "a" "a"', b':subject "" "a"']  # fmt: skip
    assert len({key(b"vacation %b;" % text) for text in texts}) == len(texts)


# Bounds


def test_nesting() -> None:
    blocks = b"if true {" * 15 + b"keep;" + b"}" * 15
    assert compiled(blocks)
    assert error(REQUIRE + b"if true {" + blocks + b"}") == "line 2:144: blocks are nested more than 15 deep"
    tests = b"if " + b"not allof(" * 15 + b"true" + b")" * 15 + b"{ }"
    assert compiled(tests)
    assert "lists of tests are nested more than 15 deep" in error(tests.replace(b"true", b"allof(true)"))
    assert "lists of tests" in error(b"if " + b"allof(true, " * 16 + b"true" + b")" * 16 + b"{ }")
    assert "tests are nested more than 30 deep" in error(b"if " + b"not " * 31 + b"true { }")


@pytest.mark.parametrize("text", [b"if true {", b"if not ", b"if anyof(", b"if allof(not anyof(", b"(", b"[", b"{", b'["a",'])
def test_depth_is_no_way_to_break_it(text: bytes) -> None:
    error(text * (SCRIPT_MOST // len(text)))


def test_length() -> None:
    sieve.compile(b"#" * SCRIPT_MOST)
    assert error(b"#" * (SCRIPT_MOST + 1)) == f"line 1:{SCRIPT_MOST + 1}: the script has more than {SCRIPT_MOST} octets"


def test_number_of_variables() -> None:
    text = b"".join(b'set "v%d" "x"; addflag "V%d" "y";' % (number, number) for number in range(128))
    compiled(text)
    assert "more than 128 variables" in error(REQUIRE + text + b'set "w" "";')


@pytest.mark.parametrize(
    "text",
    [
        b'"' * SCRIPT_MOST,
        b"\\" * SCRIPT_MOST,
        b'redirect "' + b"\\a" * 30000 + b'";',
        b'redirect "' + b"(" * 60000 + b'";',
        b"/*" * 30000,
        b"text:" * 13000,
        b"redirect text:\n" + b".\r" * 30000,
        b"a" * 65000 + b";",
        b"keep :" + b"a" * 65000 + b";",
        b"1" * 65000,
        b"if true {" + b"keep;" * 13000 + b"}",
        b"if anyof(" + b"true," * 13000 + b"true) { keep; }",
        b'if header ["' + b'","' * 20000 + b'"] "x" { keep; }',
        b'require ["variables", "encoded-character"]; set "a" "' + b"${hex:" * 10000 + b'";',
        b'require ["variables", "encoded-character"]; set "a" "' + b"${hex:40 " * 7000 + b'";',
        b'require ["variables", "encoded-character"]; set "a" "' + b"${unicode:0" + b"0" * 60000 + b'}";',
        b'require ["variables"]; set "a" "' + b"${a." * 15000 + b'";',
        b'require ["variables"]; set "a" "${' + b"a." * 30000 + b'";',
        b'require ["variables"]; set "a" "' + b"${1}" * 16000 + b'";',
        b"\n" * SCRIPT_MOST,
        b"keep\n;" * 10000,
    ],
)
def test_hostile_texts_end_soon(text: bytes) -> None:
    assert is_decided(text[:SCRIPT_MOST])


def is_decided(text: bytes) -> bool:
    """Whether a text is a script, or an error that says where."""
    try:
        return isinstance(sieve.compile(text), Script)
    except SieveError as caught:
        lines = text.split(b"\n")
        assert 1 <= caught.line <= len(lines)
        assert 1 <= caught.column <= len(lines[caught.line - 1].decode("utf-8", "replace")) + 1
        assert caught.what and caught.what.isprintable()
        return True


WORDS = [
    b'require ["fileinto","variables","imap4flags","body","date","relational","vacation","encoded-character"];', b"if", b"elsif",
    b"else", b"{", b"}", b"(", b")", b";", b",", b"[", b"]", b"not", b"anyof", b"allof", b"true", b"header", b"address", b"body",
    b"keep", b"stop", b"fileinto", b"set", b"vacation", b"setflag", b"hasflag", b"date", b"size", b":over", b":is", b":count",
    b":matches", b":mime", b":flags", b":raw", b":zone", b'"a"', b'"${1}"', b'"${hex:40}"', b'"from"', b'"a@b.example"', b"5K",
    b"#x\n",    b"/* */", b"text:\nx\n.\n", b'"', b"\\", b"\xff", b"\0", b"\r", b"\n",
]  # fmt: skip


@given(st.binary(max_size=200))
def test_any_octets_are_a_script_or_an_error(text: bytes) -> None:
    assert is_decided(text)


@given(st.lists(st.sampled_from(WORDS), max_size=60))
def test_any_words_are_a_script_or_an_error(words: list[bytes]) -> None:
    assert is_decided(b" ".join(words))


@given(st.lists(st.sampled_from(WORDS), max_size=40))
def test_line_ends_make_no_difference(words: list[bytes]) -> None:
    text = b"\n".join(word.replace(b"\r", b"") for word in words)

    def result(text: bytes) -> object:
        try:
            return sieve.compile(text)
        except SieveError as caught:
            return re.sub(r":\d+:", ":", str(caught))

    assert result(text) == result(text.replace(b"\n", b"\r\n"))
