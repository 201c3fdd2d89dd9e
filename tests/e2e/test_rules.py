"""Rules about mail in the running relay: as docs/rules.md has it."""

import io
import json
import smtplib
import zipfile
from email.message import EmailMessage
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, Relay, wait_for
from tests.support.fake_mx import FakeMx

RULE = """
[[mail_rule]]
name = "no programs"
attachment = ["*.exe", "*.js", "*.scr", "type:program", "archive:*.exe"]
reply = "552 5.7.0 {match} is not taken here"
"""
SECRET = """
[[mail_rule]]
name = "secrets"
body = ["BEGIN [A-Z ]*PRIVATE KEY"]
verdict = "hold"
enforce = true
"""


def mail(*files: tuple[str, bytes], text: str = "see the attachment\n") -> bytes:
    message = EmailMessage()
    message["From"], message["Subject"] = "a@b.example", "files"
    message.set_content(text)
    for name, data in files:
        message.add_attachment(data, maintype="application", subtype="octet-stream", filename=name)
    return message.as_bytes().replace(b"\n", b"\r\n")


def zipped(name: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("readme.txt", b"x" * 1000)
        archive.writestr(name, b"MZ")
    return packed.getvalue()


BAD = {
    "setup.exe": mail(("setup.exe", b"x")),
    "photo.jpg": mail(("photo.jpg", b"MZ\x90\x00" + bytes(1000))),
    "in/tool.exe": mail(("files.zip", zipped("in/tool.exe"))),
    "late.scr": mail(("large.bin", bytes(2_000_000)), ("late.scr", b"x")),
}


class Reloading(Relay):
    """With a file of its configuration."""

    def __init__(self, folder: Path, peer: FakeMx) -> None:
        super().__init__(folder, None, workers=2)
        self.config = folder / "relaymta.toml"
        self.base = (
            f'spool = "{self.spool}"\nhostname = "relay.example"\nworkers = 2\n[[listener]]\naddress = "127.0.0.1:{self.port}"\n'
            f'[[route]]\nname = "all"\nhosts = ["127.0.0.1:{peer.port}"]\n[log]\nfile = "{self.log}"\n'
            f'[metrics]\nlisten = "127.0.0.1:{self.metrics_port}"\n'
        )

    def command(self) -> list[str]:
        return [self.python, "-m", "relaymta", "-c", str(self.config), "serve", "--ephemeral"]

    def post(self, data: bytes) -> str:
        """The reply to a message."""
        with smtplib.SMTP("127.0.0.1", self.port, timeout=PATIENCE) as client:
            try:
                client.sendmail("a@b.example", ["c@d.example"], data)
            except smtplib.SMTPDataError as error:
                return f"{error.smtp_code} {error.smtp_error!r}"
        return "250"

    def stats(self) -> dict[str, dict]:
        lines = self.cli("-c", str(self.config), "rule", "stats", "--json").stdout.splitlines()
        return {row["rule"]: row for row in map(json.loads, lines)}


def test_a_rule_is_tried_and_then_enforced(tmp_path):
    with FakeMx({}) as peer:
        relay = Reloading(tmp_path, peer)
        relay.config.write_text(relay.base + RULE)
        with relay:
            for data in BAD.values():
                assert relay.post(data) == "250"
            assert relay.post(mail(("report.pdf", b"%PDF-1.7"))) == "250"
            wait_for(lambda: len(peer.messages) == 5)
            row = relay.stats()["no programs"]
            assert (row["enforced"], row["dry"], row["looked"], row["enforce"]) == (0, 4, 5, False) and len(row["last"]) == 4
            found = relay.cli("-c", str(relay.config), "rule", "why", row["last"][0]).stdout
            assert "no programs  would be reject (enforce = false)" in found
            relay.config.write_text(relay.base + RULE + "enforce = true\n" + SECRET)
            relay.cli("-c", str(relay.config), "reload")
            for name, data in BAD.items():
                assert f"{name} is not taken here" in relay.post(data)
            key = mail(text="-----BEGIN RSA PRIVATE KEY-----\n")
            assert relay.post(key) == "250"
            row = relay.stats()["no programs"]
            assert (row["enforced"], row["dry"]) == (4, 4)
            assert relay.metric('relaymta_rule_matches_total{enforced="true",rule="no programs"}') == 4
            held = relay.cli("-c", str(relay.config), "queue", "list", "--held").stdout
            assert "rule secrets: BEGIN RSA PRIVATE KEY" in held
            relay.cli("-c", str(relay.config), "queue", "release", "--all")
            wait_for(lambda: len(peer.messages) == 6)
            assert b"PRIVATE KEY" in peer.messages[-1][2]


def test_by_hand(tmp_path):
    with FakeMx({}) as peer:
        relay = Reloading(tmp_path, peer)
        relay.config.write_text(relay.base + RULE + "enforce = true\n")
        file = tmp_path / "x.eml"
        for name, data in BAD.items():
            file.write_bytes(data)
            tried = relay.cli("-c", str(relay.config), "rule", "test", str(file), check=False)
            assert tried.returncode == 2 and "reject" in tried.stdout and name in tried.stdout
        file.write_bytes(mail())
        assert relay.cli("-c", str(relay.config), "rule", "test", str(file)).returncode == 0
        relay.config.write_text(relay.base + RULE)
        file.write_bytes(BAD["setup.exe"])
        assert relay.cli("-c", str(relay.config), "rule", "test", str(file), check=False).returncode == 1
        relay.config.write_text(relay.base)
        assert relay.cli("-c", str(relay.config), "rule", "test", str(file), check=False).returncode == 78


@pytest.mark.parametrize("clients", ["trusted", "unauthenticated"])
def test_whose_mail(tmp_path, clients):
    with FakeMx({}) as peer:
        rule = f'mail_rule=[{{name="r",attachment=["*.exe"],clients="{clients}",enforce=true}}]'
        networks = ('relay.networks=["127.0.0.1/32"]', 'relay.domains=["d.example"]', "verify.results=false")
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", rule, *networks) as relay:
            for address, trusted in (("127.0.0.1", True), ("127.0.0.2", False)):
                text = BAD["setup.exe"].decode()
                if trusted == (clients == "trusted"):
                    with pytest.raises(smtplib.SMTPDataError, match="Refused by the rule r: setup"):
                        relay.send_from(address, text)
                else:
                    relay.send_from(address, text)
            wait_for(lambda: len(peer.messages) == 1)
