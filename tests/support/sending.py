"""Programs that send mail, each configured by the lines of docs/programs.md: by SMTP with TLS and a login, and by sendmail(1)."""

import json
import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from email.headerregistry import Address
from email.message import EmailMessage
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme

import relaymta
from relaymta.auth.passwords import argon2id
from tests.support.daemon import Relay
from tests.support.pages import blocks, section
from tests.support.programs import need

__all__ = ["FAILED", "PASSWORD", "PROGRAM", "WAYS", "Done", "Mail", "Sending", "Way", "nodemailer"]

PAGE = "programs.md"
PROGRAM = Path(relaymta.__file__).parent / "sendmail" / "__main__.py"
PASSWORD = "secret"
PACKAGES = (Path(__file__).parents[2] / "build/npm/node_modules/nodemailer", Path("/usr/share/nodejs/nodemailer"))
# Behind the lines of the page: a way without mailboxes, and one with them, where nobody is.
MORE = """
[[route]]
name = "here"
protocol = "mailbox"
recipient_domain = ["kept.example"]

[[route]]
name = "out"
hosts = ["127.0.0.1:{peer}"]
tls = "off"

[relay]
networks = []

[intake]
complete_domain = "example.org"

[local]
socket = "{folder}/sendmail.sock"
drop = "{folder}/drop"
"""


class Mail(NamedTuple):
    """What is to be sent, from ann@example.org. `attached`: the octets of a file, empty: there is none."""

    to: list[str]
    cc: list[str]
    bcc: list[str]
    subject: str
    text: str
    attached: bytes = b""

    @property
    def message(self) -> EmailMessage:
        """The message, with Bcc."""
        made = EmailMessage()
        made["From"] = Address("Änn", addr_spec="ann@example.org")
        for name, given in (("To", self.to), ("Cc", self.cc), ("Bcc", self.bcc)):
            if given:
                made[name] = ", ".join(given)
        made["Subject"] = self.subject
        made.set_content(self.text, cte="8bit")
        if self.attached:
            made.add_attachment(self.attached, "application", "octet-stream", filename="grün.bin")
            made.set_boundary("limit")
        return made


class Done(NamedTuple):
    """The exit status of a program, and what it has said on both outputs."""

    status: int
    said: str


class Sending(Relay):
    """A relay as the page has it, with the programs configured for it, in the home directory `home`. Its mail goes to the port
    `peer`. `sendmail`: our program; with the variable POSTFIX that of Postfix, whose configuration is there."""

    def __init__(self, folder: Path, peer: int) -> None:
        super().__init__(folder, None)
        authority = trustme.CA()
        self.ca = folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(folder / "cert.pem"))
        (folder / "accounts.toml").write_text(
            f'[[account]]\nname = "ann"\nsenders = ["ann@example.org"]\nsecrets = [{{ hash = "{argon2id(PASSWORD)}" }}]\n'
        )
        self.drop = folder / "drop"
        self.drop.mkdir()
        self.home = folder / "home"
        self.home.mkdir()
        self.sendmail = folder / "sendmail"
        self.sendmail.write_text(
            '#!/bin/sh\n[ -z "$POSTFIX" ] || MAIL_CONFIG="$POSTFIX" exec /usr/sbin/sendmail "$@"\n'
            f"RELAYMTA_SENDMAIL_SOCKET={folder}/sendmail.sock RELAYMTA_DROP={self.drop} "
            f'RELAYMTA_DROP_PROGRAM=none exec {sys.executable} -IS {PROGRAM} "$@"\n'
        )
        self.sendmail.chmod(0o755)
        self._here = {
            '"0.0.0.0:587"': f'"127.0.0.1:{self.port}"',
            "/etc/relaymta/certs/mail.example.org.pem": f"{folder}/cert.pem", "/etc/relaymta/accounts.toml":
            f"{folder}/accounts.toml", "/etc/ssl/certs/ca-certificates.crt": str(self.ca), "/usr/sbin/sendmail":
            str(self.sendmail), "mail.example.org": "localhost", "587": str(self.port),
        }  # fmt: skip
        listeners = blocks(section(PAGE, "The relay"))[0]
        self.config = folder / "relay.toml"
        self.config.write_text(self.here(listeners) + MORE.format(peer=peer, folder=folder))
        self.variables = {
            "HOME": str(self.home), "PATH": os.environ["PATH"] + ":/usr/sbin", "LC_ALL": "C.UTF-8",
            "GIT_CONFIG_NOSYSTEM": "1", "NODE_EXTRA_CA_CERTS": str(self.ca), "NAME": "Änn",
            **{f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in
               (("NAME", "Änn"), ("EMAIL", "ann@example.org"))},
        }  # fmt: skip
        for name, title in ((".msmtprc", "msmtp"), (".muttrc", "mutt"), (".gitconfig", "git send-email")):
            file = self.home / name
            file.write_text(self.line(title))
            file.chmod(0o600)
        (self.home / ".mailrc").write_text(f"set sendmail={self.sendmail}\n")

    def command(self) -> list[str]:
        found = super().command()
        at = found.index("--listen")
        return [*found[:at], "--config", str(self.config), *found[at + 2 :]]

    def here(self, text: str) -> str:
        """Lines of the page with what is here in place of what they have."""
        for there, other in self._here.items():
            text = text.replace(there, other)
        return text

    def line(self, title: str, number: int = 0) -> str:
        """A block of a section of the page, as it is here."""
        return self.here(blocks(section(PAGE, title))[number])

    def run(self, *words: str, given: bytes = b"", **variables: str) -> Done:
        """Run a program with this standard input, in the home directory."""
        done = subprocess.run(
            [need(words[0]), *words[1:]], input=given, capture_output=True, check=False, cwd=self.home, timeout=90,
            env=self.variables | variables,
        )  # fmt: skip
        return Done(done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace"))

    def file(self, name: str, octets: bytes) -> str:
        """The path of a new file."""
        path = self.home / name
        path.write_bytes(octets)
        return str(path)


def _msmtp(place: Sending, mail: Mail) -> Done:
    return place.run("msmtp", "-t", given=mail.message.as_bytes())


def _replaced(words: list[str], option: str, values: list[str]) -> list[str]:
    """A command line with an option once for each of these values."""
    at = words.index(option)
    return [*words[:at], *(word for one in values for word in (option, one)), *words[at + 2 :]]


def _everybody(mail: Mail) -> list[str]:
    return [*mail.to, *mail.cc, *mail.bcc]


def _swaks(place: Sending, mail: Mail) -> Done:
    file = place.file("swaks.eml", mail.message.as_bytes())
    words = shlex.split(place.line("swaks").replace("\\\n", "").replace("@message.eml", f"@{file}"))
    words[words.index("--to") + 1] = ",".join(_everybody(mail))
    return place.run(*words)


def _curl(place: Sending, mail: Mail) -> Done:
    file = place.file("curl.eml", mail.message.as_bytes())
    words = shlex.split(place.line("curl").replace("\\\n", "").replace("message.eml", file))
    return place.run(*_replaced(words, "--mail-rcpt", _everybody(mail)))


def _smtplib(place: Sending, mail: Mail) -> Done:
    file = place.file("smtplib.eml", mail.message.as_bytes())
    code = "import email.policy, smtplib, ssl, sys\npolicy = email.policy.SMTP\n"
    code += f"message = email.message_from_bytes(open({file!r}, 'rb').read(), policy=policy)\n"
    return place.run(sys.executable, "-c", code + place.line("Python"))


def _mutt(place: Sending, mail: Mail, *more: str) -> Done:
    words = [word for option, given in (("-c", mail.cc), ("-b", mail.bcc)) for one in given for word in (option, one)]
    attached = ["-a", place.file("grün.bin", mail.attached)] if mail.attached else []
    return place.run(
        "mutt", "-n", "-e", "set copy=no realname='Änn'", *more, "-s", mail.subject, *words, *attached, "--", *mail.to,
        given=mail.text.encode(),
    )  # fmt: skip


def _mutt_sendmail(place: Sending, mail: Mail) -> Done:
    return _mutt(place, mail, "-e", "unset smtp_url", "-e", f"set sendmail='{place.sendmail} -oem -oi'")


def _git(place: Sending, mail: Mail, *more: str) -> Done:
    message = mail.message
    del message["From"], message["To"], message["Cc"], message["Bcc"]
    file = place.file("0001.patch", message.as_bytes())
    given = [f"--{name}={one}" for name, all in (("to", mail.to), ("cc", mail.cc), ("bcc", mail.bcc)) for one in all]
    return place.run("git", "send-email", "--quiet", "--confirm=never", "--suppress-cc=all", "--no-validate", *more, *given, file)


def _git_sendmail(place: Sending, mail: Mail) -> Done:
    return _git(place, mail, f"--sendmail-cmd={place.sendmail}")


def _mailx(place: Sending, mail: Mail) -> Done:
    words = shlex.split(place.line("mail"))
    words[1:] = ["-s", mail.subject, *(word for one in mail.cc for word in ("-c", one))]
    return place.run(
        "bsd-mailx", *words[1:], *(word for one in mail.bcc for word in ("-b", one)), *mail.to, given=mail.text.encode()
    )


def _php(place: Sending, mail: Mail) -> Done:
    """Header and body as scripts have them: the subject in octets, lines that end anyhow."""
    headers = f"From: Änn <ann@example.org>\r\nCc: {', '.join(mail.cc)}\r\nBcc: {', '.join(mail.bcc)}\r\nMIME-Version: 1.0\r\n"
    headers += "Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit"
    values = [json.dumps(one, ensure_ascii=False) for one in (", ".join(mail.to), mail.subject, mail.text, headers)]
    file = place.file("mail.php", f'<?php exit(mail({", ".join(values)}, "-fann@example.org") ? 0 : 1);'.encode())
    option = place.line("PHP").strip().replace(" = ", "=", 1)
    return place.run("php", "-n", "-d", option, file)


def nodemailer() -> Path:
    """Where it is: that of npm, else that of Debian."""
    found = next((one for one in PACKAGES if one.exists()), None)
    if found is None:
        reason = (
            f"nodemailer is missing: npm install --prefix {PACKAGES[0].parents[1]} nodemailer, or apt-get install node-nodemailer"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def _nodemailer(place: Sending, mail: Mail, number: int = 0) -> Done:
    given: dict[str, object] = {
        "from": "Änn <ann@example.org>",
        "to": mail.to,
        "cc": mail.cc,
        "bcc": mail.bcc,
        "subject": mail.subject,
    }
    given["text"] = mail.text
    if mail.attached:
        given["attachments"] = [{"filename": "grün.bin", "path": place.file("node.bin", mail.attached)}]
    code = f"""\
        const nodemailer = require({str(nodemailer())!r});
        {place.line("nodemailer", number)}
        transport.sendMail({json.dumps(given)}, (error, info) => {{
            if (error) console.log(error.code, error.responseCode || "", error.message);
            else console.log(JSON.stringify(info.rejected || []));
            process.exit(error ? 1 : 0);
        }});
        """
    return place.run("node", "-e", textwrap.dedent(code))


FAILED = -1  # any status but 0: perl's is that of the last system call


class Way(NamedTuple):
    """How a program sends. `refused`: how it ends where one of several recipients is refused, a part of what it says then, and
    whether the others have the message; `down`: its exit status while the relay is down, and a part of what it says. `sendmail`:
    it is by it; `named`: the program says who is the sender of the envelope, else it is the user; `whole`: what it is given is a
    message, which is sent as it is; `attaches`: attachments, too; `adds`: what the program itself puts behind the text; `quotes`:
    it writes lines that begin with "From " as mailboxes have them."""

    send: Callable[[Sending, Mail], Done]
    refused: tuple[int, str, bool]
    down: tuple[int, str]
    sendmail: bool = False
    named: bool = True
    whole: bool = False
    attaches: bool = True
    adds: str = ""
    quotes: bool = False


WAYS = {
    "msmtp": Way(_msmtp, (65, "550", False), (75, "Connection refused"), whole=True),
    "swaks": Way(_swaks, (0, "550", True), (2, "Connection refused"), whole=True, adds="\n"),
    "curl": Way(_curl, (55, "550", False), (7, "onnect"), whole=True),
    "smtplib": Way(_smtplib, (0, "", True), (1, "ConnectionRefusedError"), quotes=True),
    "mutt": Way(_mutt, (1, "550", False), (1, "Connection refused")),
    "git": Way(_git, (FAILED, "5.1.1 no such user", False), (FAILED, "Unable to initialize SMTP"), attaches=False),
    "nodemailer": Way(_nodemailer, (0, "nobody@kept.example", True), (1, "ECONN")),
    "mutt by sendmail": Way(_mutt_sendmail, (1, "65", True), (0, ""), sendmail=True),
    "git by sendmail": Way(_git_sendmail, (65, "5.1.1 no such user", True), (0, ""), sendmail=True, named=False, attaches=False),
    "nodemailer by sendmail": Way(lambda place, mail: _nodemailer(place, mail, 1), (1, "65", True), (0, ""), sendmail=True),
    "bsd-mailx": Way(_mailx, (1, "65", True), (0, ""), sendmail=True, named=False, attaches=False),
    "php": Way(_php, (1, "", True), (0, ""), sendmail=True, attaches=False, adds="\n"),
}
