"""LIST and LSUB: equal to a naive reading of the RFCs, and their examples."""

import re
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.imap_command import List
from relaymta.proto.imap_list import Name, listed
from relaymta.proto.mailbox_list import canonical
from tests.proto.test_imap_grammar import parsed
from tests.support.imap_grammar import responses


def told(names: list[Name], command: List, lsub: bool = False, rev2: bool = False, utf8: bool = False) -> list[dict[str, Any]]:
    """The responses, which pass the grammar, in their order; STATUS: whether that follows."""
    found = []
    for octets, status in listed(names, command, lsub=lsub, rev2=rev2, utf8=utf8 or rev2):
        for one in responses(octets, utf8 or rev2, rev2 and not lsub):
            assert one.name == ("LSUB" if lsub else "LIST")
            assert status in (None, one.data["name"])
            below = {"CHILDINFO": [option.decode() for option in one.data["CHILDINFO"]]} if "CHILDINFO" in one.data else {}
            found.append({**one.data, **below, "STATUS": status is not None})
        assert octets or status is None
    return found


# The oracle


def matches(pattern: str, name: str) -> bool:
    """RFC 9051 6.3.9; INBOX in any case (5.1)."""
    form = "".join({"*": ".*", "%": "[^/]*"}.get(one, re.escape(one)) for one in pattern)
    spelled = [name]
    if name.split("/")[0] == "INBOX":
        spelled = ["".join(letters) + name[5:] for letters in product(*zip("INBOX", "inbox", strict=True))]
    return any(re.fullmatch(form, one) for one in spelled)


def expected(names: list[Name], command: List, lsub: bool, rev2: bool) -> dict[str, dict[str, Any]]:
    """What has to be told, by name: RFC 5258 3.3, RFC 3501 6.3.9."""
    known = {one.name: one for one in names}
    parents = {"/".join(name.split("/")[:n]) for name in known for n in range(1, name.count("/") + 1)}

    def meets(name: str) -> bool:
        one = known.get(name, Name(name, False))
        if not command.select & {"SUBSCRIBED", "SPECIAL-USE"}:
            return one.exists
        subscribed = one.subscribed or "SUBSCRIBED" not in command.select
        return subscribed and (bool(one.special and one.exists) or "SPECIAL-USE" not in command.select)

    def matched(name: str) -> bool:
        return any(matches(pattern, name) for pattern in command.patterns)

    found = {}
    for name in known.keys() | parents:
        one = known.get(name, Name(name, False))
        below = [other for other in known if other.startswith(name + "/")]
        by_child = any(meets(other) and not matched(other) for other in below)
        if lsub:
            with_parents = "%" in command.patterns[0]
        else:
            with_parents = "RECURSIVEMATCH" in command.select or not command.select & {"SUBSCRIBED", "SPECIAL-USE"}
        if not matched(name) or not (meets(name) or (with_parents and by_child)):
            continue
        if lsub:
            found[name] = {"name": name, "attributes": set() if meets(name) else {"\\Noselect"}, "STATUS": False}
            continue
        attributes = {"\\HasChildren" if any(known[other].exists for other in below) else "\\HasNoChildren", *one.special.split()}
        if not one.exists:
            attributes.add("\\NonExistent" if command.extended or rev2 else "\\Noselect")
        if one.subscribed and "SUBSCRIBED" in command.select | command.returns:
            attributes.add("\\Subscribed")
        status = bool(command.status) and one.exists and meets(name)
        found[name] = {"name": name, "attributes": attributes, "STATUS": status}
        if "RECURSIVEMATCH" in command.select and any(map(meets, below)):
            found[name]["CHILDINFO"] = [option for option in ("SUBSCRIBED", "SPECIAL-USE") if option in command.select]
    return found


LEVELS = st.lists(st.sampled_from(["a", "b", "ab", "INBOX", "inbox", "a b"]), min_size=1, max_size=4)
NAMES = st.dictionaries(
    LEVELS.map(lambda levels: canonical("/".join(levels))),
    st.tuples(st.booleans(), st.sampled_from(["", "", "\\Sent", "\\Junk"]), st.booleans()),
    max_size=12,
).map(lambda found: [Name(name, exists, special * exists, subscribed or not exists)
                     for name, (exists, special, subscribed) in found.items()])  # fmt: skip
PATTERN = st.text("ab/*%inboxINBOX", max_size=6) | st.sampled_from(["*", "%", "%/%", "a/%", "INBOX", "iNbOx/%", "a", "%/b", "*b"])
SELECT = st.sampled_from(
    ["", "SUBSCRIBED", "SPECIAL-USE", "REMOTE", "SUBSCRIBED SPECIAL-USE", "SUBSCRIBED RECURSIVEMATCH", "REMOTE SPECIAL-USE",
     "SPECIAL-USE RECURSIVEMATCH", "SUBSCRIBED SPECIAL-USE REMOTE RECURSIVEMATCH"]
).map(lambda text: frozenset(text.split()))  # fmt: skip
RETURNS = st.sampled_from(["", "SUBSCRIBED", "CHILDREN SPECIAL-USE"]).map(lambda text: frozenset(text.split()))


def check(names: list[Name], command: List, lsub: bool, rev2: bool) -> None:
    found = told(names, command, lsub, rev2)
    assert all(len(set(one["attributes"])) == len(one["attributes"]) for one in found)
    order = [one["name"] for one in found]
    assert len(set(order)) == len(order)
    assert order == sorted(order, key=lambda name: (name.split("/")[0] != "INBOX", name.split("/")))
    assert {one["name"]: {**one, "attributes": set(one["attributes"])} for one in found} == expected(names, command, lsub, rev2)


@given(NAMES, st.lists(PATTERN, min_size=1, max_size=3), SELECT, RETURNS, st.booleans(), st.booleans())
def test_list_equals_the_oracle(names, patterns, select, returns, status, rev2):
    command = List(tuple(map(canonical, patterns)), select, returns, ("MESSAGES",) if status else (), True)
    check(names, command, False, rev2)


@given(NAMES, PATTERN.filter(bool), st.booleans(), st.booleans())
def test_plain_list_and_lsub_equal_the_oracle(names, pattern, lsub, rev2):
    check(names, List((canonical(pattern),), frozenset(["SUBSCRIBED"] if lsub else [])), lsub, rev2)


# Examples


def said(names: list[Name], line: str, rev2: bool = False, utf8: bool = False) -> list[str]:
    """The responses to a command, without what is the same in all; a STATUS that follows as such."""
    command = parsed(line, utf8=utf8)
    found = []
    for octets, name in listed(names, command, lsub=line.startswith("LSUB"), rev2=rev2, utf8=utf8):
        assert octets.startswith(b"* %b (" % line[:4].encode()) or not octets
        found += [octets.decode().removeprefix(f"* {line[:4]} ").replace(' "/"', "").strip()] if octets else []
        found += [f"STATUS {name}"] if name is not None else []
    return found


def tree(*names: str, missing: tuple[str, ...] = ()) -> list[Name]:
    """Names; subscribed ones end with a `+`."""
    return [Name(name.rstrip("+"), name not in missing, "", name.endswith("+")) for name in names]


FRUIT = [
    *tree("INBOX+", "Fruit", "Fruit/Apple", "Fruit/Banana+", "Tofu", "Vegetable+", "Vegetable/Broccoli+", "Vegetable/Corn"),
    Name("Fruit/Peach", False, "", True),
]
FOO = tree("foo2", "foo2/bar1+", "foo2/bar2+", "baz2", "baz2/bar2+", "baz2/bar22+", "eps2+", "eps2/mamba+", "qux2/bar2+")
EXAMPLES = [
    ("2", FRUIT, 'LIST (SUBSCRIBED) "" "*"',
     ['(\\HasNoChildren \\Subscribed) "INBOX"', '(\\HasNoChildren \\Subscribed) "Fruit/Banana"',
      '(\\NonExistent \\HasNoChildren \\Subscribed) "Fruit/Peach"', '(\\HasChildren \\Subscribed) "Vegetable"',
      '(\\HasNoChildren \\Subscribed) "Vegetable/Broccoli"']),
    ("3", FRUIT, 'LIST () "" "%" RETURN (CHILDREN)',
     ['(\\HasNoChildren) "INBOX"', '(\\HasChildren) "Fruit"', '(\\HasNoChildren) "Tofu"', '(\\HasChildren) "Vegetable"']),
    ("6", FRUIT, 'LIST (REMOTE) "" "Fruit/*" RETURN (SUBSCRIBED)',
     ['(\\HasNoChildren) "Fruit/Apple"', '(\\HasNoChildren \\Subscribed) "Fruit/Banana"']),
    ("7", tree("Sent/March", "Sent", "INBOX", "Drafts", "Sent/a/b"), 'LIST "" ("INBOX" "Drafts" "Sent/%")',
     ['(\\HasNoChildren) "INBOX"', '(\\HasNoChildren) "Drafts"', '(\\HasNoChildren) "Sent/March"',
      '(\\NonExistent \\HasChildren) "Sent/a"']),
    ("8 A", tree("INBOX", "Foo", "Foo/Bar", "Foo/Baz+", "Moo"), 'LIST (SUBSCRIBED RECURSIVEMATCH) "" "%"',
     ['(\\HasChildren) "Foo" ("CHILDINFO" ("SUBSCRIBED"))']),
    ("8 A1", tree("INBOX", "Foo+", "Foo/Bar", "Foo/Baz+", "Moo"), 'LIST (SUBSCRIBED RECURSIVEMATCH) "" "%"',
     ['(\\HasChildren \\Subscribed) "Foo" ("CHILDINFO" ("SUBSCRIBED"))']),
    ("8 A2", tree("INBOX", "Foo/Bar", "Foo/Baz+", "Moo"), 'LIST (SUBSCRIBED RECURSIVEMATCH) "" "%"',
     ['(\\NonExistent \\HasChildren) "Foo" ("CHILDINFO" ("SUBSCRIBED"))']),
    ("8 B", tree("INBOX", "Foo", "Foo/Bar", "Moo"), 'LIST (SUBSCRIBED RECURSIVEMATCH) "" "%"', []),
    ("8 C", tree("INBOX", "Foo+", "Foo/Bar", "Moo+"), 'LIST (SUBSCRIBED RECURSIVEMATCH) "" "%" RETURN (CHILDREN)',
     ['(\\HasChildren \\Subscribed) "Foo"', '(\\HasNoChildren \\Subscribed) "Moo"']),
    ("9", FOO, 'LIST (RECURSIVEMATCH SUBSCRIBED) "" "*2"',
     ['(\\HasNoChildren \\Subscribed) "baz2/bar2"', '(\\HasNoChildren \\Subscribed) "baz2/bar22"',
      '(\\HasChildren \\Subscribed) "eps2" ("CHILDINFO" ("SUBSCRIBED"))', '(\\HasChildren) "foo2" ("CHILDINFO" ("SUBSCRIBED"))',
      '(\\HasNoChildren \\Subscribed) "foo2/bar2"', '(\\HasNoChildren \\Subscribed) "qux2/bar2"']),
    ("10", [*tree("foo"), Name("foo/bar", False, "", True)], 'LIST (SUBSCRIBED RECURSIVEMATCH) "" foo RETURN (CHILDREN)',
     ['(\\HasNoChildren) "foo" ("CHILDINFO" ("SUBSCRIBED"))']),
    ("11", tree("music/rock", "also/jazz"), 'LIST () "" %',
     ['(\\NonExistent \\HasChildren) "also"', '(\\NonExistent \\HasChildren) "music"']),
    ("11 a3.1", tree("music/rock"), 'LIST "" (% music/rock)', ['(\\HasNoChildren) "music/rock"']),
]  # fmt: skip


@pytest.mark.parametrize(("names", "line", "answers"), [row[1:] for row in EXAMPLES], ids=[row[0] for row in EXAMPLES])
def test_the_examples_of_rfc_5258(names, line, answers):
    """Section 5; with children told always, and in our order."""
    assert said(names, line) == answers


def test_8_selecting_is_not_returning():
    """Case 8 (davmail 392, cyrus 2179): RFC 5258 3, 6154 2, 5819 2."""
    names = [*tree("INBOX", "Archive/2024", "Notes+"), Name("Sent", True, "\\Sent"), Name("Old", False, "", True)]
    assert said(names, 'LIST (SPECIAL-USE) "" "*"') == ['(\\HasNoChildren \\Sent) "Sent"']
    assert said(names, 'LIST "" "%" RETURN (SPECIAL-USE STATUS (UNSEEN))') == [
        '(\\HasNoChildren) "INBOX"', "STATUS INBOX", '(\\NonExistent \\HasChildren) "Archive"', '(\\HasNoChildren) "Notes"',
        "STATUS Notes", '(\\HasNoChildren \\Sent) "Sent"', "STATUS Sent",
    ]  # fmt: skip
    assert said(names, 'LIST "" ("INBOX" "%" "inbox")') == [
        '(\\HasNoChildren) "INBOX"', '(\\NonExistent \\HasChildren) "Archive"', '(\\HasNoChildren) "Notes"',
        '(\\HasNoChildren \\Sent) "Sent"',
    ]  # fmt: skip
    assert said(names, 'LIST (SUBSCRIBED) "" "*" RETURN (STATUS (UNSEEN))') == [
        '(\\HasNoChildren \\Subscribed) "Notes"', "STATUS Notes", '(\\NonExistent \\HasNoChildren \\Subscribed) "Old"',
    ]  # fmt: skip
    below = tree("a", "a/b+")
    assert said(below, 'LIST (SUBSCRIBED RECURSIVEMATCH) "" "%" RETURN (STATUS (UNSEEN))') == [
        '(\\HasChildren) "a" ("CHILDINFO" ("SUBSCRIBED"))'
    ]  # RFC 5819 3: no STATUS where only a child meets the criteria


def test_6_inbox_by_any_name():
    """Case 6 (greenmail 399): RFC 9051 5.1."""
    names = tree("Sent", "INBOX+", "INBOX/x+", "inboxes", "A")
    everything = ['(\\HasChildren) "INBOX"', '(\\HasNoChildren) "INBOX/x"']
    assert said(names, 'LIST "" inBox') == everything[:1]
    assert said(names, 'LIST iNbox/ "%"') == said(names, 'LIST "" "iNbox/%"') == everything[1:]
    assert said(names, 'LIST "" "In*"') == everything
    assert said(names, 'LSUB "" "inbox*"') == ['() "INBOX"', '() "INBOX/x"']
    assert said(names, 'LSUB "" "inbox"') == ['() "INBOX"']
    assert [line.split(" ", 1)[1] for line in said(names, 'LIST "" *')] == ['"INBOX"', '"INBOX/x"', '"A"', '"Sent"', '"inboxes"']


def test_the_delimiter_is_asked_for():
    """RFC 9051 6.3.9; RFC 5258 3: not in an extended command."""
    assert said(FRUIT, 'LIST "" ""') == ['(\\Noselect) ""'] == said(FRUIT, 'LIST Fruit/ ""') == said(FRUIT, 'LSUB "" ""')
    for line in ('LIST () "" ""', 'LIST "" ("")', 'LIST "" "" RETURN ()'):
        assert said(FRUIT, line) == []
    assert said(FRUIT, 'LIST "" ("" "Tofu")') == ['(\\HasNoChildren) "Tofu"']


def test_parents_that_do_not_exist():
    """RFC 3501 6.3.8: with \\Noselect; RFC 9051: \\NonExistent."""
    names = [*tree("foo/bar"), Name("baz", False, "", True), *tree("baz/x/y")]
    plain = ['(\\Noselect \\HasChildren) "baz"', '(\\Noselect \\HasChildren) "foo"']
    assert said(names, 'LIST "" %') == plain
    assert said(names, 'LIST "" %', rev2=True) == [line.replace("Noselect", "NonExistent") for line in plain]
    assert said(names, 'LIST "" *') == ['(\\HasNoChildren) "baz/x/y"', '(\\HasNoChildren) "foo/bar"']
    assert said(names, 'LIST "" "baz/%"') == ['(\\Noselect \\HasChildren) "baz/x"']
    assert said(names, 'LIST "" "foo"') == plain[1:]


def test_lsub_tells_parents_of_subscribed_names():
    """RFC 3501 6.3.9."""
    names = [*tree("foo", "foo/bar+", "INBOX"), Name("gone/x", False, "", True)]
    assert said(names, 'LSUB "" %') == ['(\\Noselect) "foo"', '(\\Noselect) "gone"']
    assert said(names, 'LSUB "" *') == ['() "foo/bar"', '() "gone/x"']
    assert said(names, 'LSUB "" foo') == []
    assert said(names, "LSUB foo/ %") == ['() "foo/bar"']


def test_names_in_the_encoding_of_the_session():
    names = tree("Entwürfe", "a&b")
    assert said(names, 'LIST "" *') == ['(\\HasNoChildren) "Entw&APw-rfe"', '(\\HasNoChildren) "a&-b"']
    assert said(names, 'LIST "" "Entwü%"', utf8=True) == ['(\\HasNoChildren) "Entwürfe"']


def test_many_names_and_many_patterns():
    """Linear in both, and the caller may pause: no piece looks at more than one name."""
    names = [Name("/".join(f"{level}{number % (level + 2)}" for level in range(19)) + f"/{number}") for number in range(2000)]
    patterns = tuple(f"*{letter}{number}*x" for number in range(33) for letter in "abc")
    assert sum(1 for _ in listed(names, List(patterns, extended=True), lsub=False, rev2=True, utf8=True)) > 4000
    assert len(told(names, List((*patterns, "*/1999"), extended=True))) == 1
    long = tuple("*".join(chr(0x4E00 + 200 * number + at) for at in range(200)) for number in range(100))
    assert told(names, List((*long, "%"), extended=True)) == [
        {"name": "00", "attributes": ["\\NonExistent", "\\HasChildren"], "STATUS": False},
        {"name": "01", "attributes": ["\\NonExistent", "\\HasChildren"], "STATUS": False},
    ]
