"""How main.cf, master.cf and tables of Postfix are read: as postconf(1) and postmap(1) of the installed Postfix read them."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.cli.postfix.beside import Beside
from relaymta.cli.postfix.carry import carry
from relaymta.cli.postfix.conditions import Condition
from relaymta.cli.postfix.defaults import DEFAULTS
from relaymta.cli.postfix.expansion import BadExpansion, expand
from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.findings import Findings
from relaymta.cli.postfix.lines import Place, logical_lines
from relaymta.cli.postfix.main_cf import Scope, Setting, read_main
from relaymta.cli.postfix.maps import opened
from relaymta.cli.postfix.master_cf import read_master
from relaymta.cli.postfix.networks import Networks
from relaymta.cli.postfix.patterns import plain_conditions
from relaymta.cli.postfix.restrictions import Access
from relaymta.errors import ConfigError
from tests.support.programs import need

PLACE = Place("main.cf", 1)
MAIN = """\
# a comment
myhostname = mail.a.example   # part of the value
mydomain = $one
one = a.example
   # within
mydestination = one,
  two,
# at the left margin

\tthree
relayhost = first
relayhost = ${one}/$(one)/$one-
relay_domains = ${one?yes}${nothing?no}${one:no}${nothing:yes}
virtual_alias_domains = ${one?{yes}:{no}} ${nothing?{yes}:{no}} ${nothing:{ {a} }} ${one?{<$mydomain>}}
virtual_mailbox_domains = ${{$one} == {a.example} ? {same} : {other}} ${{9} < {10} ? {9} : {10}} ${{b} < {a} ? {b} : {a}}
mynetworks = ${{$compatibility_level} <level {3.6} ? {old} : {new}} ${{3.10} >=level {3.9} ? {new} : {old}}
compatibility_level = 3.5
smtpd_banner = $$one
transport_maps =
local_transport = a   b
one=b.example
  continued
mail_owner = postfix
smtpd_client_restrictions = $mydestination, ${transport_maps:none}
"""


def scope_of(folder: Path, main: str, **overrides: str) -> Scope:
    (folder / "main.cf").write_text(main)
    settings = {name: Setting(name, raw, PLACE) for name, raw in overrides.items()}
    return Scope(read_main(Files(folder)), settings, "mail.a.example")


def test_values_are_those_of_postconf(tmp_path):
    need("postconf")
    scope = scope_of(tmp_path, MAIN)
    done = subprocess.run(["postconf", "-c", tmp_path, "-xn"], capture_output=True, text=True, check=True)
    theirs = dict(line.partition(" =")[::2] for line in done.stdout.splitlines())
    del theirs["config_directory"]  # as it was given to postconf
    assert len(theirs) > 12, "those that Postfix does not know are not shown"
    assert {name: " ".join(scope.text(name).split()) for name in theirs} == {
        name: " ".join(value.split()) for name, value in theirs.items()
    }
    assert scope.place("mydestination", "three") == ("main.cf", 10) and scope.place("relayhost") == ("main.cf", 12)


def test_defaults_are_those_of_postconf():
    need("postconf")
    done = subprocess.run(["postconf", "-d", "mail_version", *DEFAULTS], capture_output=True, text=True, check=False)
    theirs = dict(line.partition(" =")[::2] for line in done.stdout.splitlines())
    if not theirs["mail_version"].startswith(" 3.7."):
        pytest.skip(f"they are those of 3.7, and this is{theirs['mail_version']}")
    assert {name: theirs[name].strip() for name in DEFAULTS if name in theirs} == {
        name: DEFAULTS[name] for name in theirs if name in DEFAULTS
    }
    assert len(theirs) >= len(DEFAULTS)


@pytest.mark.parametrize(
    "text",
    ["${one", "$(one", "$", "a$ b", "${}", "${one?{a}b}", "${{a} ~ {b}?c}", "${{a} == b}", "${one!}", "${{a} <level {x}?y}"],
)
def test_what_is_no_value_is_refused(text):
    with pytest.raises(BadExpansion):
        expand(text, {"one": "1"}.get, {"one": "1"}.__getitem__)


def test_a_line_belongs_to_the_one_before_it():
    lines = list(logical_lines("  nothing before\na = 1\n\n# x\n  2\n\t#y\nb\n   \n"))
    assert [(line.number, line.text) for line in lines] == [(2, "a = 1  2"), (7, "b")]
    assert lines[0].number_at(0) == 2 and lines[0].number_at(7) == 5


TABLES = {
    "texthash:{}/pairs": ["ann@a.example", "ANN@a.example", "twice", "nothing", '"ann b"@a.example', "#no", "last"],
    "regexp:{}/expressions": [
        "ann@a.example", "Bob@b.example", "x@c.example", "ann@d.example", "bob@d.example", "a/b@e.example", "CASE@f.example",
        "digits12@g.example", "none@h.example",
    ],
    "cidr:{}/networks": ["10.1.2.3", "10.1.2.4", "10.9.9.9", "192.168.1.1", "2001:db8::1", "2001:db9::1", "nothing"],
    "inline:{{ a=1, {{b = two words}} c=3 }}": ["a", "b", "c", "d"],
    "static:{{always this}}": ["a", "b"],
    "unionmap:{{inline:{{a=1}},inline:{{a=2, b=3}},static:s}}": ["a", "b", "c"],
}  # fmt: skip
PAIRS = """\
# keys are compared in lower case
Ann@a.example   first
twice           one
   and more
twice           two
nothing
"ann b"@a.example  quoted
#no             no
last\tvalue  with   blanks \t
"""
EXPRESSIONS = r"""
/^ann@a/        one
!/@(a|b|c|d|e|f|g)\./   not one of these
/^bob@b\.example$/ two
if /@d\.example$/
if !/^ann/
/./             within two
endif
/./             within one
endif
|a/b@e|         other delimiters
/^case@f/i      as it is written
/^CASE@f/i      upper case
/^digits[[:digit:]]+@/  a class
"""
NETWORKS = """\
10.1.2.3        host
!10.0.0.0/8     not ten
if 10.0.0.0/8
10.1.0.0/16     within
endif
10.0.0.0/8      ten
2001:db8::/32   six
"""


@pytest.mark.parametrize("spec", TABLES)
def test_tables_answer_as_postmap(tmp_path, spec):
    need("postmap")
    for name, text in (("pairs", PAIRS), ("expressions", EXPRESSIONS), ("networks", NETWORKS)):
        (tmp_path / name).write_text(text)
    (tmp_path / "main.cf").write_text("")
    keys, spec = TABLES[spec], spec.format(tmp_path)
    table = opened(Files(tmp_path, Path("/")), spec, PLACE)
    found = {key: entry.value for key, entry in ((key, table.get(key)) for key in keys) if entry is not None}
    command = ["postmap", "-c", tmp_path, "-q", "-", spec]
    done = subprocess.run(command, input="\n".join(keys), capture_output=True, text=True, check=False)
    theirs = dict(line.split("\t", 1) for line in done.stdout.splitlines())
    if spec.startswith("cidr:"):  # what is within if ... endif is left out here
        theirs = {key: value for key, value in theirs.items() if value != "within"}
        found = {key: value for key, value in found.items() if key in theirs}
    assert found == theirs and len(theirs) >= 2


def test_tables_that_cannot_be_read_say_why(tmp_path):
    files = Files(tmp_path)
    for spec, why in (
        ("hash:/etc/postfix/none", "none: No such file or directory"), ("/etc/postfix/x", "it is no type:name"),
        ("proxy:mysql:/etc/postfix/x.cf", "a database or service is not read"),
        ("hash:/elsewhere/x", "/elsewhere/x: it is not in this folder: import with --root DIR"),
        ("pipemap:{hash:/a,hash:/b}", "a table of type pipemap is not read"),
    ):  # fmt: skip
        table = opened(files, spec, PLACE)
        assert table.get("x") is None and why in table.why, spec


def test_services_are_those_of_postconf(tmp_path):
    need("postconf")
    (tmp_path / "main.cf").write_text("")
    text = """\
smtp      inet  n       -       y       -       -       smtpd
  -o smtpd_sasl_auth_enable=yes -o { smtpd_relay_restrictions = permit_mynetworks, reject }
# between
  -o syslog_name=postfix/x
  -v
127.0.0.1:10025 inet n - n - 4 smtpd -o mynetworks=127.0.0.0/8
list      unix  -       n       n       -       -       pipe
  flags=R user=list argv=/usr/lib/list ${nexthop}
"""
    (tmp_path / "master.cf").write_text(text)
    done = subprocess.run(["postconf", "-c", tmp_path, "-P"], capture_output=True, text=True, check=True)
    theirs = {line.partition(" = ")[::2] for line in done.stdout.splitlines()}
    services = read_master(Files(tmp_path))
    assert {
        (f"{one.name}/{one.kind}/{name}", setting.raw) for one in services for name, setting in one.overrides.items()
    } == theirs
    assert [(one.name, one.limit, one.command, one.place.line) for one in services] == [
        ("smtp", None, "smtpd", 1), ("127.0.0.1:10025", 4, "smtpd", 6), ("list", None, "pipe", 7)
    ]  # fmt: skip
    assert services[0].overrides["syslog_name"].place.line == 4 and services[2].rest[2] == "argv=/usr/lib/list"


@pytest.mark.parametrize(
    ("expression", "conditions"),
    [
        (r"@a\.example$", [("domain", "a.example")]),
        (r"^.*@a\.example$", [("domain", "a.example")]),
        (r"^ann@a\.example$", [("address", "ann@a.example")]),
        (r"@(.*\.)?a\.example$", [("domain", "a.example"), ("below", "a.example")]),
        (r"[@.]a\.example$", [("domain", "a.example"), ("below", "a.example")]),
        (r"\.a\.example$", [("below", "a.example")]),
        (".*", [("any", "")]),
        ("^ann", []),
        (r"a\.example$", []),
        (r"@a\.example", []),
        (r"^(ann|bob)@a\.example$", []),
    ],
)
def test_expressions_that_are_no_more_than_a_condition(expression, conditions):
    assert plain_conditions(expression) == [Condition(*one) for one in conditions]


@pytest.mark.parametrize(
    ("text", "inside", "exceptions", "gaps"),
    [
        ("127.0.0.0/8, [::1]/128 [fd00::]/8", ["127.0.0.0/8", "::1/128", "fd00::/8"], [], 0),
        ("10.1.2.3 10.0.0.0/8", ["10.1.2.3/32", "10.0.0.0/8"], [], 0),
        ("127.0.0.0/8 [::ffff:127.0.0.0]/104", ["127.0.0.0/8"], [], 0),
        ("[::ffff:10.0.0.0]/104", [], [], 0),  # Postfix finds no client by it
        ("!10.1.2.3, 10.0.0.0/8", ["10.0.0.0/8"], [(False, ["10.1.2.3/32"])], 0),
        ("10.0.0.0/8, !10.1.2.3", ["10.0.0.0/8"], [], 0),  # the first that matches decides
        ("!10.0.0.0/8, 10.1.2.3", [], [(False, ["10.0.0.0/8"])], 0),
        ("10.1.2.3, 192.0.2.1, !10.1.0.0/16, 10.0.0.0/8", ["10.1.2.3/32", "192.0.2.1/32", "10.0.0.0/8"],
         [(True, ["10.1.2.3/32"]), (False, ["10.1.0.0/16"])], 0),
        ("10.0.0.1/8", [], [], 1),
        ("host.example", [], [], 1),
        ("!host.example 10.0.0.0/8", [], [], 2),  # who is excluded is not known
        ("!/etc/postfix/missing 10.0.0.0/8", [], [], 2),
        ("cidr:/etc/postfix/networks", ["10.0.0.0/8", "192.0.2.0/24"], [], 1),
        ("!cidr:/etc/postfix/networks 10.0.0.0/7", [], [(False, ["10.0.0.0/8", "192.0.2.0/24"])], 2),
        ("hash:/etc/postfix/addresses", ["192.0.2.1/32"], [], 1),  # a table is asked about addresses
        ("/etc/postfix/list", ["10.0.0.0/8", "11.2.0.0/16"], [], 0),
        ("mysql:/etc/postfix/x.cf", [], [], 1),
    ],
)  # fmt: skip
def test_networks(tmp_path, text, inside, exceptions, gaps):
    (tmp_path / "networks").write_text("10.0.0.0/8 OK\n!172.16.0.0/12 OK\n192.0.2.0/24 OK\n")
    (tmp_path / "list").write_text("10.0.0.0/8\n# x\n11.2.0.0/16\n/etc/postfix/list\n")
    (tmp_path / "addresses").write_text("192.0.2.1 OK\n10.0.0.0/8 OK\n")
    findings = Findings()
    found = Networks.read(scope_of(tmp_path, f"mynetworks = {text}\n"), Files(tmp_path), findings)
    got = [(not one.excluded, one.names) for one in found.exceptions()]
    assert (found.inside, got, len(findings.of("gap"))) == (inside, exceptions, gaps)


def test_the_networks_of_the_machine_are_not_known(tmp_path):
    findings = Findings()
    assert Networks.read(scope_of(tmp_path, "mynetworks_style = host\n"), Files(tmp_path), findings).inside == [
        "127.0.0.0/8",
        "::1/128",
    ]
    assert findings.complete
    Networks.read(scope_of(tmp_path, "compatibility_level = 0\n"), Files(tmp_path), findings)
    assert [one.what for one in findings.of("gap")] == ["mynetworks_style = subnet, and no mynetworks"]


@pytest.mark.parametrize(
    ("text", "login", "networks", "anybody"),
    [
        ("permit_sasl_authenticated, reject", True, False, False),
        ("reject_unknown_sender_domain permit_sasl_authenticated reject", True, False, False),
        ("permit_mynetworks, permit_sasl_authenticated, reject", False, True, False),
        ("permit_mynetworks, reject_unauth_destination, permit", False, True, False),
        ("reject_unauth_destination, permit_mynetworks", False, False, False),
        ("permit", False, True, True),
        ("check_client_access hash:/x, permit, reject_unauth_destination", False, True, True),
        ("warn_if_reject reject, permit_mynetworks, defer_unauth_destination", False, True, False),
        ("warn_if_reject mine, permit", False, True, True),
        ("mine, reject", False, True, False),
        ("", False, True, True),
    ],
)
def test_restrictions(tmp_path, text, login, networks, anybody):
    main = f"smtpd_relay_restrictions = {text}\nsmtpd_restriction_classes = mine\nmine = permit_mynetworks, mine, reject\n"
    found = Access(scope_of(tmp_path, main))
    assert (found.need_login, found.relays("network"), found.relays("anybody")) == (login, networks, anybody)


# Each would take for ever, or all of the stack, if it were read as it is written.
ENDLESS = {
    "names that double": ("".join(f"x{n}=$x{n + 1}$x{n + 1}\n" for n in range(90)) + "x90=\nrelayhost=$x0\n", True),
    "a value that doubles": ("".join(f"x{n}=$x{n + 1}$x{n + 1}\n" for n in range(90)) + "x90=a\nrelayhost=$x0\n", False),
    "a circle": ("relayhost=$x\nx=$y\ny=$x\n", False),
    "a circle of hosts": ("myhostname=$mydomain\n", False),
    "a list in itself": ("mynetworks=/etc/postfix/list\nrelay_domains=/etc/postfix/list\n", True),
    "classes": ("smtpd_restriction_classes=a b c\na=" + "b " * 99 + "\nb=" + "c " * 99 + "\nc=" + "a permit " * 99
                + "\nsmtpd_client_restrictions=a\n", True),
    "tables in tables": ("transport_maps=" + "unionmap:{" * 5000 + "}" * 5000 + "\n", True),
    "a proxy of a proxy": ("transport_maps=" + "proxy:" * 50000 + "hash:/x\n", True),
    "backtracking": ("relocated_maps=pcre:/etc/postfix/slow\n", True),
    "a transport that is itself": ("mailbox_transport=local\n", True),
    "brackets": ("x=" + "${{" * 50000 + "\nrelayhost=$x\n", False),
    "octets": ("\0\xff" * 100000, False),
    "a chain of aliases": ("mydestination=kept.example\nvirtual_alias_maps=inline:{" + " ".join(
        f"u{n}@kept.example=u{n + 1}@kept.example" for n in range(5000)) + "}\n", True),
    "names of a table of everything": ("relay_domains=" + " ".join(f"d{n}.example" for n in range(5000)) + "\n", True),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_is_read_or_refused(tmp_path, name):
    text, is_read = ENDLESS[name]
    (tmp_path / "main.cf").write_text(f"alias_maps=\n{text}")
    (tmp_path / "list").write_text("/etc/postfix/list /etc/postfix/list\n" * 50)
    (tmp_path / "slow").write_text(f"/^([a-z-]+)+$/ x\n/(.*)*(.*)*(.*)*!/ x\n/^{'(a?)' * 200}b/ x\n")
    try:
        carry(Files(tmp_path), Beside("/s", "/f"), lambda name: None, "mail.a.example")
    except ConfigError as error:
        assert not is_read and len(error.problems[0]) < 300
    else:
        assert is_read


def findings_of(folder: Path, main: str, master: str = "", usual: str = "smtp inet n - - - - smtpd") -> list[str]:
    services = [f"{name} unix - - - - - {name}" for name in ("smtp", "local", "error", "lmtp", "virtual")]
    (folder / "main.cf").write_text(f"mydestination=\nmynetworks=127.0.0.0/8\nalias_maps=\n{main}\n")
    (folder / "master.cf").write_text("\n".join([usual, *services, master, ""]))
    found = carry(Files(folder), Beside("/s", "/f"), lambda name: None, "mail.a.example")
    return [f"{one.kind} {one.place}: {one.what}" for one in found.findings.ordered]


@pytest.mark.parametrize(
    ("main", "master", "said"),
    [
        ("smtpd_recipients_restrictions=reject", "", "gap main.cf:4: smtpd_recipients_restrictions = reject"),
        ("soft_bounce=yes", "", "gap main.cf:4: soft_bounce = yes"),
        ("smtp_discard_ehlo_keywords=chunking, dsn", "", "gap main.cf:4: smtp_discard_ehlo_keywords = dsn"),
        ("relayhost=[h.example]\nsmtp_tls_policy_maps=inline:{{[h.example]=verify match=foo.example}}", "",
         "gap main.cf:5: smtp_tls_policy_maps: [h.example] verify match=foo.example"),
        ("disable_dns_lookups=yes", "", "way main.cf:4: disable_dns_lookups = yes"),
        ("slow_destination_rate_delay=1s", "", "note main.cf:4: slow_destination_rate_delay = 1s"),
        ("mydestination=m.example\nmailbox_transport_maps=hash:/x", "", "way main.cf:5: mailbox_transport_maps = hash:/x"),
        ("smtpd_restriction_classes=mine\nmine=reject", "", "gap main.cf:5: mine = reject"),
        ("", "sub unix n - - - 0 cleanup\n -o header_checks=pcre:/x", "gap master.cf:8: sub: header_checks = pcre:/x"),
        ("", "25 inet n - - - - smtpd -o message_size_limit=1000", "gap master.cf:7: 25: message_size_limit = 1000"),
        ("smtpd_sasl_auth_enable=yes", "587 inet n - - - - smtpd\n -o smtpd_tls_cert_file=/c -o smtpd_sasl_path=/e",
         "gap master.cf:8: 587: smtpd_sasl_path = /e"),
        ("relayhost=[a.example]\nsmtp_fallback_relay=[b.example]\nsmtp_sasl_auth_enable=yes\n"
         "smtp_sasl_password_maps=inline:{a.example=me:pw}", "", "way main.cf:7: b.example:25 beside a.example:25"),
        ("my_password=topsecret", "", "gap main.cf:4: my_password = ..."),
        ("foo=\x1b[31mred\0", "", "gap main.cf:4: foo = \x1b[31mred\0"),
    ],
)  # fmt: skip
def test_nothing_is_left_out_without_a_word(tmp_path, main, master, said):
    assert said in findings_of(tmp_path, main, master)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "pw").write_bytes(b"h.example me:p\xff\n")
    os.mkfifo(tmp_path / "fifo")
    said = findings_of(tmp_path, "transport_maps=hash:/etc/postfix/fifo\nrelocated_maps=hash:/etc/postfix/pw")
    assert "gap pw: octets that are not UTF-8" in said
    assert "way main.cf:4: transport_maps = hash:/etc/postfix/fifo" in said


def test_what_is_said_of_any_text_is_a_comment(tmp_path):
    (tmp_path / "main.cf").write_text("foo=\x1b[31mred\0\u2028\x85x\n")
    found = carry(Files(tmp_path), Beside("/s", "/f"), lambda name: None, "mail.a.example").findings.ordered
    assert any(re.search(r"foo = +\[31mred +x", str(one)) for one in found) and all(str(one).isprintable() for one in found)


words = st.text(alphabet="ab.@:=,;!/$(){}[]?*+-_ \n\t#\"'\\1", max_size=30)
names = st.sampled_from(
    sorted(name for name in DEFAULTS if re.search("maps|domains|host|restrictions|transport|networks|filter|origin", name))
)


@given(st.dictionaries(names, words), words, words)
def test_whatever_is_written_there_nothing_but_what_is_meant_is_raised(tmp_path_factory, values, table, service):
    folder = tmp_path_factory.mktemp("any")
    main = "".join(f"{name} = {' '.join(value.split())}\n" for name, value in values.items())
    (folder / "main.cf").write_text(f"{main}transport_maps = hash:/etc/postfix/t, pcre:/etc/postfix/t\n")
    (folder / "t").write_text(table)
    (folder / "master.cf").write_text(f"smtp inet n - n - - smtpd -o {' '.join(service.split())}\nsmtp unix - - n - - smtp\n")
    try:
        carry(Files(folder), Beside("/s", "/f"), lambda name: None, "mail.a.example")
    except ConfigError as error:
        assert error.problems
