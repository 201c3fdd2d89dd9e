"""The aliases of this machine: their file, and what they lead to."""

import os
from pathlib import Path

import pytest

from relaymta.accept.aliases import UNKNOWN_ALIAS, read
from relaymta.errors import ConfigError

HOST = "host.example"


def made(tmp_path: Path, text: str, **files: str):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "aliases").write_text(text.replace("@@", str(tmp_path)))
    return read(str(tmp_path / "aliases"), [HOST, "Other.example"])


def leads(tmp_path: Path, text: str, name: str, **files: str) -> list[str]:
    return made(tmp_path, text, **files).expanded([f"{name}@{HOST}"])


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("root: ann@x.example\n", "root", ["ann@x.example"]),
        ("Root: ann@x.example\n", "rOOT", ["ann@x.example"]),
        ("root:ann@x.example,bob@x.example\n", "root", ["ann@x.example", "bob@x.example"]),
        (
            "# comment\n\nroot: ann@x.example,\n  bob@x.example\n\t,carl\n",
            "root",
            ["ann@x.example", "bob@x.example", "carl@host.example"],
        ),
        ("postmaster: root\nroot: admin\nadmin: ann@x.example, bob\n", "postmaster", ["ann@x.example", "bob@host.example"]),
        ("root: root, ann@x.example\n", "root", ["root@host.example", "ann@x.example"]),
        ("root: \\root, ann@x.example\n", "root", ["root@host.example", "ann@x.example"]),
        ("a: \\b\nb: ann@x.example\n", "a", ["b@host.example"]),
        ("a: B@HOST.example, c@other.example\nb: ann@x.example\nc: d\n", "a", ["ann@x.example", "d@host.example"]),
        ("a: b, c\nb: d@x.example\nc: d@x.example\n", "a", ["d@x.example"]),
        ('"a": "ann@x.example", \'b\'\n', "a", ["ann@x.example", "'b'@host.example"]),
        ('a: "b, c"@x.example, d@x.example\n', "a", ['"b, c"@x.example', "d@x.example"]),
        ("a: Ann@X.Example\n", "a", ["Ann@X.Example"]),
        ("a: b\n", "none", ["none@host.example"]),
        ("", "a", ["a@host.example"]),
    ],
)
def test_what_an_alias_leads_to(tmp_path, text, name, found):
    assert leads(tmp_path, text, name) == found


def test_lists_in_files(tmp_path):
    text = "team: :include:@@/team, eve@x.example\nroot: bob@x.example\n"
    inner = f"# ours\nann@x.example, carl@x.example\nroot\n\n:include:{tmp_path}/more\n"
    found = leads(tmp_path, text, "team", team=inner, more="dora@x.example\nann@x.example\n")
    assert found == ["ann@x.example", "carl@x.example", "bob@x.example", "dora@x.example", "eve@x.example"]
    assert [Path(path).name for path in made(tmp_path, text).files] == ["aliases", "team", "more"]


def test_which_addresses_are_looked_up(tmp_path):
    aliases = made(tmp_path, "root: ann@x.example\n")
    given = ["root@host.example", "root@x.example", "root@OTHER.example", "Root@host.example.", "root@b.example"]
    assert aliases.expanded(given) == ["ann@x.example", "root@x.example", "root@b.example"]
    assert aliases.expanded(given, {"root@b.example": False}) == ["ann@x.example", "root@x.example"]
    assert aliases.expanded(given, {"root@b.example": True}) == ["ann@x.example", "root@x.example", "root@b.example"]
    assert (aliases.leads("root@host.example"), aliases.leads("root@b.example"), aliases.leads("root@b.example", True)) == (
        1,
        0,
        1,
    )
    assert not aliases.leads("none@host.example")
    others = ["none@host.example"]
    assert aliases.expanded(others) is others


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("root: |/bin/program -x\n", ":1: '|/bin/program -x': no mail is given to a program"),
        ('root: "|/bin/program, x"\n', ":1: '|/bin/program, x': no mail is given to a program"),
        ("root: ann@x.example,\n /var/mail/root\n", ":1: '/var/mail/root': no mail is given to a file"),
        ("\nroot\n", ":2: 'root' is not of the form"),
        ("root@x.example: ann\n", "is not of the form"),
        ("two words: ann\n", "is not of the form"),
        ("root: ann\nROOT: bob\n", ":2: 'ROOT' is there twice"),
        ("root: a b\n", ":1: 'a b' is neither an address nor a name"),
        ("root: <ann>\n", "is neither an address nor a name"),
        ("root: ann@\n", ":1: 'ann@' is no address"),
        ("root:\n", "root leads to nobody"),
        ("root: :include:list\n", "expected the whole path"),
        ("a: b\nb: c\nc: a\n", "a circle: a -> b -> c -> a"),
        ("\n".join(f"a{number}: a{number + 1}" for number in range(40)), "leads to others more than 20 deep"),
        ("a: " + ",".join(f"u{number}" for number in range(6000)), "leads to more than 5000 addresses"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, said):
    with pytest.raises(ConfigError) as found:
        made(tmp_path, text)
    assert any(said in problem for problem in found.value.problems), found.value.problems


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (":include:@@/none", "@@/aliases:1: @@/none: No such file"),
        (":include:@@/one", "a circle: @@/one -> @@/two -> @@/one"),
        (":include:@@/bad", "@@/bad:2: '|x': no mail is given to a program"),
        (":include:@@/relative", "expected the whole path"),
        (":include:@@/many", "leads to more than 5000 addresses"),
        (":include:@@/half, :include:@@/half2", "leads to more than 5000 addresses"),
        (":include:@@/large", "has more than 1048576 octets"),
        (":include:@@/pipe", "is not a plain file"),
        (":include:@@/latin", "line 1: not UTF-8"),
        (":include:@@/back", "a circle: a -> b -> a"),
        (":include:@@/empty", "a leads to nobody"),
        (":include:@@/outer", "@@/outer:1: @@/none: No such file"),
    ],
)
def test_what_is_wrong_in_a_list_concerns_that_list_alone(tmp_path, text, said):
    files = {"one": f":include:{tmp_path}/two", "two": f":include:{tmp_path}/one", "bad": "ann\n|x\n", "back": "b\n"}
    files |= {"many": "".join(f"u{number}\n" for number in range(6000)), "large": "#" * (1 << 20) + "\n", "empty": "# nobody\n"}
    files |= {name: "".join(f"{name}-{one}\n" for one in range(3000)) for name in ("half", "half2")}
    files |= {"relative": ":include:x\n", "outer": f":include:{tmp_path}/none\nann@x.example\n"}
    (tmp_path / "latin").write_bytes(b"\xe4\n")
    os.mkfifo(tmp_path / "pipe")
    aliases = made(tmp_path, f"a: {text}\nb: a\nc: ann@x.example\n", **files)
    assert any(said.replace("@@", str(tmp_path)) in trouble for trouble in aliases.troubles), aliases.troubles
    led = [aliases.leads(f"{name}@{HOST}") for name in ("A", "b", "c", "none")]
    assert led == [UNKNOWN_ALIAS, UNKNOWN_ALIAS, 1, 0]
    assert (aliases.leads("a@x.example"), aliases.leads("a@x.example", True)) == (0, UNKNOWN_ALIAS)
    assert aliases.expanded([f"a@{HOST}", f"c@{HOST}"]) == [f"a@{HOST}", "ann@x.example"]


def test_a_list_that_becomes_wrong_stays_as_it_was(tmp_path):
    text = "a: :include:@@/team, eve@x.example\nc: ann@x.example\n"
    before = made(tmp_path, text, team="ann@x.example\nbob@x.example\n")
    assert before.troubles == []
    file, path = str(tmp_path / "aliases"), tmp_path / "team"
    for wrong in ("ann@x.example\ncarl@\n", "", None):
        path.write_text(wrong) if wrong is not None else path.unlink()
        now = read(file, [HOST], before)
        if wrong == "":  # nobody is left, but for those of the alias itself
            assert (now.expanded([f"a@{HOST}"]), now.troubles) == (["eve@x.example"], [])
            continue
        assert now.expanded([f"a@{HOST}"]) == ["ann@x.example", "bob@x.example", "eve@x.example"]
        assert now.troubles[0].endswith("; what was read before stays in use")
        assert read(file, [HOST], now).expanded([f"a@{HOST}"]) == now.expanded([f"a@{HOST}"])
    path.write_text("dora@x.example\n")
    again = read(file, [HOST], now)
    assert (again.expanded([f"a@{HOST}"]), again.troubles) == (["dora@x.example", "eve@x.example"], [])


def test_lists_that_include_each_other_many_times_are_read_once(tmp_path):
    """Each of 18 includes the next ten times, which would be 10 to the power of 18 targets."""
    files = {f"f{one}": f":include:{tmp_path}/f{one + 1}\n" * 10 + f"u{one}\n" for one in range(18)}
    aliases = made(tmp_path, "a: :include:@@/f0\n", f18="u18", **files)
    assert (len(aliases.expanded([f"a@{HOST}"])), len(aliases.files)) == (19, 20)


def test_no_alias_is_left_as_it_is_however_many_addresses_there_are(tmp_path):
    text = "".join(f"a{one}: {','.join(f'u{one}-{number}' for number in range(4000))}\n" for one in range(3))
    found = made(tmp_path, text).expanded([f"a{one}@{HOST}" for one in range(3)])
    assert (len(found), f"a2@{HOST}" in found) == (12000, False)


def test_many_aliases_of_each_other_take_no_long(tmp_path):
    text = "".join(
        f"a{number}: {', '.join(f'a{more}' for more in range(number + 1, number + 15))}, x{number}\n" for number in range(18)
    )
    assert len(leads(tmp_path, text, "a0")) == 18 + 14
