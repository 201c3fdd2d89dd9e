"""The aliases of this machine: their file, and what they lead to."""

import os
import threading
from pathlib import Path

import pytest

from relaymta.accept import included
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
        (":include:@@/folder", "is not a plain file"),
        (":include:/dev/zero", "is not a plain file"),
        (":include:@@/self", "a circle: @@/self -> @@/self"),
        (":include:@@/again", "a circle: @@/again -> @@/again"),
        (":include:@@/wide", "@@/wide:21: includes more than 20 files"),
        (":include:@@/long", "a name of more than 256 characters"),
        (":include:@@/path", "a path of more than 4096 octets"),
        (":include:@@/full", "has more than 1048576 octets, with the files that lead there"),
    ],
)
def test_what_is_wrong_in_a_list_concerns_that_list_alone(tmp_path, text, said):
    files = {"one": f":include:{tmp_path}/two", "two": f":include:{tmp_path}/one", "bad": "ann\n|x\n", "back": "b\n"}
    files |= {"many": "".join(f"u{number}\n" for number in range(6000)), "large": "#" * (1 << 20) + "\n", "empty": "# nobody\n"}
    files |= {name: "".join(f"{name}-{one}\n" for one in range(3000)) for name in ("half", "half2")}
    files |= {"relative": ":include:x\n", "outer": f":include:{tmp_path}/none\nann@x.example\n"}
    files |= {"wide": "".join(f":include:{tmp_path}/{one}\n" for one in range(1000)), "self": f":include:{tmp_path}/self\n"}
    files |= {"again": f":include:{tmp_path}//.//again\n", "long": "a" * 257, "path": f":include:/{'a' * 4096}"}
    files |= {"full": f":include:{tmp_path}/most\n", "most": "#" * ((1 << 20) - 2) + "\n"}
    (tmp_path / "folder").mkdir()
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


def test_a_file_is_known_however_its_path_is_spelled(tmp_path):
    (tmp_path / "link").symlink_to("team")
    spelled = ["team", "./team", "/team", "././/team", "link"]
    text = f"a: {', '.join(f':include:@@/{one}' for one in spelled)}\nb: :include:@@/link\n"
    aliases = made(tmp_path, text, team="ann@x.example\n")
    assert aliases.expanded([f"a@{HOST}", f"b@{HOST}"]) == ["ann@x.example"]
    assert (len(aliases.files), aliases.troubles) == (2, [])
    (tmp_path / "team").unlink()
    assert read(str(tmp_path / "aliases"), [HOST], aliases).expanded([f"b@{HOST}"]) == ["ann@x.example"]


def counted(monkeypatch) -> list[str]:
    """The paths that are opened from now on."""
    opened: list[str] = []
    real = included.plain_file

    def noted(path: str) -> int:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(included, "plain_file", noted)
    return opened


def test_a_file_that_names_itself_in_many_spellings_is_read_once(tmp_path, monkeypatch):
    opened = counted(monkeypatch)
    inner = "".join(f":include:{tmp_path}{'/' * (one % 90 + 1)}{'./' * (one // 90)}team\n" for one in range(2000))
    aliases = made(tmp_path, "a: :include:@@/team\nb: bob@x.example\n", team=inner)
    assert aliases.leads(f"a@{HOST}") == UNKNOWN_ALIAS
    assert (aliases.leads(f"b@{HOST}"), len(aliases.files)) == (1, 2)
    assert len(opened) <= 22 and len(aliases.troubles) <= 22


def test_files_are_so_many_and_so_large_together(tmp_path, monkeypatch):
    """First those that the operator's file includes: none that is not included there takes the place of one that is."""
    opened = counted(monkeypatch)
    monkeypatch.setattr(included, "FILES", 30)
    files = {f"f{one}": f"u{one}@x.example\n:include:{tmp_path}/f{one + 1}\n" for one in range(60)}
    text = "a: :include:@@/f0\nb: :include:@@/own0, :include:@@/own1\n"
    aliases = made(tmp_path, text, own0=":include:@@/f40\n".replace("@@", str(tmp_path)), own1="ann@x.example\n", **files)
    assert "more than 30 files are included" in "".join(aliases.troubles)
    assert (len(aliases.files), len(opened)) == (1 + 30 + 2, 32)
    assert [one for one in ("own0", "own1") if str(tmp_path / one) not in aliases.files] == []
    monkeypatch.setattr(included, "OCTETS_TOGETHER", 2000)
    monkeypatch.setattr(included, "OCTETS", 1500)
    files = {one: f"{one}@x.example\n" + "#" * 1000 for one in ("f0", "own0")}
    aliases = made(tmp_path, "a: :include:@@/f0\nb: :include:@@/own0\n", **files)
    assert (aliases.leads(f"a@{HOST}"), aliases.leads(f"b@{HOST}")) == (1, UNKNOWN_ALIAS)
    assert "included files have more than 2000 octets together" in aliases.troubles[0]


def test_a_file_of_one_list_takes_no_place_of_another(tmp_path):
    """What one file includes is bounded for it alone: the file of others that it includes, too, is read for these."""
    files = {f"f{one}": f":include:{tmp_path}/f{one + 1}\n" for one in range(25)} | {"f25": "eve@x.example\n"}
    aliases = made(
        tmp_path, "a: :include:@@/f0\nb: :include:@@/f25\nc: :include:@@/good\n", good=f":include:{tmp_path}/f22\n", **files
    )
    assert aliases.leads(f"a@{HOST}") == UNKNOWN_ALIAS
    assert f"{tmp_path}/f20: a file leads to more than 20 files" in aliases.troubles[0]
    assert aliases.expanded([f"b@{HOST}"]) == aliases.expanded([f"c@{HOST}"]) == ["eve@x.example"]


def test_what_a_file_includes_is_read_for_another_that_has_room_for_it(tmp_path):
    """Though it was met first by way of one that has none, and by another spelling."""
    files = {f"x{one}": f"x{one}@x.example\n" for one in range(18)} | {"within": "eve@x.example\n"}
    files |= {"shared": f":include:{tmp_path}/within\n", "good": f":include:{tmp_path}/shared\n"}
    files["bad"] = f":include:{tmp_path}//shared\n" + "".join(f":include:{tmp_path}/x{one}\n" for one in range(18))
    aliases = made(tmp_path, "a: :include:@@/bad\nb: :include:@@/good\n", **files)
    assert aliases.expanded([f"b@{HOST}"]) == ["eve@x.example"]


def test_a_file_that_grows_while_it_is_read_is_too_large(tmp_path, monkeypatch):
    """And no more of it is read than shows that."""
    real, team = os.fstat, tmp_path / "team"
    team.write_text("ann@x.example\n" * 400_000)
    descriptor = os.open(team, os.O_RDONLY)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(included, "plain_file", lambda path: os.dup(descriptor))  # of which the place is seen
            patch.setattr(included.os, "fstat", lambda one: os.stat_result([*real(one)[:6], 14, *real(one)[7:]]))
            assert included._octets_of(str(team), 1000, frozenset())[1] is None
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 1001
    finally:
        os.close(descriptor)


def test_a_disk_that_does_not_answer_keeps_nothing_else_waiting(tmp_path, monkeypatch):
    answers, real = threading.Event(), included.plain_file
    asked: list[str] = []

    def slow(path: str) -> int:
        asked.append(path)
        if path.endswith("slow"):
            answers.wait(60)
        return real(path)

    monkeypatch.setattr(included, "plain_file", slow)
    monkeypatch.setattr(included, "SECONDS", 0.2)
    text = "a: :include:@@/slow\nb: :include:@@/team\n"
    try:
        aliases = made(tmp_path, text, slow="ann@x.example\n", team="bob@x.example\n")
        assert (aliases.leads(f"a@{HOST}"), aliases.leads(f"b@{HOST}")) == (UNKNOWN_ALIAS, 1)
        assert aliases.troubles == [
            f"{tmp_path}/aliases:1: {tmp_path}/slow: its disk does not answer; mail for what leads there waits (451)"
        ]
        again = read(str(tmp_path / "aliases"), [HOST], aliases)  # one thread waits for it, not one for each look
        assert (again.troubles, sum(one.endswith("slow") for one in asked)) == (aliases.troubles, 1)
    finally:
        answers.set()
    for thread in list(included._hanging.values()):
        thread.join()
    monkeypatch.undo()
    assert read(str(tmp_path / "aliases"), [HOST], again).expanded([f"a@{HOST}"]) == ["ann@x.example"]


def test_stamps_of_files_on_a_disk_that_does_not_answer_are_not_waited_for(tmp_path, monkeypatch):
    answers, real = threading.Event(), included.stamp
    monkeypatch.setattr(included, "SECONDS", 0.2)
    monkeypatch.setattr(included, "stamp", lambda path: answers.wait(60) and None if path == "slow" else real(path))
    own = str(tmp_path / "aliases")
    made(tmp_path, "")
    try:
        assert included.stamps([own, own, "slow"]) == (real(own), None, None)
    finally:
        answers.set()
    for thread in list(included._hanging.values()):
        thread.join()
    assert included.stamps([own, own]) == (real(own), real(own))


def test_what_is_wrong_is_named_up_to_a_bound(tmp_path):
    """And the rest of the file is not parsed: it may be all of one megabyte."""
    with pytest.raises(ConfigError) as found:
        made(tmp_path, "root: <\n" * 1000 + "".join(f"a{one}: <{one}\n" for one in range(1000)))
    assert (len(found.value.problems), found.value.problems[-1]) == (
        21,
        "local.aliases: there may be more: only so many are named",
    )
    assert len(made(tmp_path, "a: :include:@@/f\n", f="<1\n<2\n<3\n<4\n").troubles) == 3
    files = {f"f{one}": "".join(f"<{line}\n" for line in range(1000)) for one in range(30)}
    aliases = made(tmp_path, "".join(f"a{one}: :include:@@/f{one}\n" for one in range(30)), **files)
    assert len(aliases.troubles) == 61 and aliases.troubles[-1].startswith("local.aliases: more is wrong")


BIG = f"big: {','.join(f'u{one}@x.example' for one in range(4900))}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BIG + "".join(f"a{one}: big, x{one}\n" for one in range(250)), "with the aliases before it more than 1000000"),
        (
            BIG + "".join(f"b{one}: big\n" for one in range(10)) + f"a: {','.join(f'b{one}' for one in range(10))}\n",
            "a leads to the same addresses again and again, more than 20000 with these",
        ),
        ("".join(f"a{one}: b{one}, c{one}\nb{one}: a{one + 1}\nc{one}: a{one + 1}\n" for one in range(30)), "more than 20 deep"),
        ("".join(f"a{one}: a{one + 1}\n" for one in reversed(range(40))), "more than 20 deep"),
        ("".join(f"a{one}: a{one + 1}\n" for one in range(5000)), "more than 20 deep"),
    ],
)
def test_aliases_of_aliases_are_bounded(tmp_path, text, said):
    with pytest.raises(ConfigError) as found:
        made(tmp_path, text)
    assert any(said in problem for problem in found.value.problems), found.value.problems


def test_many_names_of_one_list_share_it(tmp_path):
    aliases = made(tmp_path, BIG + "".join(f"a{one}: big\n" for one in range(1000)))
    assert (aliases.leads(f"a999@{HOST}"), len({id(found) for found in aliases._targets.values()})) == (4900, 1)


def test_lists_that_repeat_each_other_are_bounded(tmp_path):
    files = {f"f{one}": "".join(f"u{line}@x.example\n" for line in range(4900)) for one in range(6)}
    files["all"] = "".join(f":include:{tmp_path}/f{one}\n" for one in range(6))
    aliases = made(tmp_path, "a: :include:@@/all\nb: :include:@@/f5\n", **files)
    assert "all:5: leads to the same addresses again and again" in aliases.troubles[0]
    assert (aliases.leads(f"a@{HOST}"), aliases.leads(f"b@{HOST}")) == (UNKNOWN_ALIAS, 4900)


def test_a_list_makes_no_alias_wrong_that_does_not_lead_there(tmp_path):
    """Both lead to the longest chain that is right, and are too deep themselves."""
    text = "a: :include:@@/team\nb: :include:@@/more\n" + "".join(f"c{one}: c{one + 1}\n" for one in range(20))
    aliases = made(tmp_path, text, team="b\n", more="c0\n")
    assert [aliases.leads(f"{one}@{HOST}") for one in ("a", "b", "c0", "c19")] == [UNKNOWN_ALIAS, UNKNOWN_ALIAS, 1, 1]
    waits = "mail for what leads there waits (451)"
    assert aliases.troubles == [f"local.aliases: {one} leads to others more than 20 deep; {waits}" for one in "ba"]


def test_files_that_include_others_too_deep(tmp_path):
    """The way there makes no difference to a file in the middle."""
    files = {f"f{one}": f":include:{tmp_path}/f{one + 1}\n" for one in range(24)} | {"f24": "eve@x.example\n"}
    aliases = made(tmp_path, "a: :include:@@/f0\nb: :include:@@/f15\n", **files)
    assert (aliases.leads(f"a@{HOST}"), aliases.leads(f"b@{HOST}")) == (UNKNOWN_ALIAS, 1)
    assert aliases.troubles[0].startswith(f"{tmp_path}/f4:1: files include others more than 20 deep")
