"""Header blocks: who wrote a message, as it is checked against a login."""

import pytest

from relaymta.accept.identity import Identity
from relaymta.proto.header import authors


@pytest.mark.parametrize(
    "value",
    ["ceo@bank.test", "<ceo@bank.test", "a@shop.test, ceo@bank.test", "a@shop.test <ceo@bank.test>", "us: ceo@bank.test;",
     "<a@shop.test> <ceo@bank.test>", '"x\\" <a@shop.test>" <ceo@bank.test>', "(a@shop.test) ceo@bank.test", "ceo @ bank.test",
     '"unterminated <ceo@bank.test>', "<@shop.test:ceo@bank.test>", "ceo@bank.test a@shop.test", "ceo@@bank.test", "us:;", "",
     "=?utf-8?q?ceo=40bank.test?=", ";ceo@bank.test", "a@shop.test\r\n ,ceo@bank.test", "<ceo@bank.test>@shop.test",
     "ceo@bank.test@shop.test", "@shop.test",
     "nobody", "a@shop.test\r\nsender: ceo@bank.test", "a@shop.test\r\nFROM : b@bank.test"],
)  # fmt: skip
def test_nobody_writes_as_another(value):
    shop = Identity("shop", senders=("@shop.test",))
    found = authors(f"Subject: x\r\nFrom: {value}\r\n\r\n".encode())
    assert not all(map(shop.may_send_as, found))


@pytest.mark.parametrize(
    "value", ["a@shop.test", "Ann <A@Shop.Test>", '"ceo@bank.test" <a@shop.test>', "us: a@shop.test, <b@shop.test>;"]
)
def test_who_writes_as_themselves_may(value):
    shop = Identity("shop", senders=("@shop.test",))
    found = authors(f"From: {value}\r\n\r\n".encode())
    assert found and all(map(shop.may_send_as, found))
