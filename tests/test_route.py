"""Routes and MX resolution, with a resolver made of a dictionary."""

import pytest

from relaymta.config import Config
from relaymta.dns import DnsFailure, NoData, NoSuchName
from relaymta.proto.envelope import Envelope
from relaymta.route.mx import NoRoute, mx_targets
from relaymta.route.table import RouteTable


class Dictionary:
    """A resolver: answers by (name, type); what is not there does not exist."""

    def __init__(self, answers: dict) -> None:
        self.answers = answers

    def _get(self, name: str, kind: str):
        found = self.answers.get((name, kind), NoSuchName(name))
        if isinstance(found, Exception):
            raise found
        return found

    async def mx(self, domain: str):
        return self._get(domain, "MX")

    async def addresses(self, host: str):
        return self._get(host, "A")


async def hosts(answers: dict, domain: str = "d.example", ourselves: frozenset = frozenset()) -> list[str]:
    return [t.host for t in await mx_targets(Dictionary(answers), domain, set(ourselves))]


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


async def test_implicit_mx_literals_and_ourselves_as_backup():
    assert await hosts({("d.example", "MX"): NoData("x"), ("d.example", "A"): ["192.0.2.1"]}) == ["d.example"]
    assert await hosts({}, "[192.0.2.7]") == ["[192.0.2.7]"]
    backup = {("d.example", "MX"): [(10, "main"), (20, "us")], ("main", "A"): ["192.0.2.1"]}
    assert await hosts(backup, ourselves=frozenset({"us"})) == ["main"]


def table(*routes: dict) -> RouteTable:
    return RouteTable(Config.model_validate({"listener": [{"address": "127.0.0.1:25"}], "route": list(routes)}))


def mail(*recipients: str, sender: str = "a@b.example", application: str = "") -> Envelope:
    return Envelope(sender, list(recipients), 1, 0, 0, 0, application=application)


def test_the_first_route_that_matches_is_taken():
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
    assert routes.site(routes.assign(mail("x@y.example"))[0][0]).key == "mx/y.example"


def test_idna_domains_are_looked_up_as_a_labels():
    (pair,) = table().assign(mail("x@bücher.example"))
    assert pair[0].domain == "xn--bcher-kva.example"
