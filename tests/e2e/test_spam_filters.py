"""rspamd and spamd in the running relay: refused, tagged, accepted."""

import json
import smtplib
from pathlib import Path

import pytest

from tests.support import rspamd as patterns
from tests.support.daemon import PATIENCE, Relay, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.rspamd import rspamd
from tests.support.spamd import GTUBE, spamd

HEAD = "From: a@b.example\r\nX-Spam: No\r\nSubject: =?utf-8?q?h=C3=A4?=\r\n\r\n"


def test_rspamd_refuses_tags_and_rewrites(tmp_path):
    with rspamd() as scanner, FakeMx({}) as peer:
        keys = f'name="spam",type="rspamd",address=["{scanner.address}"],verdicts={{greylist="accept"}}'
        settings = (
            f"filter=[{{{keys}}}]", 'filters.tag=["X-Spam: Yes","X-Spam-Score: {score}"]', "relay.networks=[]",
            'relay.domains=["d.example"]',
        )  # fmt: skip
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", *settings) as relay:
            with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
                with pytest.raises(smtplib.SMTPDataError) as refused:
                    client.sendmail("a@b.example", ["c@d.example"], HEAD + patterns.REJECT + "\r\n")
                assert refused.value.smtp_error == b"5.7.1 Refused by spam: Gtube pattern"
                for body in (patterns.ADD_HEADER, patterns.REWRITE, "hello"):
                    client.sendmail("a@b.example", ["c@d.example"], HEAD.replace("X-Spam: No\r\n", "") + body + "\r\n")
                client.sendmail("a@b.example", ["c@d.example"], HEAD + patterns.ADD_HEADER + "\r\n")
            wait_for(lambda: len(peer.messages) == 4)
            headers = [data.partition(b"\r\n\r\n")[0] for _, _, data in peer.messages]
            tagged = b"\r\nX-Spam: Yes\r\nX-Spam-Score: %d\r\nFrom: a@b.example\r\nSubject: "
            assert headers[0].endswith(tagged % 6 + b"=?utf-8?q?h=C3=A4?=")
            rewritten = b"\r\nSubject: =?UTF-8?Q?=2A=2A=2A_SPAM_=2A=2A=2A_h=C3=A4?="
            assert headers[1].endswith(rewritten) and headers[1].count(b"Subject:") == 1
            assert tagged % 0 in headers[1]
            assert headers[3].count(b"X-Spam:") == 1 and b"X-Spam: No" not in headers[3]
            row = json.loads(relay.cli("filter", "list", "--json").stdout)
            assert row["type"] == "rspamd" and row["verdicts"]["reject"] == 1 and row["verdicts"]["tag"] >= 3
            found = relay.events("filtered")
            assert found[0]["score"] == 15.0 and found[0]["reason"] == "Gtube pattern"


def test_spamd_with_verdicts_by_score(tmp_path):
    with spamd() as address, FakeMx({}) as peer:
        scores = 'score=[{at=1000.0,verdict="reject"},{at=1.0,verdict="tag"}]'
        settings = (f'filter=[{{name="sa",type="spamd",address=["{address}"],{scores}}}]', 'filters.subject="[SPAM] {subject}"')
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", *settings) as relay:
            with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
                with pytest.raises(smtplib.SMTPDataError) as refused:
                    client.sendmail("a@b.example", ["c@d.example"], HEAD + GTUBE + "\r\n")
                assert refused.value.smtp_code == 554 and b"Refused by sa: GTUBE" in refused.value.smtp_error
                client.sendmail("a@b.example", ["c@d.example"], HEAD + "hello\r\n")  # it lacks a date
            wait_for(lambda: peer.messages)
            header = peer.messages[0][2].partition(b"\r\n\r\n")[0]
            assert b"\r\nX-Spam: Yes\r\nFrom:" in header and header.endswith(b"\r\nSubject: [SPAM] =?utf-8?q?h=C3=A4?=")
            _teach(tmp_path, relay, address)
            checked = relay.cli("filter", "list").stdout
            assert "sa" in checked and "spamd" in checked


def _teach(folder: Path, relay: Relay, address: str) -> None:
    """From files, and from a message in the queue."""
    config, file = folder / "teach.toml", folder / "spam.eml"
    clamd = '[[filter]]\nname = "virus"\ntype = "clamd"\naddress = ["127.0.0.1:1"]\n'
    sa = f'[[filter]]\nname = "sa"\ntype = "spamd"\naddress = ["{address}"]\n'
    config.write_text(f'spool = "{relay.spool}"\n{clamd}{sa}[[listener]]\naddress = "127.0.0.1:2525"\n')
    file.write_text("Message-ID: <1@b.example>\nSubject: cheap\n\n" + "buy cheap things now\n" * 20)

    def taught(*words: str) -> tuple[int, str]:
        found = relay.cli("-c", str(config), "filter", "learn", *words, check=False)
        return found.returncode, found.stdout + found.stderr

    assert taught("spam", str(file)) == (0, f"{file}: sa: learned\n")
    assert taught("spam", str(file)) == (0, f"{file}: sa: known already\n")
    relay.cli("policy", "hold", "--domain", "held.example")
    relay.send("Message-ID: <2@b.example>\r\nSubject: dear\r\n\r\n" + "a letter\r\n" * 20, "a@b.example", "c@held.example")
    ident = wait_for(lambda: [one["id"] for one in relay.events("queued") if one["recipients"] == ["c@held.example"]])[0]
    assert taught("ham", ident) == (0, f"{ident}: sa: learned\n")
    assert taught("ham", "nothing")[0] == 74 and taught("ham", "1ZZZZZZZZZZZZ")[0] == 1
    other = folder / "other.eml"
    other.write_text("Message-ID: <3@b.example>\nSubject: again\n\n" + "buy other things now\n" * 20)
    found = taught("spam", str(other), str(folder / "none"))
    assert found[0] == 74 and found[1].startswith(f"{other}: sa: learned\n"), "what is in front is learned, and said"
    assert taught("spam", str(file), "--only", "virus") == (64, "--only: virus does not learn\n")
    config.write_text(config.read_text().replace(address, "127.0.0.1:1"))
    assert taught("spam", str(file)) == (0, f"{file}: sa: known already\n"), "it is not asked"
    assert taught("spam", str(file), "--again") == (75, f"{file}: sa: 127.0.0.1:1: Connection refused\n")
