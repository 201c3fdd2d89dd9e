"""Recipients in the suppression list are refused at RCPT: whose mail the list is about, and what the reply says."""

import time
from types import SimpleNamespace

import pytest

from relaymta.accept.aliases import read
from relaymta.accept.suppressed import SUPPRESSED, Suppressed, said
from relaymta.auth.identity import Identity
from relaymta.metrics import index
from relaymta.suppression import Entry, Lookup, Suppressions
from tests.accept.test_connection import EHLO, LOGIN, machine, say
from tests.accept.test_transactions import connected

DAY = 1_777_593_600  # 2026-05-01
TRUSTED = {"networks": ["127.0.0.0/8"], "domains": ["d.example"]}
ENTRIES = [
    Entry("", "bad@x.example", "hard-bounce", "550 5.1.1 <>: no", DAY, 0, "relay"),
    Entry("shop", "shop@x.example", "complaint", "", DAY, 0, "relay"),
    Entry("", "old@x.example", "manual", "", DAY, DAY + 1, "ann"),
    Entry("", "x@xn--bcher-kva.example", "manual", "", DAY, 0, "ann"),
    Entry("", "bad@d.example", "manual", "", DAY, 0, "ann"),
]
BAD = "550 5.1.8 <bad@x.example>: suppressed: hard bounce 2026-05-01 (550 5.1.1 <>: no)"
OK = "250 2.1.5 Recipient ok"


@pytest.fixture
def lookup(tmp_path):
    made = Suppressions(tmp_path / "list")
    made.put(ENTRIES)
    made.close()
    found = Lookup(tmp_path / "list", pytest.fail)
    found.refresh()()
    yield found
    found.close()


def suppressing(lookup, ignoring=(), **settings):
    of = machine(**{"relay": TRUSTED} | settings)
    of.intake.suppressed = Suppressed(lookup, ignoring, of.intake.counters)
    return of


def rcpt(of, *addresses: str, sender: str = "a@b.example", login: bool = False) -> list[str]:
    """The replies to RCPT for these."""
    made = connected(of)
    say(made, EHLO + (LOGIN if login else b""))
    wire = f"MAIL FROM:<{sender}>\r\n" + "".join(f"RCPT TO:<{one}>\r\n" for one in addresses)
    return say(made, wire.encode())[1:]


def test_a_recipient_in_the_list_is_refused_with_reason_and_date_counted_and_logged(lookup):
    of = suppressing(lookup)
    assert rcpt(of, "BAD@X.example", "good@x.example", "old@x.example", "shop@x.example") == [
        BAD.replace("bad@x", "BAD@X"), OK, OK, OK,
    ]  # fmt: skip
    assert of.cells.get(SUPPRESSED["hard-bounce"]) == 1 == of.cells.get(index("relaymta_recipients_refused_total"))
    assert of.cells.get(index("relaymta_rejections_total", "rcpt 5xx")) == 1
    assert [(one["phase"], one["recipients"], one["reply"][:9]) for one in of.events] == [
        ("rcpt", ["BAD@X.example"], "550 5.1.8")
    ]


def test_an_entry_of_an_application_is_about_its_mail_alone(lookup):
    of = suppressing(lookup, network=[{"networks": ["127.0.0.1/32"], "relay": True, "application": "shop"}])
    assert rcpt(of, "shop@x.example", "bad@x.example") == [
        "550 5.1.8 <shop@x.example>: suppressed: complaint 2026-05-01", BAD,
    ]  # fmt: skip
    assert of.cells.get(SUPPRESSED["complaint"]) == 1


def test_who_is_exempt(lookup):
    network = [{"networks": ["127.0.0.1/32"], "relay": True, "application": "resets"}]
    assert rcpt(suppressing(lookup, ["resets"], network=network), "bad@x.example") == [OK]
    assert rcpt(suppressing(lookup, ["other"], network=network), "bad@x.example") == [BAD]
    assert rcpt(suppressing(lookup), "bad@x.example", sender="") == [OK], "the null sender"
    back = {"address": "127.0.0.1:25", "filtered": True, "networks": ["127.0.0.0/8"]}
    assert rcpt(suppressing(lookup, listener=[back]), "bad@x.example") == [OK], "what a content filter gives back"
    assert rcpt(suppressing(lookup, relay=TRUSTED | {"postmaster": "bad@x.example"}), "postmaster") == [OK]


def test_strangers_are_told_nothing_and_the_list_is_not_about_their_mail(lookup):
    of = suppressing(lookup, relay={"domains": ["d.example"], "networks": []})
    assert rcpt(of, "bad@d.example", "bad@x.example") == [OK, "550 5.7.1 Relaying denied"]
    of.logs_in = Identity("ann", application="shop")
    assert rcpt(of, "bad@d.example", "shop@x.example", login=True) == [
        "550 5.1.8 <bad@d.example>: suppressed: by hand 2026-05-01",
        "550 5.1.8 <shop@x.example>: suppressed: complaint 2026-05-01",
    ]  # fmt: skip


def test_an_alias_is_refused_where_all_it_leads_to_is_in_the_list(lookup, tmp_path):
    (tmp_path / "aliases").write_text(
        "one: bad@x.example\nboth: bad@x.example, Bad@d.example\nsome: bad@x.example, c@x.example\n"
    )
    of = suppressing(lookup)
    of.aliases = SimpleNamespace(value=read(str(tmp_path / "aliases"), ["relay.example"]))
    assert rcpt(of, "one@relay.example", "both@relay.example", "some@relay.example", "none@relay.example", "bad@x.example") == [
        BAD.replace("bad@x", "one@relay"), "550 5.1.8 <both@relay.example>: suppressed: by hand 2026-05-01", OK, OK, BAD,
    ]  # fmt: skip


def test_postmaster_without_a_domain_is_taken_whoever_that_is(lookup):
    of = suppressing(lookup, relay=TRUSTED | {"postmaster": "bad@x.example"})
    of.aliases = SimpleNamespace(value=SimpleNamespace(expanded=lambda found, names: ["bad@x.example"], leads=lambda *_: 0))
    assert rcpt(of, "postmaster", "c@x.example") == [OK, BAD.replace("bad@x", "c@x")]


def test_a_refused_recipient_uses_no_units_of_a_rate(lookup):
    of = suppressing(lookup, limits={"recipient_rate": "10/h"})
    assert rcpt(of, "bad@x.example", "good@x.example") == [BAD, OK]
    assert sum(count for key, count in of.used.items() if "recipient_rate" in str(key)) == 1


def test_refusals_are_no_errors_of_the_client(lookup):
    of = suppressing(lookup, intake={"errors": 3, "tarpit": 100})
    assert rcpt(of, *["bad@x.example"] * 10, "good@x.example") == [*[BAD] * 10, OK], "else it would be delayed, then closed"


def test_domains_are_compared_in_a_labels(lookup):
    assert Suppressed(lookup, (), machine().intake.counters).refusal("", "X@BÜCHER.example", []) is not None


def test_a_reply_is_one_line_of_ascii_within_its_limit():
    answer = said("x\r\n\x1bé" + "y" * 600 + "@b.example", Entry("", "", "manual", "é" * 100, int(time.time()), 0, ""))
    assert len(answer) <= 512 and answer.count(b"\r\n") == 1 and answer.endswith(b"\r\n") and answer.isascii()


def test_without_a_list_there_is_no_further_call():
    of = machine(relay=TRUSTED)
    assert of.intake.suppressed is None
    of.intake.accept_recipient = pytest.fail
    assert rcpt(of, "bad@x.example") == [OK]


def test_a_list_that_cannot_be_read_refuses_nobody(tmp_path):
    of = suppressing(Lookup(tmp_path / "nothing", pytest.fail))
    assert rcpt(of, "bad@x.example") == [OK]
