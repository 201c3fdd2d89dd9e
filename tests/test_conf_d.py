"""A configuration in several files: which value counts, what follows what, and where each mistake is. A new case is one more row.

The files are `r.toml` and those in conf.d beside it; `L` stands for a valid [[listener]] table of two lines."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from relaymta.cli import main
from relaymta.cli.options import Configuration
from relaymta.config import load, notes
from relaymta.errors import ConfigError
from relaymta.route.table import RouteTable, map_notes, unnamed
from tests.support.pages import blocks, section

L = '[[listener]]\naddress = "127.0.0.1:25"\n'
ROUTES = L + '[[route]]\nname = "a"\nhosts = ["a"]\nrecipient_domain = ["a.example"]\n'
DROPPED = "this list takes the place of an earlier one: without 10.0.0.0/8"


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder / "r.toml"


def call(*words: str) -> Result:
    return CliRunner().invoke(main, words)


MISTAKES: list[tuple[dict[str, str], list[str]]] = [
    ({"r.toml": L, "conf.d/a.toml": 'workers = "2"\n'}, ["conf.d/a.toml:1: workers: a whole number, without quotes (it is '2')"]),
    ({"r.toml": "workers = 1\n" + L, "conf.d/a.toml": "workers = 2\n", "conf.d/b.toml": "\nworkers = true\n"},
     ["conf.d/b.toml:2: workers: a whole number, without quotes (it is True) (also in r.toml:1, conf.d/a.toml:1)"]),
    ({"r.toml": L + "[relay]\ndomians = []\n", "conf.d/a.toml": "[relay]\nnetwork = []\n[nothing]\n"},
     ['r.toml:4: relay.domians: no such key (did you mean "domains"?)',
      'conf.d/a.toml:2: relay.network: no such key (did you mean "networks"?)', "conf.d/a.toml:3: nothing: no such key"]),
    # Every file is read, also where another cannot be.
    ({"r.toml": "spool = x\n", "conf.d/a.toml": "[route\n", "conf.d/b.toml": L},
     ['r.toml:1: spool: write the value in quotes: KEY = "VALUE"',
      "conf.d/a.toml:1: the closing ] of the table is missing"]),
    # Tables of several files, in the numbers of all of them.
    ({"r.toml": ROUTES, "conf.d/a.toml": '[[route]]\nhosts = ["b"]\n\n[[route]]\nhots = ["c"]\n'},
     ['conf.d/a.toml:5: route.2.hots: no such key (did you mean "hosts"?)']),
    ({"r.toml": ROUTES, "conf.d/a.toml": '[relay]\nnetworks = []\n[[route]]\nname = "a"\nhosts = ["b"]\n'},
     ["conf.d/a.toml:4: route.1.name: two routes are called 'a': give one of them another name (the other: r.toml:4)"]),
    ({"r.toml": L, "conf.d/a.toml": "\n" + L},
     ["conf.d/a.toml:3: listener.1.address: two listeners have the address '127.0.0.1:25' (the other: r.toml:2)"]),
    ({"r.toml": L, "conf.d/a.toml": '[metrics]\nlisten = "127.0.0.1:25"\n'},
     ["conf.d/a.toml:2: metrics.listen: listener.0.address (127.0.0.1:25) has this port already (the other: r.toml:2)"]),
    ({"r.toml": ROUTES, "conf.d/a.toml": '[[route]]\nhosts = ["b"]\n[route.oauth]\n',
      "conf.d/b.toml": 'route = [{ hots = ["c"] }]'},
     ["conf.d/a.toml:3: route.1.oauth.token_url: is missing", "conf.d/a.toml:3: route.1.oauth.client_id: is missing",
      'conf.d/b.toml:1: route.2.hots: no such key (did you mean "hosts"?)']),
    ({"r.toml": L + '[[filter]]\nname = "v"\ntype = "clamd"\naddress = ["unix:/x"]\n',
      "conf.d/a.toml": '[[filter]]\nname = "w"\ntype = "spamd"\naddress = ["unix:/y"]\n[[filter.score]]\nat = 5\n'},
     ["conf.d/a.toml:5: filter.1.score.0.verdict: is missing"]),
    # What is no table where there must be one counts, in whatever file: else tables would be dropped in silence.
    ({"r.toml": ROUTES, "conf.d/a.toml": '[route]\nhosts = ["b"]\n', "conf.d/b.toml": '[[route]]\nhosts = ["c"]\n'},
     ["conf.d/a.toml:1: route: write [[route]] in double brackets: there can be several (also in r.toml:3, conf.d/b.toml:1)"]),
    ({"r.toml": "relay = 1\n" + L, "conf.d/a.toml": '[relay]\nnetworks = ["10.0.0.0/8"]\n'},
     ["r.toml:1: relay: a table: write [relay] (also in conf.d/a.toml:1)"]),
    ({"r.toml": L + "[filter.score]\nat = 1\n", "conf.d/a.toml": "[[filter.score]]\nat = 1\n"},
     ["r.toml:3: filter: write [[filter]] in double brackets: there can be several (also in conf.d/a.toml:1)"]),
    # A part of a list that does not count is not looked for in the file that has it.
    ({"r.toml": L + '[relay]\nnetworks = [\n "10.0.0.0/8",\n "10.0.0.0/8"]\n', "conf.d/a.toml": '[relay]\nnetworks = ["x/y"]\n'},
     ["conf.d/a.toml:2: relay.networks.0: 'x/y' does not appear to be an IPv4 or IPv6 network (also in r.toml:4)"]),
    ({"r.toml": L, "conf.d/a.toml": '[verify]\ndmarc = "enforce"\n', "conf.d/b.toml": "[verify]\nresults = false\n"},
     ["conf.d/a.toml:2: verify.dmarc: 'enforce' needs verify.results = true: nothing is checked without it"]),
    ({"r.toml": L, "conf.d/a.toml": "a = 1\n", "conf.d/b.toml": "a = 2\n"},
     ["conf.d/b.toml:1: a: no such key (also in conf.d/a.toml:1)"]),
]  # fmt: skip


@pytest.mark.parametrize(("files", "expected"), MISTAKES, ids=lambda value: "" if isinstance(value, dict) else value[0])
def test_a_mistake_is_named_with_the_file_it_is_in(files, expected, tmp_path):
    path = written(tmp_path, files)
    with pytest.raises(ConfigError) as caught:
        RouteTable(load(path, {}))
    found = [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]
    assert len(found) == len(expected)
    assert all(one.startswith(begin) for one, begin in zip(found, expected, strict=True)), found


def value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


@pytest.mark.parametrize(("first", "second", "expected"), [
    ("workers = 1\n" + L, "workers = 2\n", {"workers": 2}),
    (L + "[queue]\nwindow = 200\nmax_age = '2d'\n", "[queue]\nwindow = 300\n", {"queue.window": 300, "queue.max_age": 172800}),
    (L + "[accounts.tokens]\nissuer = 'i'\njwks = 'https://i/'\nuser_claim = 'x'\n", "accounts.tokens.audience = 'y'\n",
     {"accounts.tokens.user_claim": "x", "accounts.tokens.audience": "y"}),
    (L + "[relay]\ndomains = ['a.example', 'b.example']\n", "[relay]\ndomains = ['c.example']\n",
     {"relay.domains": ["c.example"]}),
    (L + "[relay]\ndomains = ['a.example']\n", "[relay]\ndomains = []\n", {"relay.domains": []}),
    (L + "[mailboxes.special]\nA = '\\Sent'\n", "[mailboxes]\nspecial = { B = '\\Junk' }\n",
     {"mailboxes.special": {"B": "\\Junk"}}),
    (ROUTES, '[[route]]\nname = "b"\nhosts = ["b"]\n', {"route.0.name": "a", "route.1.name": "b"}),
    (ROUTES, 'route = [{ name = "b", hosts = ["b"] }]\nlistener = []\n',
     {"route.1.name": "b", "listener.0.address": "127.0.0.1:25"}),
    ("", L, {"listener.0.address": "127.0.0.1:25"}),
])  # fmt: skip
def test_which_value_counts(first, second, expected, tmp_path):
    config = load(written(tmp_path, {"r.toml": first, "conf.d/a.toml": second}), {})
    assert {key: value_at(config, key) for key in expected} == expected


def test_the_command_line_wins_over_all_files(tmp_path):
    path = written(tmp_path, {"r.toml": "workers = 1\n" + ROUTES, "conf.d/a.toml": 'workers = 2\n[[route]]\nhosts = ["b"]\n'})
    config = load(path, {"workers": 3, "route": [{"hosts": ["c"]}]})
    assert (config.workers, [route.hosts for route in config.route]) == (3, [["c"]])
    with pytest.raises(ConfigError) as caught:
        load(path, {"workers": "x"})
    assert caught.value.problems == ["command line: workers: a whole number, without quotes (it is 'x')"]


def test_files_are_read_in_the_order_of_the_octets_of_their_names(tmp_path):
    names = ["10-a.toml", "9-a.toml", "A.toml", "Z.toml", "a.toml", "z.toml", "é.toml"]
    files = {f"conf.d/{name}": f'hostname = "h{number}.example"\n' for number, name in enumerate(names)}
    path = written(tmp_path, {"r.toml": L, **files})
    config = load(path, {})
    assert config.hostname == "h6.example" and [file.name for file in config.files] == ["r.toml", *names]


def test_which_files_are_not_read(tmp_path):
    ignored = [".a.toml", ".#a.toml", "a.toml~", "#a.toml#", "a.toml.dpkg-old", "a.conf", "a.TOML", "README", ".conf", "b.cfg"]
    path = written(tmp_path, {"r.toml": L, **{f"conf.d/{name}": "nonsense" for name in ignored}})
    (tmp_path / "conf.d/below").mkdir()
    (tmp_path / "conf.d/below/a.toml").write_text("nonsense")
    assert load(path, {}).files == [path]
    shown = call("config", "check", "-c", str(path), "--spool", str(tmp_path / "s")).stdout
    marked = [line for line in shown.splitlines() if "not read" in line]
    assert marked == [
        f"note: {tmp_path}/conf.d/{name}: not read: its name does not end in .toml" for name in ("a.TOML", "a.conf", "b.cfg")
    ]


def test_files_of_a_volume_that_are_links_are_read(tmp_path):
    """As Kubernetes shows the keys of a ConfigMap."""
    path = written(tmp_path, {"r.toml": L, "there/a.toml": "workers = 7\n"})
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/..data").symlink_to(tmp_path / "there")
    (tmp_path / "conf.d/a.toml").symlink_to("..data/a.toml")
    assert load(path, {}).workers == 7


def test_what_cannot_be_read_is_named(tmp_path):
    path = written(tmp_path, {"r.toml": L, "conf.d/a.toml": "workers = 2\n", "conf.d/u.toml": "\xff"})
    folder = tmp_path / "conf.d"
    (folder / "u.toml").write_bytes(b"a = 1\n\xff")
    (folder / "d.toml").mkdir()
    (folder / "gone.toml").symlink_to("nothing")
    os.mkfifo(folder / "p.toml")
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert caught.value.problems == [
        f"{folder}/d.toml: not a plain file",
        f"{folder}/gone.toml: No such file or directory",
        f"{folder}/p.toml: not a plain file",
        f"{folder}/u.toml:2: not UTF-8: save it as UTF-8",
    ]
    shutil.rmtree(folder)
    for make, why in ((lambda: folder.symlink_to("nothing"), "No such file or directory"), (folder.touch, "Not a directory")):
        make()
        with pytest.raises(ConfigError) as caught:
            load(path, {})
        assert caught.value.problems == [f"{folder}: {why}"]
        folder.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_a_folder_that_may_not_be_read_is_an_error_and_one_of_another_user_in_tmp(tmp_path):
    outside = Path(tempfile.mkdtemp())
    try:
        outside.chmod(0o777 | 0o1000)
        path = written(outside, {"r.toml": L, "conf.d/a.toml": "workers = 2\n"})
        folder = outside / "conf.d"
        folder.chmod(0)
        child = os.fork()
        if not child:
            os.setuid(65534)
            try:
                load(path, {})
            except ConfigError as error:
                os._exit(0 if error.problems == [f"{folder}: Permission denied"] else 2)
            os._exit(3)
        assert os.waitpid(child, 0)[1] == 0
        folder.chmod(0o755)
        os.chown(folder, 65534, -1)
        with pytest.raises(ConfigError) as caught:
            load(path, {})
        assert caught.value.problems == [f"{folder}: another user's, and others can write to {outside}: it is not read"]
        os.chown(path, 65534, -1)
        assert load(path, {}).workers == 2, "whose file it is"
        os.chown(path, 0, -1)
        outside.chmod(0o755)
        assert load(path, {}).workers == 2, "where only root can write"
    finally:
        shutil.rmtree(outside)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_check_says_what_the_relays_user_could_not_read_at_a_reload(tmp_path):
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        path = written(folder, {"r.toml": 'user = "nobody"\n' + L.replace(":25", ":2599"), "conf.d/a.toml": "workers = 2\n"})
        (folder / "conf.d/a.toml").chmod(0o600)
        child = os.fork()
        if not child:
            shown = call("config", "check", "-c", str(path), "--spool", str(folder / "s")).output
            os._exit(0 if f"note: {folder}/conf.d/a.toml: nobody cannot read it: a reload would be refused" in shown else 2)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(("second", "expected"), [
    ('[relay]\nnetworks = ["127.0.0.0/8"]\n', [f"conf.d/a.toml:2: relay.networks: {DROPPED} (also in r.toml:4)"]),
    ('[relay]\nnetworks = ["10.0.0.0/8", "192.168.0.0/16", "127.0.0.0/8"]\n', []),
    ('[[route]]\nhosts = ["b"]\n', []),
    ('[[route]]\nname = "b"\nhosts = ["b"]\n[[route]]\nname = "c"\nhosts = ["c"]\n',
     ["conf.d/a.toml:4: route.1: 'c' is never used: route.0 ('b') has no condition and comes first"]),
])  # fmt: skip
def test_probable_mistakes(second, expected, tmp_path):
    path = written(tmp_path, {"r.toml": L + '[relay]\nnetworks = ["127.0.0.0/8", "10.0.0.0/8"]\n', "conf.d/a.toml": second})
    assert [note.replace(f"{tmp_path}/", "") for note in notes(load(path, {}))] == expected


def test_a_route_behind_one_without_conditions_is_named_with_both_files(tmp_path):
    path = written(
        tmp_path, {"r.toml": L + '[[route]]\nname = "all"\nhosts = ["x"]\n', "conf.d/a.toml": '\n[[route]]\nhosts = ["b"]\n'}
    )
    what = "route.1: 'b' is never used: route.0 ('all') has no condition and comes first"
    assert notes(load(path, {})) == [f"{tmp_path}/conf.d/a.toml:2: {what} (the other: {tmp_path}/r.toml:3)"]
    (tmp_path / "map").write_text("a.example all\n")
    config = load(path, {"route_map": str(tmp_path / "map")})
    assert notes(config) == [] and [*map_notes(config), *unnamed(config)] == [
        f"{tmp_path}/conf.d/a.toml:2: {what} (the other: {tmp_path}/r.toml:3)"
    ]


def test_config_show_says_where_each_key_was_given(tmp_path):
    path = written(tmp_path, {
        "r.toml": 'workers = 1\nspool = "/s"\n' + ROUTES,
        "conf.d/a.toml": 'workers = 2\n[[route]]\nhosts = [\n "b",\n]\n[limits]\n',
    })  # fmt: skip
    words = ("config", "show", "--origin", "-c", str(path), "--set", "queue.max_age='5d'")
    lines = [line.replace(f"{tmp_path}/", "") for line in call(*words).stdout.splitlines()]
    assert lines == [
        "conf.d/a.toml:1: workers = 2  # also in r.toml:1",
        'r.toml:2: spool = "/s"',
        'r.toml:4: listener.0.address = "127.0.0.1:25"',
        'r.toml:6: route.0.name = "a"',
        'r.toml:8: route.0.recipient_domain = ["a.example"]',
        'r.toml:7: route.0.hosts = ["a"]',
        'conf.d/a.toml:3: route.1.hosts = ["b"]',
        "command line: queue.max_age = 432000",
    ]
    found = [json.loads(line) for line in call(*words, "--json").stdout.splitlines()]
    assert len(found) == len(lines) and found[-1] == {"key": "queue.max_age", "value": 432000.0, "places": []}
    places = [{"file": f"{tmp_path}/conf.d/a.toml", "line": 1}, {"file": f"{tmp_path}/r.toml", "line": 1}]
    assert found[0] == {"key": "workers", "value": 2, "places": places}


@pytest.mark.parametrize(("first", "second", "overrides", "expected"), [
    ('spool = "/a"\n', "", {}, "/a/control.sock"),
    ('spool = "/a"\n', 'spool = "/b"\n', {}, "/b/control.sock"),
    ('spool = "/a"\n[control]\nsocket = "/x"\n', "[control]\ngroup = 'g'\n", {}, "/x"),
    ('spool = "/a"\n[control]\nsocket = "/x"\n', 'control.socket = ""\n', {}, "/a/control.sock"),
    ("", '[control]\nsocket = "/y"\n', {"spool": "/c"}, "/y"),
    ('spool = "/a"\n', "", {"spool": "/c"}, "/c/control.sock"),
    ('spool = "/a"\n', '[control]\nsocket = "/y"\n', {"control.socket": "/z"}, "/z"),
    ('spool = "/a"\n', "spool = 1\n", {}, None),
    ('spool = "/a"\n', "control = 1\n", {}, None),
    ('spool = "/a"\n', "[control\n", {}, None),
])  # fmt: skip
def test_the_control_socket_is_found_without_the_whole_configuration(first, second, overrides, expected, tmp_path):
    path = written(tmp_path, {"r.toml": first + "unknown = 1\n" * (first.count("[") == 0), "conf.d/a.toml": second})
    found = Configuration(path, overrides).control_path()
    assert found == (None if expected is None else Path(expected))


def test_the_example_of_the_page_is_valid_and_works(tmp_path):
    (example,) = blocks(section("cli.md", "A configuration in several files: conf.d"))
    assert example.startswith("# /etc/relaymta/conf.d/50-shop.toml\n")
    config = load(written(tmp_path, {"r.toml": L + "[limits]\nmessage_size = 1000\n", "conf.d/50-shop.toml": example}), {})
    assert config.limits.message_size == 100 << 20 and config.network[0].application == "shop" and notes(config) == []
