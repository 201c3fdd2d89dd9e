"""docs/webhooks.md: the programs that verify a request do, and the event that is shown is one."""

import base64
import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from relaymta.proto.envelope import encode
from relaymta.proto.webhook import EVENTS, key_of, signed
from relaymta.queue.journal import REASONS, decode_records, events
from tests.support.programs import need

PAGE = (Path(__file__).parents[2] / "docs/webhooks.md").read_text()
BODY = b'{"type":"events","events":[]}'
SECRET, OTHER = ("whsec_" + base64.b64encode(os.urandom(32)).decode() for _ in range(2))


def code(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.S)[1]


def by_python(headers, body, secret) -> bool:
    names: dict = {}
    exec(code("python"), names)
    return names["verified"](headers, body, secret)


def by_javascript(headers, body, secret) -> bool:
    words = json.dumps([headers, base64.b64encode(body).decode(), secret])
    program = code("javascript") + f"\nconst [h, b, s] = {words};\nconsole.log(verified(h, Buffer.from(b, 'base64'), s));\n"
    done = subprocess.run([need("node"), "-"], input=program, capture_output=True, text=True, check=True, timeout=60)
    return {"true": True, "false": False}[done.stdout.strip()]


@pytest.mark.parametrize("verified", [by_python, by_javascript])
def test_the_programs_in_the_document_verify_requests(verified):
    now = int(time.time())
    good = signed("msg_1", now, BODY, [key_of(SECRET)])
    assert verified(good, BODY, SECRET)
    assert verified(signed("msg_1", now, BODY, [key_of(OTHER), key_of(SECRET)]), BODY, SECRET), "while a secret is replaced"
    assert not verified(good, BODY + b" ", SECRET)
    assert not verified(good, BODY, OTHER)
    assert not verified(good | {"webhook-id": "msg_2"}, BODY, SECRET)
    assert not verified(good | {"webhook-timestamp": str(now - 1)}, BODY, SECRET)
    assert not verified(signed("msg_1", now - 400, BODY, [key_of(SECRET)]), BODY, SECRET), "an old one"
    assert not verified(good | {"webhook-signature": "v1,"}, BODY, SECRET)


def test_the_event_in_the_document_is_one_and_all_kinds_are_there():
    shown = json.loads(re.search(r'^    (\{"id".*?"recipients": 1\})$', PAGE, re.S | re.M)[1])
    about = ("a@shop.example", "shop", "", ["receipt"], "<1@shop.example>", "")
    party = ("c@d.example", 550, "5.1.1", "no such user", "mx.d.example", "rcpt", "reply", False, "permanent")
    from relaymta.ident import parse_id

    record = ("bounced", 1796000870553, parse_id("1M8MZWW3A0000"), about, [party], 1, {"recipients": 1})
    (made,) = events(2, decode_records(encode([record])))
    assert made == shown
    kinds = re.findall(r"^\| `(\w+)` \|", PAGE.partition("| `event` | when")[2], re.M)
    assert kinds == list(EVENTS)
    flat = " ".join(PAGE.split())
    assert all(f"`{reason}`" in flat for reason in REASONS)
