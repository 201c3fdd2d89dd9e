"""HTTP injection with a real relay: what arrives, who may send, what a repeat gets, and what applications are told afterwards."""

import contextlib
import email
import email.policy
import itertools
import json
import os
import random
import re
import signal
import smtplib
import socket
import ssl
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROVE
from tests.support.daemon import PATIENCE, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.injecting import Injecting, Said, basic, message

ID = re.compile(rb"\bid ([0-9A-Z]{13})")


@pytest.fixture(scope="module")
def site() -> Iterator[FakeMx]:
    refusals = {"nobody@d.example": b"550 5.1.1 nobody here\r\n", "later@d.example": b"451 4.2.0 later\r\n"}
    with FakeMx({"RCPT": refusals}) as found:
        yield found


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory, site: FakeMx) -> Iterator[Injecting]:
    with Injecting(tmp_path_factory.mktemp("relay"), f"127.0.0.1:{site.port}", workers=2) as found:
        yield found


def arrived(site: FakeMx, ident: str) -> tuple[str, list[str], email.message.EmailMessage]:
    """Sender, recipients and message data of a message by its id."""

    def find() -> tuple[str, list[str], bytes] | None:
        return next((one for one in site.messages if ident.encode() in one[2].partition(b"\r\n\r\n")[0]), None)

    sender, recipients, data = wait_for(find, what="the message")
    return sender, recipients, email.message_from_bytes(data, policy=email.policy.default)  # type: ignore[return-value]


def queued(relay: Injecting, ident: str) -> dict[str, Any]:
    """The event of a message that was accepted."""
    return wait_for(lambda: next((one for one in relay.events("queued") if one["id"] == ident), None), what="the event")  # type: ignore[no-any-return]


def ident_of(said: Said) -> str:
    assert said.status == 202, said
    return str(said.json["id"])


def test_a_message_arrives_as_it_was_described(relay, site):
    said = relay.post(message(
        to=["Ann <a@d.example>", {"email": "b@d.example", "name": "Bö"}], bcc="c@d.example", subject="Grüße", text="Hällo\n",
        html="<p>Hällo</p>", headers={"X-Order": "17"}, reply_to="desk@example.com",
        attachments=[{"filename": "ä.txt", "content_type": "text/plain", "content": "aGk="}], tags=["order"],
    ), X_Nothing="x")  # fmt: skip
    assert [row["status"] for row in said.json["messages"][0]["recipients"]] == ["accepted"] * 3
    sender, recipients, found = arrived(site, ident_of(said))
    assert (sender, sorted(recipients)) == ("shop@example.com", ["a@d.example", "b@d.example", "c@d.example"])
    assert found["subject"] == "Grüße" and found["x-order"] == "17" and found["bcc"] is None
    assert found["from"].addresses[0].display_name == "Shop" and found["to"].addresses[1].display_name == "Bö"
    assert found["date"] is not None and found["message-id"].startswith("<" + ident_of(said))
    assert " with HTTP id " in found["received"] and "[127.0.0.1]" in found["received"]
    assert found.get_body(("plain",)).get_content().split() == ["Hällo"] and "Hällo" in found.get_body(("html",)).get_content()
    assert [(one.get_filename(), one.get_content()) for one in found.iter_attachments()] == [("ä.txt", "hi")]


def test_a_form_and_a_message_as_it_is(relay, site):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="message"\r\n\r\n{"from":"a@b.example","to":"a@d.example","subject":"s",'
        b'"attachments":[{"filename":"f.bin","part":"f"}]}\r\n--x\r\nContent-Disposition: form-data; name="f"; filename="o"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n" + bytes(range(256)) * 1000 + b"\r\n--x--\r\n"
    )
    said = relay.post(body, Content_Type="multipart/form-data; boundary=x")
    found = arrived(site, ident_of(said))[2]
    assert [one.get_content() for one in found.iter_attachments()] == [bytes(range(256)) * 1000]
    raw = b"From: a@b.example\nTo: a@d.example\nBcc: hidden@d.example\nSubject: raw\n\n.\nFrom here\r\nbare\rend"
    sender, recipients, found = arrived(site, ident_of(relay.post(raw, Content_Type="message/rfc822")))
    assert (sender, sorted(recipients), found["bcc"]) == ("a@b.example", ["a@d.example", "hidden@d.example"], None)
    assert found.get_payload() == ".\r\nFrom here\r\nbare\r\nend\r\n"
    said = relay.post(raw, path="/v1/messages?from=x@y.example&to=only@d.example&tag=t", Content_Type="message/rfc822")
    many = "".join(f"&to=r{number}@d.example" for number in range(1001))
    assert relay.post(raw, path=f"/v1/messages?from=x@y.example{many}", Content_Type="message/rfc822").status in (400, 422)
    assert arrived(site, ident_of(said))[:2] == ("x@y.example", ["only@d.example"])


def test_a_thousand_recipients_have_one_message_with_one_body(relay, site):
    people = [f"r{number}@d.example" for number in range(1000)]
    said = relay.post(message(to=people))
    assert len(said.json["messages"]) == 1 and len(said.json["messages"][0]["recipients"]) == 1000
    ident = ident_of(said)

    def all_there() -> bool:
        got = [one for _, to, data in site.messages if ident.encode() in data for one in to]
        return sorted(got) == sorted(people)

    wait_for(all_there, what="all recipients")
    wait_for(lambda: set(relay.states(ident).values()) == {"delivered"}, what="the outcomes")
    assert relay.post(message(to=[*people, "one@more.example"])).status == 422


@pytest.mark.parametrize("headers, status", [
    ({}, 401), (basic("shop", "wrong"), 401), (basic("nobody"), 401), ({"Authorization": "Basic x"}, 401),
    ({"Authorization": "Digest x"}, 401), ({"Authorization": "Bearer x"}, 401), (basic("shop"), 202),
], ids=["none", "wrong", "unknown", "malformed", "other scheme", "token", "right"])  # fmt: skip
def test_who_is_not_in_a_trusted_network_logs_in(relay, headers, status):
    said = relay.ask("POST", "/v1/messages", message(), headers, secure=True)
    assert said.status == status, said
    assert ("WWW-Authenticate" in said.headers) == (status == 401)
    if status == 202:
        assert queued(relay, said.json["id"])["user"] == "shop"


def test_each_request_has_the_user_that_it_says(relay):
    connection = relay.connection()
    with contextlib.closing(connection):
        for user in ("shop", "bank", "", "shop", "shop"):
            connection.request("POST", "/v1/messages", b'{"from":"a@b.example","to":"c@d.example","text":"x"}',
                               {"Content-Type": "application/json"} | (basic(user) if user else {}))  # fmt: skip
            answer = connection.getresponse()
            assert answer.status == 202, answer.read()
            ident = answer.read().decode().split('"')[3]
            assert queued(relay, ident)["user"] == user


def test_an_account_sends_as_itself_and_within_its_quota(relay):
    ann = basic("ann")
    for more in ({}, {"envelope_from": "ann@corp.example"}):
        said = relay.ask("POST", "/v1/messages", message(**more), ann)
        assert (said.status, "ann may not" in said.detail) == (403, True), said
    mine = {"from": "ann@corp.example"}
    said = relay.ask("POST", "/v1/messages", message(**mine, to=[f"a{n}@d.example" for n in range(25)]), ann)
    rows = said.json["messages"][0]["recipients"]
    assert [row["status"] for row in rows] == ["accepted"] * 19 + ["try again"] * 6  # one more was spent above
    assert "quota" in rows[-1]["reply"]
    said = relay.ask("POST", "/v1/messages", message(**mine), ann)
    assert (said.status, "quota" in said.detail) == (429, True)
    after = re.search(r"try again in (\d+) s", said.detail)
    assert after is not None and said.headers["Retry-After"] == after[1]
    entries = [{"to": f"b{number}@d.example"} for number in range(3)]
    said = relay.ask("POST", "/v1/messages", {"from": "ann@corp.example", "text": "x", "batch": entries}, ann)
    assert (said.status, [row["status"] for row in said.json["messages"]]) == (429, ["try again"] * 3)
    for _ in range(3):  # what is only checked costs nothing
        said = relay.ask("POST", "/v1/messages?validate=1", message(**mine), ann)
        assert (said.status, said.json["valid"]) == (200, True), said


def test_a_check_says_what_would_happen_and_sends_nothing(relay, site):
    said = relay.post(message(to=["checked@d.example", "x@y.example"]), path="/v1/messages?validate=1")
    assert said.status == 200 and said.json["valid"] and said.json["size"] > 100 and said.json["dkim"] == []
    assert {row["route"] for row in said.json["recipients"]} == {"smarthost"}
    said = relay.ask("POST", "/v1/messages?validate=1", message(), basic("ann"))
    assert not said.json["valid"] and "ann may not send as" in said.json["sender_reply"]
    assert relay.post(message(to="no address"), path="/v1/messages?validate=1").status == 422
    time.sleep(0.2)
    assert not [to for _, to, _ in site.messages if "checked@d.example" in to]


def test_a_repeat_gets_the_first_answer_and_another_request_none(relay, site):
    keys = itertools.count()
    for _ in range(8):  # each is by another connection, and so by either worker
        key = f"again-{next(keys)}"
        first = relay.post(message(tags=[key]), key)
        for _ in range(4):
            again = relay.post(message(tags=[key]), key)
            assert (again.status, again.json) == (202, first.json) and again.headers["Idempotency-Replayed"] == "true"
        other = relay.post(message(subject="other"), key)
        assert (other.status, other.json["argument"]) == (422, "Idempotency-Key")
        assert relay.post(message(tags=[key]), key, Authorization=basic("shop")["Authorization"]).json["id"] != first.json["id"]
        receipt = relay.ask("GET", f"/v1/receipts/{key}")
        assert [one["id"] for one in receipt.json["messages"]] == [first.json["id"]]
        assert receipt.json["messages"][0]["tags"] == [key]
    assert relay.ask("GET", "/v1/receipts/never").status == 404
    assert relay.ask("GET", "/v1/receipts/again-0", headers=basic("bank")).status == 404


def test_a_repeat_is_answered_though_it_would_not_be_accepted_now(tmp_path, site):
    people = [f"r{number}@d.example" for number in range(101)]
    entries = [{"to": people, "substitutions": {"a": number}} for number in range(3)]
    some = [{"to": [f"a{number}@d.example" for number in range(20)]}, {"to": "late@d.example"}]
    ann = {"from": "ann@corp.example", "text": "x", "batch": some}, basic("ann") | {"Idempotency-Key": "part"}
    bodies = {
        "one": message(to=people),
        "batch": {"from": "a@b.example", "subject": "{{ a }}", "text": "x", "batch": entries},
    }
    raw = b"From: a@b.example\r\nTo: %b\r\n\r\nx\r\n" % ",\r\n ".join(people).encode()
    with Injecting(tmp_path, f"127.0.0.1:{site.port}") as relay:
        first = {key: relay.post(body, key) for key, body in bodies.items()}
        whole = relay.post(raw, "raw", Content_Type="message/rfc822")
        part = relay.ask("POST", "/v1/messages", *ann)
        assert [row["status"] for row in part.json["messages"]] == ["accepted", "try again"], part
        relay.stop()
        relay.config.write_text(relay.config.read_text() + "[intake]\nrecipients = 100\n")
        relay.start()
        for key, body in bodies.items():
            again = relay.post(body, key)
            assert (again.status, again.json) == (202, first[key].json) and again.headers["Idempotency-Replayed"] == "true"
            assert relay.post(body, f"{key}-new").status == 422
        again = relay.post(raw, "raw", Content_Type="message/rfc822")
        assert (again.status, again.json) == (202, whole.json) and again.headers["Idempotency-Replayed"] == "true"
        again = relay.ask("POST", "/v1/messages", *ann)  # of which some is still to be sent
        assert again.status == 202 and "Idempotency-Replayed" not in again.headers
        assert again.json["messages"][0] == part.json["messages"][0]


def test_many_at_the_same_time_with_one_key_send_one_message(relay, site):
    with ThreadPoolExecutor(16) as threads:
        said = list(threads.map(lambda _: relay.post(message(), "together"), range(48)))
    assert {one.status for one in said} <= {202, 409}
    assert len({one.json["id"] for one in said if one.status == 202}) == 1


def test_what_is_said_in_the_query_belongs_to_a_request(relay):
    whole = b"From: a@b.example\r\nSubject: q\r\n\r\nx\r\n"
    for to, status in (("one", 202), ("two", 422), ("one", 202)):
        said = relay.post(whole, "query", f"/v1/messages?to={to}@d.example", Content_Type="message/rfc822")
        assert said.status == status


def by_smtp(port: int, key: str, text: str = "x", to: str = "a@d.example", extra: str = "") -> tuple[int, str]:
    with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE) as client:
        client.ehlo()
        client.mail("a@b.example")
        client.rcpt(to)
        code, answer = client.data(f"Subject: s\r\nX-Relay-Idempotency: {key}\r\n{extra}\r\n{text}\r\n".encode())
        return code, answer.decode().rpartition(" ")[2]


def test_another_message_with_a_key_is_refused_and_the_key_stays_here(relay, site):
    code, ident = by_smtp(relay.port, "other")
    again = by_smtp(relay.port, "other", extra="Date: Mon, 30 Nov 2026 00:00:00 +0000\r\nMessage-ID: <x@y>\r\n")
    assert (code, again) == (250, (250, ident))
    assert by_smtp(relay.port, "other", text="y")[0] == 550
    large = "z" * 70 + "\r\n"
    assert [by_smtp(relay.port, "large", text=large * count)[0] for count in (6000, 6000, 6001)] == [250, 250, 550]
    assert arrived(site, ident)[2]["x-relay-idempotency"] is None
    assert not [one for one in site.messages if b"Relay-Idempotency" in one[2]]
    assert relay.ask("GET", f"/v1/messages/{ident}").status == 200  # the same client, which has given it a key
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
        client.ehlo()
        client.mail("a@b.example")
        client.rcpt("a@d.example")
        plain = client.data(b"Subject: s\r\n\r\nx\r\n")[1].decode().rpartition(" ")[2]
    assert relay.ask("GET", f"/v1/messages/{plain}").status == 404  # nobody can ask about that


def test_what_a_program_makes_anew_is_the_same_message(relay):
    def made(key: str, size: int) -> bytes:
        found = email.message.EmailMessage(email.policy.SMTP)
        found["Subject"], found["Message-ID"] = "x", f"<{'y' * random.randrange(1, 100)}@z>"
        found["X-Relay-Idempotency"] = key
        found.set_content("x")
        found.add_alternative("<p>x</p>", subtype="html")
        found.add_attachment(b"a" * size, maintype="application", subtype="pdf", filename="a.pdf")
        return found.as_bytes()

    for key, size in (("anew", 3), ("anew and large", 900_000)):  # of large ones the size counts
        answers = []
        for more in (0, 0, 0, 0, 3):
            with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
                client.ehlo()
                client.mail("a@b.example")
                client.rcpt("a@d.example")
                answers.append(client.data(made(key.replace(" ", "-"), size + more)))
        assert [code for code, _ in answers] == [250] * 4 + [550] and len(set(answers[:4])) == 1, answers


def test_what_smtp_repeats_is_not_sent_again(relay):
    idents = set()
    for to in (["a@d.example"], ["a@d.example"], ["a@d.example", "b@d.example"], ["b@d.example"]):
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
            client.ehlo()
            client.mail("a@b.example")
            for one in to:
                client.rcpt(one)
            code, text = client.data(b"X-Relay-Idempotency: smtp-1\r\nSubject: x\r\n\r\nx\r\n")
            assert code == 250
            idents.add(text.decode().rpartition(" ")[2])
    assert len(idents) == 2  # the second one is for the recipient that was new
    assert sorted(queued(relay, ident)["recipients"] for ident in idents) == [["a@d.example"], ["b@d.example"]]
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client, pytest.raises(smtplib.SMTPDataError) as refused:
        client.sendmail("a@b.example", ["c@d.example"], "X-Relay-Idempotency: a b\r\n\r\nx\r\n")
    assert refused.value.smtp_code == 550


def test_an_application_learns_what_has_become_of_its_message(relay):
    shop = basic("shop")
    said = relay.ask("POST", "/v1/messages", message(to=["c@d.example", "nobody@d.example", "later@d.example"]), shop)
    ident = ident_of(said)
    expected = {"c@d.example": "delivered", "nobody@d.example": "bounced", "later@d.example": "deferred"}
    wait_for(lambda: relay.states(ident, **shop) == expected, what="the outcomes")
    found = relay.ask("GET", f"/v1/messages/{ident}", headers=shop).json
    rows = {row["address"]: row for row in found["recipients"]}
    assert rows["c@d.example"]["reply"].startswith("250 2.0.0 taken") and rows["c@d.example"]["peer"]
    assert (rows["nobody@d.example"]["reply"], rows["nobody@d.example"]["class"]) == ("550 5.1.1 nobody here", "bad-mailbox")
    assert rows["later@d.example"]["attempts"] == 1 and not found.get("ended")
    for other in (basic("bank"), {}):
        assert relay.ask("GET", f"/v1/messages/{ident}", headers=other).status == 404
    relay.cli("queue", "delete", ident)
    assert relay.states(ident, **shop) == expected | {"later@d.example": "deleted"}
    assert relay.ask("GET", "/v1/messages/AAAA", headers=shop).status == 404
    first, second = (relay.ask("POST", "/v1/messages", message(), basic("held")).json["id"] for _ in range(2))
    assert relay.states(second, **basic("held")) == {"c@d.example": "held"}
    wait_for(lambda: relay.states(first, **basic("held")) == {"c@d.example": "delivered"}, what="delivery")


def test_a_message_for_later_waits(relay, site):
    at = datetime.now(UTC) + timedelta(seconds=4)
    ident = ident_of(relay.post(message(send_at=at.isoformat())))
    assert relay.states(ident) == {"c@d.example": "scheduled"}
    arrived(site, ident)
    assert datetime.now(UTC) >= at
    ident = ident_of(relay.post(message(send_at=(at + timedelta(days=30)).isoformat())))
    assert relay.post(message(send_at=(at + timedelta(days=100)).isoformat())).status == 422
    relay.cli("queue", "flush", ident)
    arrived(site, ident)


@pytest.mark.parametrize("body, kind, status, argument", [
    (b"{", "application/json", 400, ""), (b"[]", "application/json", 400, ""), (b"\xff", "application/json", 400, ""),
    (b'{"from":"a@b.example","to":"a@d.example","text":"x","frm":1}', "application/json", 422, "frm"),
    (b"x", "text/plain", 415, ""), (b"x", "", 415, ""), (b"", "message/rfc822", 422, ""),
    (b"x", "multipart/form-data", 400, ""), (b"--x\r\n\r\n\r\n--x--", "multipart/form-data; boundary=x", 400, ""),
    (b'--x\r\nContent-Disposition: form-data; name="message"; =\xff\r\n\r\n{}\r\n--x--',
     "multipart/form-data; boundary=x", 400, ""),
    (b'--x\r\nContent-Disposition: form-data; name="\xff"\r\nContent-Transfer-Encoding: base64\r\n\r\n{}\r\n--x--',
     "multipart/form-data; boundary=x", 415, r"\udcff"),
    (b"To: x@y.example\n\nx", "message/rfc822", 422, "from"), (b"From: x@y.example\n\nx", "message/rfc822", 422, "to"),
], ids=str)  # fmt: skip
def test_a_wrong_request_is_told_what_is_wrong(relay, body, kind, status, argument):
    said = relay.ask("POST", "/v1/messages", body, {"Content-Type": kind} if kind else {})
    assert (said.status, said.json.get("argument", "")) == (status, argument), said
    assert said.headers["Content-Type"] == "application/problem+json" and said.json["status"] == status and said.detail


def test_octets_that_are_no_utf_8_are_answered_wherever_they_stand(relay):
    raw = b"From: %s\r\nTo: %s\r\nSubject: %s\r\nBcc: %s\r\n\r\nx\r\n"
    good = (b"a@b.example", b"a@d.example", b"s", b"c@d.example")
    for place in range(4):
        for odd in (b"\xff%s", b'"\xff" <%s>', b"\xff <%s>", b"%s\xff", b"=?utf-8?q?=FF?= <%s>"):
            fields = [odd % one if at == place else one for at, one in enumerate(good)]
            said = relay.post(raw % tuple(fields), Content_Type="message/rfc822")
            assert said.status in (202, 400, 422), (fields, said)
    whole = raw % good
    for path in ("?to=%ff@d.example&from=a@b.example", "?from=%ff@b.example", "?tag=%ff", "?%ff=1", "?to=a@d.example&to=%80%ff"):
        said = relay.post(whole, path=f"/v1/messages{path}", Content_Type="message/rfc822")
        assert said.status in (202, 400, 422), (path, said)
    for name in ("Idempotency-Key", "traceparent", "Content-Type", "Authorization", "Origin", "Content-Encoding", "Host"):
        said = relay.ask("POST", "/v1/messages", whole, {"Content-Type": "message/rfc822"} | {name: "\xff"})
        assert said.status in (202, 400, 401, 403, 415, 421), (name, said)
    for path in ("receipts/%ff", "messages/%ff", "%ff", "messages/%ff?%ff=%ff", "receipts/%ff%00%0a"):
        assert relay.ask("GET", f"/v1/{path}").status in (400, 404), path
    for text in (r"\ud800", r"\udcff", "\xff"):
        for place in ("from", "to", "subject", "text", "cc", "\xff"):
            body = json.dumps(message(**{place: "@@"})).replace("@@", text).encode("latin-1")
            said = relay.ask("POST", "/v1/messages", body, {"Content-Type": "application/json"})
            assert said.status in (202, 400, 422), (place, said)
    assert not [one for one in relay.events("warning") if "internal" in one["text"]]


def test_requests_are_counted_and_those_that_are_refused_logged(relay):
    def requests(answer: str) -> float:
        return relay.metric(f'relaymta_http_requests_total{{answer="{answer}",operation="send"}}')

    before = requests("4xx"), requests("2xx")
    assert relay.post(message(nothing=1)).status == 422 and relay.post(message()).status == 202
    assert (requests("4xx"), requests("2xx")) == (before[0] + 1, before[1] + 1)
    refused = [event for event in relay.events("rejected") if event["phase"] == "http"]
    assert (
        wait_for(lambda: any("422 nothing" in event["reply"] for event in relay.events("rejected")), what="the record") or refused
    )


def test_the_absolute_form_of_a_target_is_understood(relay):
    said = raw(relay, b"GET http://relay.example/v1/openapi.json HTTP/1.1\r\nHost: relay.example\r\nConnection: close\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200")


def test_what_is_no_operation(relay):
    assert (
        relay.ask("GET", "/").status == relay.ask("GET", "/v1/messages/").status == relay.ask("GET", "/v1/../etc").status == 404
    )
    said = relay.ask("DELETE", "/v1/messages")
    assert (said.status, said.headers["Allow"]) == (405, "POST")
    for key in ("", " ", "a b", "ä", "x" * 256):
        assert relay.ask("POST", "/v1/messages", message(), {"Idempotency-Key": key}).status == 400
    for name, value in (("Origin", "https://evil.example"), ("Sec-Fetch-Site", "cross-site")):
        assert relay.ask("POST", "/v1/messages", message(), {name: value}).status == 403
        assert relay.ask("POST", "/v1/messages", message(), {name: value} | basic("shop")).status == 403
    for query in ("valdate=1", "validate=2", "validate=0&validate=1", "validate="):  # nothing is sent where a check is meant
        assert relay.ask("POST", f"/v1/messages?{query}", message()).status == 400
    gzip = relay.ask("POST", "/v1/messages", b"x", {"Content-Encoding": "gzip", "Content-Type": "application/json"})
    assert gzip.status == 415


def raw(relay: Injecting, *parts: bytes) -> bytes:
    """What is answered to these octets, until the relay closes the connection or is silent for a second."""
    said = b""
    with socket.create_connection(("127.0.0.1", relay.http), PATIENCE) as sock:
        for part in parts:
            sock.sendall(part)
        sock.settimeout(1)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while piece := sock.recv(65536):
                said += piece
    return said


def test_a_body_that_is_too_large_is_refused_before_it_is_read(relay):
    head = (
        b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
        b"Content-Length: %d\r\n\r\n"
    )
    said = raw(relay, head % (1 << 40))
    assert b"413 Request Entity Too Large" in said and b"100 Continue" not in said
    body = b'{"from":"a@b.example","to":"c@d.example","text":"x"}'
    said = raw(relay, head % len(body), body)
    assert said.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 202")
    chunk = b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n"
    with contextlib.suppress(ConnectionError):  # it need not wait for all of it
        chunked = (
            b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: message/rfc822\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        assert b"413" in raw(relay, chunked, *([chunk] * 80))


def test_malformed_http_ends_nothing_but_its_connection(relay):
    for octets in (
        b"\0" * 100, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/messages HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"EHLO x\r\n",
        b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"GET /" + b"a" * 100_000, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000,
    ):  # fmt: skip
        said = raw(relay, octets)
        assert not said or (re.match(rb"HTTP/1.[01] 4", said) and b"problem+json" in said), (octets[:50], said)
    assert relay.post(message()).status == 202
    assert not [event for event in relay.events("warning") if "internal error" in event["text"]]


def test_a_large_form_costs_no_memory(relay, site):
    def resident() -> int:
        total = 0
        for pid in relay.worker_pids():
            status = Path(f"/proc/{pid}/status").read_text()
            total += int(re.search(r"RssAnon:\s+(\d+)", status)[1])  # type: ignore[index]
        return total

    part = os.urandom(1 << 20)
    head = (
        b'--x\r\nContent-Disposition: form-data; name="message"\r\n\r\n{"from":"a@b.example","to":"a@d.example","attachments":'
        b'[{"filename":"f","part":"f"}]}\r\n--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n'
    )  # fmt: skip
    relay.post(head + part + b"\r\n--x--\r\n", Content_Type="multipart/form-data; boundary=x")
    before, most = resident(), 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.01):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        said = relay.post(head + part * 34 + b"\r\n--x--\r\n", Content_Type="multipart/form-data; boundary=x")
    finally:
        ended.set()
        watcher.join()
    assert said.status == 202, said
    assert most - before < 12_000, (before, most)  # KiB: less than the form


def batch(count: int, **more: Any) -> dict[str, Any]:
    entries = [{"to": f"r{number}@d.example", "substitutions": {"name": f"N{number}"}} for number in range(count)]
    whole = message(
        subject="Hi {{ name }}", text="{{ greeting }} {{ name }}\n", batch=entries, substitutions={"greeting": "Dear"}
    )
    return {key: value for key, value in (whole | more).items() if key != "to"}


def test_a_batch_is_a_message_for_each_of_its_entries(relay, site):
    said = relay.post(batch(150), "batch")
    rows = said.json["messages"]
    assert said.status == 202 and len({row["id"] for row in rows}) == 150
    assert [row["recipients"][0]["address"] for row in rows] == [f"r{number}@d.example" for number in range(150)]
    _, to, found = arrived(site, rows[17]["id"])
    assert (to, found["subject"], found["to"], found.get_content().strip()) == (
        ["r17@d.example"], "Hi N17", "r17@d.example", "Dear N17",
    )  # fmt: skip
    again = relay.post(batch(150), "batch")
    assert again.json == said.json and again.headers["Idempotency-Replayed"] == "true"
    assert len(relay.ask("GET", "/v1/receipts/batch").json["messages"]) == 150


def test_the_rest_of_a_batch_has_the_user_whose_it_is_though_the_client_has_gone(relay):
    body = json.dumps(batch(400, subject="gone {{ name }}")).encode()
    head = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(
        body
    )
    with socket.create_connection(("127.0.0.1", relay.http), PATIENCE) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        before = len(relay.events("queued"))
        sock.sendall(head + f"Authorization: {basic('shop')['Authorization']}\r\n\r\n".encode() + body)
        wait_for(lambda: len(relay.events("queued")) > before, what="the first message")
    wait_for(lambda: len(relay.events("queued")) >= before + 400, what="all messages")
    assert {event["user"] for event in relay.events("queued")[before:]} == {"shop"}


BODY = b'{"from":"a@b.example","to":"c@d.example","text":"x"}'
POST = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"


def test_two_requests_in_one_segment(relay):
    assert raw(relay, POST % (len(BODY), BODY) * 2).count(b"HTTP/1.1 202") == 2


def test_who_says_no_more_behind_a_request_gets_its_answer(relay):
    for count in (*[1] * 20, 3):
        with socket.create_connection(("127.0.0.1", relay.http), PATIENCE) as sock:
            sock.sendall(POST % (len(BODY), BODY) * count)
            sock.shutdown(socket.SHUT_WR)
            said = b"".join(iter(lambda: sock.recv(65536), b""))
        assert said.count(b"HTTP/1.1 202") == count, said


@pytest.mark.parametrize("begun", [
    POST % (300_000, b"x" * 200_000), POST % (len(BODY), BODY) + POST % (len(BODY), BODY[:9]), b"POST /v1/messages HTTP/1.1\r\n",
], ids=["body", "second body", "head"])  # fmt: skip
def test_who_leaves_in_the_middle_of_a_request_leaves_nothing(relay, begun):
    with socket.create_connection(("127.0.0.1", relay.http), PATIENCE) as sock:
        sock.sendall(begun)
        time.sleep(0.1)
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(20)  # what is not noticed at once is at the next look, a minute later
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(65536):
                pass

    def files() -> list[str]:
        found = (link for pid in relay.worker_pids() for link in Path(f"/proc/{pid}/fd").iterdir())
        return [name for link in found if str(relay.spool) in (name := read_link(link)) and "(deleted)" in name]

    wait_for(lambda: not files(), what="the files of bodies to be gone")


def read_link(link: Path) -> str:
    with contextlib.suppress(OSError):
        return str(link.readlink())
    return ""


def test_who_asks_and_leaves_over_tls_is_in_no_log(relay):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for octets in (b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n", b"x\r\n\r\n") * 30:
        with contextlib.suppress(OSError):
            sock = context.wrap_socket(socket.create_connection(("127.0.0.1", relay.https), PATIENCE))
            sock.sendall(octets)
            sock.close()
    assert relay.post(message()).status == 202
    time.sleep(0.2)
    assert "Traceback" not in (relay.folder / "stderr").read_text()


@pytest.mark.parametrize("host, ours", [
    ("evil.example", False), ("evil.example:80", False), ("", False), ("127.0.0.1.evil.example", False), ("relay", False),
    ("relay.example", True), ("RELAY.example.:8025", True), ("localhost", True), ("127.0.0.1", True), ("[::1]:80", True),
])  # fmt: skip
def test_a_name_that_is_not_ours_needs_credentials(relay, host, ours):
    """DNS rebinding: a page of a name that suddenly means this host reads nothing that its clients may read."""
    queued(relay, ident_of(relay.post(message(), "rebound")))
    for headers, status in (({}, 200 if ours else 421), (basic("shop"), 404)):
        said = relay.ask("GET", "/v1/receipts/rebound", headers={"Host": host} | headers)
        assert said.status == status, said
    said = relay.ask("POST", "/v1/messages?validate=1", message(), {"Host": host} if host else {})
    assert said.status == 200, "what a page posts has an Origin"


def test_who_gets_answers_may_be_rendered(relay, site):
    headers = {"Reply-To": "{{ name }} <desk@example.com>", "Sender": "{{ name }} <s@example.com>"}
    said = relay.post(batch(1, headers=headers))
    found = arrived(site, ident_of(said))[2]
    assert (found["reply-to"], found["sender"]) == ("N0 <desk@example.com>", "N0 <s@example.com>")


def test_a_check_of_a_message_as_it_is_has_the_size_that_is_sent(relay):
    raw_message = b"From: a@b.example\nTo: c@d.example\n\n" + b"\n" * 40_000_000
    for path, expected in (("?validate=1", 200), ("", 413)):
        said = relay.post(raw_message, path=f"/v1/messages{path}", Content_Type="message/rfc822")
        assert said.status == expected, said
        assert "552 5.3.4" in (said.json.get("sender_reply") or said.detail) and not said.json.get("valid")


def test_forms_of_the_same_octets_in_other_parts_are_other_requests(relay):
    def form(**parts: bytes) -> bytes:
        files = [{"filename": name, "part": name} for name in parts]
        whole = {"message": json.dumps(message(attachments=files[:1])).encode()} | parts
        rows = (
            b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), one)
            for name, one in whole.items()
        )
        return b"".join(rows) + b"--x--\r\n"

    kind = {"Content_Type": "multipart/form-data; boundary=x"}
    first = relay.post(form(a=b"x"), "forms", **kind)
    again = relay.post(form(a=b"x"), "forms", **kind)
    assert first.status == again.status == 202 and again.headers["Idempotency-Replayed"] == "true"
    assert relay.post(form(a=b"y"), "forms", **kind).status == 422
    unused = relay.post(form(a=b"x", b=b"y"), **kind)
    assert (unused.status, unused.json["argument"]) == (422, "b")


def test_no_file_is_left_of_requests_that_were_refused(relay):
    """Not until memory is collected, which takes long where there is little to do."""
    body = json.dumps(message(attachments=[{"filename": "a", "content": "A" * 200_000 + "!"}])).encode()
    for _ in range(60):
        said = relay.ask("POST", "/v1/messages", body, {"Content-Type": "application/json"})
        assert (said.status, said.json["argument"]) == (422, "attachments[0].content")

    def files() -> list[str]:
        spool = str(relay.spool)
        rows = [row for pid in relay.worker_pids() for row in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        return [row for row in rows if spool in row and row.endswith("(deleted)") and "/#" in row]

    wait_for(lambda: not files(), what="the end of the files")  # a thread may still have the last one


@pytest.mark.parametrize("more, argument, detail", [
    ({"text": "ok\n{{ nobody }}"}, "text", "line 2"), ({"subject": "{{ name"}, "subject", "line 1"),
    ({"text": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"}, "text", "CPU"),
    ({"text": "{{ ''.__class__ }}"}, "text", ""), ({"subject": "a{{ '\\n' }}Bcc: x@y.example"}, "subject", ""),
], ids=["undefined", "syntax", "endless", "sandbox", "injection"])  # fmt: skip
def test_a_wrong_template_sends_nothing(relay, site, more, argument, detail):
    said = relay.post(batch(3, **{"from": "wrong@example.com"} | more))
    assert (said.status, said.json["argument"]) == (422, argument) and detail in said.detail, said
    arrived(site, ident_of(relay.post(message())))
    assert not [one for one in relay.events("queued") if one["sender"] == "wrong@example.com"]


@pytest.mark.parametrize("kills", [30 if PROVE else 4])
def test_whatever_dies_each_message_is_sent_once(tmp_path, kills):
    """Clients repeat what was not answered, with its key; workers and the whole relay are killed meanwhile."""
    chance = random.Random(20261130)
    with FakeMx({}) as site, Injecting(tmp_path, f"127.0.0.1:{site.port}", workers=2) as relay:
        ended, answers = threading.Event(), dict[str, set[str]]()

        def client(name: int) -> None:
            for number in itertools.count():
                if ended.is_set():
                    return
                key = f"{name}-{number}"
                found = answers[key] = set()
                while True:
                    with contextlib.suppress(OSError, ValueError, AssertionError):
                        said = relay.post(message(subject=key), key)
                        if said.status == 202:
                            found.add(said.json["id"])
                            break
                    time.sleep(0.02)

        clients = [threading.Thread(target=client, args=(number,)) for number in range(6)]
        for one in clients:
            one.start()
        for _ in range(kills):
            time.sleep(chance.uniform(0.2, 0.8))
            if chance.random() < 0.3:
                relay.kill()
                relay.start()
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(wait_for(relay.worker_pids)), signal.SIGKILL)
        time.sleep(0.5)
        ended.set()
        for one in clients:
            one.join()
        wait_for(lambda: not relay.summary(), what="the queue to be empty")
        copies: dict[str, set[bytes]] = defaultdict(set)
        for _, _, data in site.messages:
            copies[str(email.message_from_bytes(data)["subject"])].add(ID.search(data)[1])  # type: ignore[index]
        assert len(answers) > 10 * 6
        wrong: dict[str, Any] = {
            key: (found, copies[key]) for key, found in answers.items() if {one.encode() for one in found} != copies[key]
        }
        assert not wrong
        assert copies.keys() == answers.keys()


def test_a_relay_that_ends_takes_what_is_under_way(tmp_path):
    with FakeMx({}) as site, Injecting(tmp_path, f"127.0.0.1:{site.port}") as relay:
        body = b'{"from":"a@b.example","to":"c@d.example","text":"x"}'
        head = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        with socket.create_connection(("127.0.0.1", relay.http), PATIENCE) as sock:
            sock.sendall(head % len(body) + body[:20])
            wait_for(lambda: relay.metric('relaymta_connections_total{result="accepted"}') >= 1, what="the connection")
            time.sleep(0.2)
            os.kill(relay.process.pid, signal.SIGTERM)  # type: ignore[union-attr]
            time.sleep(0.3)
            sock.sendall(body[20:])
            sock.settimeout(PATIENCE)
            said = sock.recv(65536)
        assert said.startswith(b"HTTP/1.1 202") or b"421" in said or b" 503 " in said, said
        relay.process.wait(PATIENCE)  # type: ignore[union-attr]


def test_tls_is_needed_where_it_is_said(relay):
    with pytest.raises((ssl.SSLError, ConnectionError)):
        context = ssl.create_default_context()
        with socket.create_connection(("127.0.0.1", relay.http)) as sock:
            context.wrap_socket(sock, server_hostname="localhost")
