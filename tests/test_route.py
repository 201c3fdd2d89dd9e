"""Routes and MX resolution, with a resolver that answers from a dictionary."""

import json

import pytest
from click.testing import CliRunner

from relaymta.cli import main
from relaymta.config import Config
from relaymta.dns import DnsFailure, NoData, NoSuchName
from relaymta.proto.envelope import Envelope, QueueName
from relaymta.proto.mailbox import Malformed
from relaymta.route.mx import Hosts, NoRoute, mx_hosts, roll_up, targets
from relaymta.route.sites import Sites, counted_as
from relaymta.route.table import Asked, RouteTable


class Dictionary:
    """A resolver: answers by (name, type); NXDOMAIN for all others."""

    def __init__(self, answers: dict) -> None:
        self.answers = answers

    def _get(self, name: str, kind: str):
        found = self.answers.get((name, kind), NoSuchName(name))
        if isinstance(found, Exception):
            raise found
        return found

    def now(self) -> float:
        return 0.0

    async def mx(self, domain: str):
        return self._get(domain, "MX"), 300.0

    async def addresses(self, host: str, families: str):
        return self._get(host, "A")


async def hosts(answers: dict, domain: str = "d.example", ourselves: frozenset = frozenset()) -> list[str]:
    resolver = Dictionary(answers)
    return [t.host for t in await targets(resolver, await mx_hosts(resolver, domain, set(ourselves)), "64")]


async def test_order_and_shuffle():
    answers = {("d.example", "MX"): [(20, "c"), (10, "a"), (10, "b")], **{(h, "A"): ["192.0.2.1"] for h in "abc"}}
    seen = {tuple(await hosts(answers)) for _ in range(50)}
    assert seen == {("a", "b", "c"), ("b", "a", "c")}


@pytest.mark.parametrize(
    ("answers", "permanent", "enhanced"),
    [
        ({("d.example", "MX"): [(0, "")]}, True, "5.1.10"),
        ({}, True, "5.1.2"),
        ({("d.example", "MX"): DnsFailure("servfail")}, False, "4.4.3"),
        ({("d.example", "MX"): [(10, "gone")]}, True, "5.4.4"),
        ({("d.example", "MX"): [(10, "a")], ("a", "A"): DnsFailure("timeout")}, False, "4.4.3"),
        ({("d.example", "MX"): [(10, "us"), (20, "them")], ("them", "A"): ["192.0.2.1"]}, True, "5.4.6"),
    ],
)
async def test_no_route(answers, permanent, enhanced):
    with pytest.raises(NoRoute) as caught:
        await hosts(answers, ourselves=frozenset({"us"}))
    assert (caught.value.permanent, caught.value.enhanced) == (permanent, enhanced)


@pytest.mark.parametrize(("count", "asked", "permanent"), [(1000, 30, True), (1000, 5, False), (3, 3, False), (29, 29, True)])
async def test_an_answer_with_a_thousand_exchanges_is_bounded(count, asked, permanent):
    """The number of address lookups of one attempt when no host has an address, or all lookups fail."""
    questions: list[str] = []

    class Asked(Dictionary):
        async def addresses(self, host: str, families: str):
            questions.append(host)
            raise NoData(host) if permanent else DnsFailure("timeout")

    resolver = Asked({("d.example", "MX"): [(number, f"{number:04}.{'x' * 60}.example") for number in range(count)]})
    found = await mx_hosts(resolver, "d.example", set())
    assert found.names[:3] == [f"{number:04}.{'x' * 60}.example" for number in range(3)]
    assert len(roll_up(found)) < 10_000
    with pytest.raises(NoRoute) as caught:
        await targets(resolver, found, "64")
    assert (len(questions), caught.value.permanent) == (asked, permanent)
    assert len(caught.value.public) < 10_000


async def test_implicit_mx_literals_and_ourselves_as_backup():
    assert await hosts({("d.example", "MX"): NoData("x"), ("d.example", "A"): ["192.0.2.1"]}) == ["d.example"]
    assert await hosts({}, "[192.0.2.7]") == ["[192.0.2.7]"]
    backup = {("d.example", "MX"): [(10, "main"), (20, "us")], ("main", "A"): ["192.0.2.1"]}
    assert await hosts(backup, ourselves=frozenset({"us"})) == ["main"]


def table(*routes: dict) -> RouteTable:
    return RouteTable(Config.model_validate({"listener": [{"address": "127.0.0.1:25"}], "route": list(routes)}))


def mail(*recipients: str, sender: str = "a@b.example", application: str = "", listener: str = "") -> Envelope:
    return Envelope(sender, list(recipients), 1, 0, 0, 0, application=application, listener=listener)


def test_the_first_route_that_matches_is_used():
    routes = table(
        {"name": "shop", "application": ["shop"], "hosts": ["h1"]},
        {"name": "from", "sender_domain": ["boss.example"], "hosts": ["h2"]},
        {"name": "to", "recipient_domain": [".corp.example", "one.example"], "hosts": ["h3"]},
    )

    def names(envelope: Envelope) -> list[tuple[str, object]]:
        return [(str(name), indexes) for name, indexes in routes.assign(envelope)]

    assert names(mail("x@y", application="shop")) == [("shop//shop", None)]
    assert names(mail("x@y", sender="me@boss.example")) == [("from", None)]
    assert names(mail("x@a.corp.example", "y@one.example")) == [("to", None)]
    assert names(mail("x@one.example", "y@other.example", "z@OTHER.example")) == [("to", [0]), ("mx/other.example", [1, 2])]


def test_idna_domains_are_looked_up_as_a_labels():
    (pair,) = table().assign(mail("x@bücher.example"))
    assert pair[0].domain == "xn--bcher-kva.example"


@pytest.mark.parametrize(
    ("condition", "matching", "other"),
    [
        ({"sender": ["Joe@B.example"]}, mail("x@y", sender="joe@b.example"), mail("x@y", sender="jim@b.example")),
        ({"sender": [""]}, mail("x@y", sender=""), mail("x@y")),
        ({"sender_domain": [".b.example"]}, mail("x@y", sender="a@sub.b.example"), mail("x@y", sender="a@xb.example")),
        ({"recipient": ["X@y"]}, mail("x@Y"), mail("z@y")),
        ({"recipient_domain": [".y"]}, mail("x@a.y"), mail("x@ay")),
        ({"recipient_domain": ["bücher.test"]}, mail("x@xn--bcher-kva.test"), mail("x@b\uff55cher.test")),
        ({"recipient_domain": ["xn--bcher-kva.test"]}, mail("x@BÜCHER.test"), mail("x@bücher.test.test")),
        # What the DNS is asked for decides (UTS 46), as it does where mail is delivered.
        ({"recipient_domain": ["bücher.test"]}, mail("x@bücher。test"), mail("x@bücher")),
        ({"recipient_domain": ["bu\u0308cher.test"]}, mail("x@bücher.test"), mail("x@bucher.test")),
        ({"recipient_domain": [".ours.test"]}, mail("x@a.ｏurs.test"), mail("x@аours.test")),
        ({"recipient_domain": [".bücher.test"]}, mail("x@a.xn--bcher-kva.test"), mail("x@axn--bcher-kva.test")),
        ({"sender_domain": [".xn--bcher-kva.test"]}, mail("x@y", sender="a@ä.bücher.test"), mail("x@y", sender="a@bucher.test")),
        ({"recipient": ["Ä@bücher.test"]}, mail("ä@xn--bcher-kva.test"), mail("a@bücher.test")),
        ({"sender": ["a@xn--bcher-kva.test"]}, mail("x@y", sender="A@bücher.test"), mail("x@y", sender="a@bücher.test.test")),
        ({"listener": ["127.0.0.1:25"]}, mail("x@y", listener="127.0.0.1:25"), mail("x@y", listener="127.0.0.1:10025")),
        ({"listener": ["127.0.0.1:25"]}, mail("x@y", listener="127.0.0.1:25"), mail("x@y")),  # a DSN of ours
        ({"application": ["shop"]}, mail("x@y", application="shop"), mail("x@y")),
        ({"min_size": 2}, Envelope("a@b", ["x@y"], 2, 0, 0, 0), mail("x@y")),
        ({"max_size": 1}, mail("x@y"), Envelope("a@b", ["x@y"], 2, 0, 0, 0)),
    ],
    ids=repr,
)
def test_each_condition_decides(condition, matching, other):
    routes = table({"name": "special", "hosts": ["h"], **condition})
    assert routes.choose(matching, matching.recipients[0]).label == "special"
    assert routes.choose(other, other.recipients[0]).label == "mx"
    (key,) = condition
    asked = Asked.of(other, other.recipients[0], 0)
    assert [(v.route.label, v.matches, v.reason) for v in routes.trace(asked, None)] == [
        ("special", False, key),
        ("mx", True, ""),
    ]


def test_attempts_decide():
    routes = table({"name": "fallback", "hosts": ["h"], "min_attempts": 2})
    assert [routes.choose(mail("x@y"), "x@y", attempts).label for attempts in (0, 1, 2, 3)] == [
        "mx",
        "mx",
        "fallback",
        "fallback",
    ]


def test_a_route_by_mx_takes_over_where_it_comes_first():
    routes = table(
        {"name": "google", "mx": [".google.com"], "application": ["shop"], "hosts": ["h"]},
        {"name": "rest"},
        {"name": "late", "mx": ["x"]},
    )
    shop, other = QueueName("rest", "d.example", "shop"), QueueName("rest", "d.example")
    assert routes.choose(mail("x@d.example", application="shop"), "x@d.example").label == "rest"
    assert routes.by_mx(shop, ["aspmx.l.google.com"]).label == "google"
    assert routes.by_mx(shop, ["x"]).label == "rest"
    assert routes.by_mx(other, ["aspmx.l.google.com"]).label == "rest"


@pytest.mark.parametrize(
    ("hosts", "name"),
    [
        ([(10, "mx.one.example")], "mx.one.example"),
        ([(10, "alt1.mx.example"), (20, "alt2.mx.example")], "(alt1|alt2).mx.example"),
        ([(10, "b.x"), (10, "a.x"), (20, "c.y")], "(a.x|b.x|c.y)"),
        ([(10, "mx.example"), (20, "b.mx.example")], "(mx|b.mx).example"),
    ],
)
def test_the_name_of_a_site_lists_its_hosts(hosts, name):
    assert roll_up(Hosts(tuple(sorted(hosts)), 0.0)) == name


async def test_domains_with_the_same_hosts_are_one_site_and_are_looked_up_once():
    class Counting(Dictionary):
        asked = 0

        async def mx(self, domain: str):
            self.asked += 1
            return await super().mx(domain)

    records = {(f"d{n}.example", "MX"): [(10, "MX1.pool.example"), (20, "mx2.pool.example")] for n in range(5)}
    resolver = Counting(records)
    sites = Sites(table(), resolver, set(), resolver.now)
    names = [QueueName("mx", f"d{n}.example") for n in range(5)]
    assert sites.known(names[0]) is None
    assert {(await sites.find(name)).key for name in names} == {"mx/(mx1|mx2).pool.example"}
    assert all(sites.known(name) is not None for name in names)
    assert resolver.asked == 5


async def test_address_families():
    class Both:
        async def addresses(self, host: str, families: str):
            return [{"6": "2001:db8::1", "4": "192.0.2.1"}[family] for family in families]

    hosts = Hosts(((10, "mx.example"),), 0.0)
    assert [t.address for t in await targets(Both(), hosts, "46")] == ["192.0.2.1", "2001:db8::1"]
    assert [t.address for t in await targets(Both(), hosts, "4")] == ["192.0.2.1"]


def test_header_conditions_are_matched_when_a_message_is_accepted():
    routes = table(
        {"name": "campaign", "header": ["X-Class: ^bulk", "List-Unsubscribe: ."], "hosts": ["h1"]},
        {"name": "rest", "hosts": ["h2"]},
    )
    header = b"Subject: x\r\nx-class:\r\n  Bulk mail\r\nList-Unsubscribe: <https://x.example/>\r\n\r\n"
    envelope = mail("c@d.example")
    assert routes.looks_at_headers and not table({"hosts": ["h"]}).looks_at_headers
    envelope.headers = routes.headers_met(header)
    assert routes.choose(envelope, "c@d.example").name == "campaign"
    envelope.headers = routes.headers_met(b"Subject: bulk\r\nX-Class: not bulk\r\nList-Unsubscribe: <x>\r\n\r\n")
    assert routes.choose(envelope, "c@d.example").name == "rest"
    assert [v.reason for v in routes.trace(Asked.of(envelope, "c@d.example", 0), None)] == ["header", ""]
    for wrong in ("X-Class", "X Class: x", "X: ("):
        with pytest.raises(ValueError, match="header"):
            table({"header": [wrong], "hosts": ["h"]})


def test_a_condition_on_the_author_matches_parsed_addresses():
    routes = table({"name": "shop", "header": ["From: @shop\\.test$"], "hosts": ["h1"]}, {"name": "rest", "hosts": ["h2"]})
    cases = {b"a@shop.test": True, b"a@ Shop . test (x@y)": True, b'"x@shop.test" <a@bank.test>': False,
             b"a@bank.test (@shop.test": None, b"b@bank.test, a@shop.test": True, b"a@b.test (c@shop.test)": False}  # fmt: skip
    for value, met in cases.items():
        header = b"Subject: x\r\nFrom: " + value + b"\r\n\r\n"
        if met is None:
            with pytest.raises(Malformed):
                routes.headers_met(header)
        else:
            assert bool(routes.headers_met(header)) is met, value
    assert table({"header": ["Subject: ."], "hosts": ["h"]}).headers_met(b"From: <\r\nSubject: x\r\n\r\n") == ["Subject: ."]


def test_differences_of_provider_profiles():
    from relaymta.route.shaping import differences, profiles, read_profiles, shipped_text

    text = shipped_text().replace("messages_per_connection = 100", "messages_per_connection = 99", 1)
    text = text.replace('name = "google"', 'name = "google"\nrate = "5/s"', 1)
    found = differences(read_profiles(text), profiles())
    assert found == ["site google: messages_per_connection 99 -> 100", "site google: rate 5 -> none"]
    assert differences(profiles(), profiles()) == []
    gone = differences(read_profiles(shipped_text().replace("match = '^421 4\\.7", "match = '^421 9\\.7", 1)), profiles())
    assert [line.partition(":")[0] for line in gone] == ["rule gone", "rule new"]


@pytest.mark.parametrize(
    "words",
    [
        ("--to", "x@"),
        ("--to", "no body"),
        ("--to", "@"),
        ("--to", ""),
        ("--to", "a b@c.test"),
        ("--from", "x", "--to", "a@b.test"),
    ],
)
def test_what_is_no_address_is_refused(words):
    done = CliRunner().invoke(main, ["route", "test", *words])
    assert done.exit_code == 64 and "expected an address" in done.stderr


def test_a_listener_that_there_is_not_is_refused():
    settings = (
        'listener=[{address="127.0.0.1:25"}]',
        'route=[{name="content", hosts=["127.0.0.1:9"], listener=["127.0.0.1:25"]}]',
    )
    words = ["route", "test", "--to", "a@b.test", *(word for one in settings for word in ("--set", one)), "--listener"]
    done = CliRunner().invoke(main, [*words, "127.0.0.1:26"])
    assert done.exit_code == 64 and 'no such listener: 127.0.0.1:26 (did you mean "127.0.0.1:25"?)' in done.stderr
    done = CliRunner().invoke(main, [*words, "127.0.0.1:25"])
    assert done.exit_code == 0 and "content          yes" in done.stdout


def test_mail_that_is_kept_here_has_no_site():
    settings = 'route=[{name="here", protocol="mailbox", recipient_domain=["b.test"]}]'
    words = ["route", "test", "--to", "a@b.test", "--set", 'listener=[{address="127.0.0.1:25"}]', "--set", settings]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0 and "\n  kept here, in mailboxes; " in done.stdout and "bounces" not in done.stdout
    assert json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)["kept_here"] is True


def test_an_alias_is_followed_to_each_address(tmp_path):
    """As a message for it would be: names have the domain that completes them, and staging redirects what they lead to."""
    (tmp_path / "aliases").write_text(f"root: ann@b.test, bob\nteam: :include:{tmp_path}/none\n")
    settings = (
        'listener=[{address="127.0.0.1:25"}]', 'route=[{name="out", hosts=["127.0.0.1:8"]}]', "hostname=mail.a.test",
        f"local.aliases={tmp_path}/aliases",
    )  # fmt: skip
    words = ["route", "test", *(word for one in settings for word in ("--set", one)), "--to"]

    def shown(*more: str) -> str:
        done = CliRunner().invoke(main, [*words, *more])
        assert done.exit_code == 0, done.output
        return done.stdout

    lines = shown("root").splitlines()
    assert lines[0] == "<root@a.test> is an alias (local.aliases): leads to 2 addresses"
    assert [line for line in lines[1:] if not line.startswith(" ")] == ["<ann@b.test>", "<bob@a.test>"]
    assert lines.count("  site  out, counted as out") == 2
    assert shown("root@mail.a.test").splitlines()[0].startswith("<root@mail.a.test> is an alias")
    assert shown("root@a.test").splitlines()[0] == "<root@a.test>"
    assert shown("ann").splitlines()[0] == "<ann@a.test>"
    found = json.loads(shown("root", "--json"))
    assert (found["recipient"], [one["recipient"] for one in found["leads_to"]]) == ("root@a.test", ["ann@b.test", "bob@a.test"])
    assert [one["site"] for one in found["leads_to"]] == ["out", "out"]
    assert json.loads(shown("root@a.test", "--json"))["leads_to"] == []
    assert json.loads(shown("root", "--set", 'staging={redirect="all@sink.test"}', "--json"))["leads_to"][0]["redirected_to"]
    assert "mail for it waits" in shown("team") and "mail for it waits" in json.loads(shown("team", "--json"))["error"]
    (tmp_path / "aliases").write_text("root: " + ", ".join(f"u{number}" for number in range(130)) + "\n")
    assert "\nand 30 more: --json has all of them\n" in shown("root")
    (tmp_path / "aliases").write_text("root: |x\n")
    assert CliRunner().invoke(main, [*words, "root"]).exit_code == 78


def test_mail_that_staging_redirects_is_shown_where_it_goes():
    """To whom it is addressed is not where a test system sends it."""
    settings = (
        'listener=[{address="127.0.0.1:25"}]', 'staging={redirect="all@sink.test", allow=["qa.test"]}',
        'route=[{name="sink", hosts=["127.0.0.1:9"], recipient_domain=["sink.test"]}, {name="out", hosts=["127.0.0.1:8"]}]',
    )  # fmt: skip
    words = ["route", "test", *(word for one in settings for word in ("--set", one)), "--to"]
    done = CliRunner().invoke(main, [*words, "a@b.test"])
    assert (
        done.exit_code == 0
        and "redirected to <all@sink.test> (staging.redirect)\n" in done.stdout
        and "site  sink" in done.stdout
    )
    assert json.loads(CliRunner().invoke(main, [*words, "a@b.test", "--json"]).stdout)["redirected_to"] == "all@sink.test"
    done = CliRunner().invoke(main, [*words, "ann@qa.test"])
    assert done.exit_code == 0 and "redirected" not in done.stdout and "site  out" in done.stdout


@pytest.mark.parametrize("recipient", ["x@bücher.example", "X@BÜCHER.example", "x@xn--bcher-kva.example"])
@pytest.mark.parametrize(
    "pattern",
    [
        "bücher.example", "xn--BCHER-kva.example", ".bücher.example", "x@bücher.example", "x@xn--bcher-kva.example",
        "/@bücher\\.example$/", "/^x@xn--bcher-kva\\./", "/BÜCHER/",
    ],
)  # fmt: skip
def test_a_line_of_the_route_map_means_a_domain_in_u_labels_and_a_labels(tmp_path, recipient, pattern):
    (tmp_path / "map").write_text(f"{pattern} mapped\n", encoding="utf-8")
    settings = {"route_map": str(tmp_path / "map"), "route": [{"name": "mapped", "hosts": ["h"], "sender": ["a@never.example"]}]}
    routes = RouteTable(Config.model_validate({"listener": [{"address": "127.0.0.1:25"}], **settings}))
    assert routes.choose(mail(recipient), recipient).label == "mapped"
    assert routes.choose(mail("x@other.example"), "x@other.example").label == "mx"
    assert routes.choose(mail("x@xn--9.example"), "x@xn--9.example").label == "mx"  # no A-label


NAMES = [
    ("smart", {"smart"}), ("mail.example.test:587", {"smart"}), ("MAIL.example.test", {"smart"}), ("xn--bcher-kva.test", {"idn"}),
    ("b\u00fccher.test:25", {"idn"}), ("b\u00fccher.test:26", set()), ("2001:db8::1", {"six"}), ("[2001:DB8::1]:2525", {"six"}),
    ("127.0.0.1", {"one", "two"}), ("127.0.0.1:1", {"one"}), ("pool", {"pool"}), ("a.pool.test", {"pool"}), ("by mx", set()),
    ("mx.other.test", set()), ("", set()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "counted"), NAMES)
def test_a_site_is_counted_by_the_name_of_its_route_or_of_one_of_its_hosts(name, counted):
    config = Config.model_validate({
        "listener": [{"address": "127.0.0.1:25"}],
        "route": [
            {"name": "smart", "recipient_domain": ["s.test"], "hosts": ["Mail.Example.TEST:587"]},
            {"name": "idn", "recipient_domain": ["i.test"], "hosts": ["b\u00fccher.test"]},
            {"name": "six", "recipient_domain": ["x.test"], "hosts": ["[2001:db8::1]:2525"]},
            {"name": "one", "recipient_domain": ["o.test"], "hosts": ["127.0.0.1:1"]},
            {"name": "two", "recipient_domain": ["t.test"], "hosts": ["127.0.0.1:2"]},
            {"name": "pooled", "recipient_domain": ["p.test"], "hosts": ["a.pool.test"]},
            {"name": "by mx"},
        ],
        "site": [{"name": "pool", "hosts": [".pool.test"]}],
    })  # fmt: skip
    assert counted_as(config, name) == counted
