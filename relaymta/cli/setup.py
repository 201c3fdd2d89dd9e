"""The steps of `relaymta init`, and the report about them."""

import asyncio
import contextlib
import os
import shlex
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relaymta.cli.answers import USER, Answers
from relaymta.cli.console import say, say_json
from relaymta.cli.initial import Exists, NewFile, Places, configuration, write
from relaymta.cli.options import Configuration, fail, loaded, usual_path
from relaymta.cli.peer import running
from relaymta.cli.questions import change
from relaymta.errors import ConfigError, RelayError

if TYPE_CHECKING:
    from relaymta.cli.trial import Running
    from relaymta.config import Config

__all__ = ["Setup"]

UNITS = ("/etc/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
UNIT = "relaymta.service"
DMARC = "v=DMARC1; p=none"
CHOICES = ("again", "change", "write", "quit")


class Setup:
    """What is set up, by the answers, in the configuration `path` with the further keys `settings`; and what is reported: lines
    as they come or (`as_json`) one object at the end. Ends the program (64, 78) when the answers make no valid configuration."""

    def __init__(self, found: Answers, path: Path, settings: dict[str, Any], as_json: bool) -> None:
        self._found = found
        self._path, self._settings, self._json = path, settings, as_json
        self._running = False  # a daemon has the new configuration
        self._late = False  # a daemon has it once it is started again
        self._row: dict[str, Any] = {
            "config": str(path), "files": [], "hosts": [], "notes": [], "dns": [], "test": None, "next": [],
        }  # fmt: skip
        self._plan()

    def _plan(self) -> None:
        from relaymta.proto.address import in_a_labels

        found, folder = self._found, self._path.parent
        key = folder / "dkim" / f"{in_a_labels(found.domain)}.{found.selector}.pem"
        password = found.password_file or str(folder / "smarthost.password")
        self._places = Places(self._path, password, str(key) if found.dkim else "")
        self._text, self._config = self._made(self._places)
        self._makes_key = found.dkim and not os.path.lexists(key)

    def _made(self, places: Places) -> tuple[str, "Config"]:
        try:
            text = configuration(self._found, places, self._settings)
        except ValueError as error:
            fail(64, str(error))
        return text, loaded(Configuration(None, tomllib.loads(text)))

    def _files(self, with_key: bool = True) -> list[NewFile]:
        """The files to write; the content of the key is made now."""
        from relaymta.cli.dkim import new_key

        files = []
        if self._found.password:
            files.append(NewFile(Path(self._places.password), f"{self._found.password}\n".encode()))
        if self._makes_key:
            files.append(NewFile(Path(self._places.key), new_key("rsa") if with_key else b"", never_replaces=True))
        return [*files, NewFile(self._path, self._text.encode(), group=True)]  # last: with it, all it names is there

    @property
    def named(self) -> str:
        """The paths of the files to write, for a question."""
        return ", ".join(str(file.path) for file in self._files(with_key=False))

    def _say(self, *lines: str) -> None:
        if not self._json:
            say(*lines)

    def _note(self, *sentences: str) -> None:
        self._row["notes"] += sentences
        self._say(*(f"note: {sentence}" for sentence in sentences))

    # The files

    def show_files(self) -> None:
        """Show what would be written, but no secret, and the DNS records."""
        for file in self._files(with_key=False):
            text = file.content.decode() if file.path == self._path else ""
            self._list(file, content=text)
            self._say(*(f"  {line}".rstrip() for line in text.splitlines()))
        self.show_records()
        if self._json:
            say_json(self._row)

    def _list(self, file: NewFile, **more: str) -> None:
        owner = self._found.user if os.geteuid() == 0 else ""
        who = ("root" if file.group else owner) + (f":{owner}" if file.group else "") if owner else ""
        what = {str(self._path): "the configuration", self._places.password: "the password", self._places.key: "the DKIM key"}
        self._row["files"].append({"path": str(file.path), "mode": f"{file.mode:04o}", "owner": who, **more})
        self._say(f"{file.path}: {what[str(file.path)]} (mode {file.mode:04o}{f', {who}' if who else ''})")

    def write(self, force: bool) -> None:
        """Write all files; ends the program (73) when one cannot be written, or is there already and `force` is not given."""
        files = self._files()
        try:
            write(files, self._found.user, force)
        except Exists as error:
            cure = "it has come meanwhile: run this again" if force else "--force replaces it"
            fail(73, f"{error.filename} exists already: {cure}; nothing is written")
        except OSError as error:
            fail(73, f"{error.filename or self._path.parent}: {error.strerror or error}; nothing is written")
        for file in files:
            self._list(file)
        if self._found.dkim and not self._makes_key:
            self._note(f"{self._places.key} was there already, and is used as it is")
        if os.geteuid() == 0 and not self._found.user:
            self._note(f"there is no user {USER}: the relay would stay root; see the comment on user in {self._path}")

    def check(self) -> None:
        """What `config check` says about the configuration; ends the program (78) with the problems that it finds."""
        from relaymta.control import program

        command = [*program("relaymta.cli", "config", "check"), "-c", str(self._path)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode:
            fail(78, f"{done.stderr.strip()}\nthe files are written: correct {self._path}, then `relaymta config check`")
        self._note(*(line.removeprefix("note: ") for line in done.stdout.splitlines() if line.startswith("note: ")))

    # The DNS

    def show_records(self) -> None:
        """Show the records that the domain needs."""
        records = list(self._records())
        self._row["dns"] = [{"name": name, "type": "TXT", "value": value} for name, value, _ in records]
        from relaymta.filter.keys import zone_line

        self._say("DNS records to add:")
        for name, value, more in records:
            self._say(f"  {zone_line(name, value)}" + (f"  ({more})" if more else ""))

    def _records(self) -> Iterator[tuple[str, str, str]]:
        """(Name, text, what else to know) of each TXT record."""
        from relaymta.cli import spf
        from relaymta.cli.dkim import record_of
        from relaymta.proto.address import in_a_labels

        domain = in_a_labels(self._found.domain)
        needed, sentences = spf.mechanisms(self._config, domain)
        self._note(*sentences)
        if needed:
            yield domain, f"v=spf1 {needed} -all", f"or add {needed} to an existing record"
        for settings in self._config.dkim:
            if not os.path.exists(settings.key):
                self._note("the record of the DKIM key is shown when the key is there")
                continue
            try:
                yield *record_of(settings), ""
            except ConfigError as error:
                self._note(str(error))
        yield f"_dmarc.{domain}", DMARC, "if there is none; later p=quarantine or p=reject"

    # The smart host

    def reach(self, asking: bool) -> bool:
        """Connect to the smart hosts, or to the MX of who gets the test message: whether that works. Where it does not, whoever
        is asked decides what to do; without one the program ends (1)."""
        while self._connects():
            bad = [row for row in self._hosts() if row["failure"]]
            if not bad:
                return True
            if not asking:
                if self._json:
                    say_json(self._row)
                    raise SystemExit(1)
                fail(1, "nothing is written; --no-connect writes the files without a connection")
            choice = click.prompt(
                "Try again, change the answers about the smart host, write the files all the same, or quit",
                type=click.Choice(CHOICES), default="change", err=True,
            )  # fmt: skip
            if choice == "quit":
                raise click.Abort
            if choice == "write":
                return False
            if choice == "change":
                change(self._found)
                self._plan()
        return True

    def _connects(self) -> bool:
        if self._found.smarthosts or self._found.to:
            return True
        self._note("outgoing port 25 was not tried, since there is no --to")
        return False

    def _hosts(self) -> list[dict[str, Any]]:
        """What comes of connections to the smart hosts, which is reported."""
        from relaymta.cli.trial import reach

        with self._with_password() as (config, there):
            rows = reach(config, self._found.to)
        for row in rows:
            row["failure"] = row["failure"].replace(there, self._places.password)
            if row["failure"]:
                say(f"{row['host']}: {row['failure']}", f"cure: {row['cure']}", err=True)
            else:
                tls = row["tls"] or "without TLS"
                login = f", logged in as {row['login']}" if row["login"] else ""
                self._say(f"{row['host']} [{row['address']}]:{row['port']}: {tls}{login}")
        if not self._found.smarthosts:
            self._note(*asyncio.run(_pointers(self._config)))
        self._row["hosts"] = rows
        return rows

    @contextlib.contextmanager
    def _with_password(self) -> Iterator[tuple["Config", str]]:
        """The configuration with a file for the password, which is removed behind that; and its path."""
        if not self._found.password:
            yield self._config, self._places.password
            return
        with tempfile.TemporaryDirectory(prefix="relaymta-init-") as folder:
            path = Path(folder, "password")
            path.touch(0o600)
            path.write_text(self._found.password, encoding="utf-8")
            yield self._made(self._places._replace(password=str(path)))[1], str(path)

    # The test message

    def send(self, seconds: float) -> bool:
        """Send a test message, if somebody is to get one; whether it was delivered within so many seconds."""
        from relaymta.cli import trial

        found = self._found
        if not found.to:
            self._say("no test message is sent: there is no --to")
            return True
        failed = {"id": "", "state": "refused", "peer": "", "reply": "", "cure": ""}
        try:
            with self._relay() as relay:
                sent = trial.send(relay, self._config, found.sender, found.to, seconds)
        except (RelayError, OSError) as error:
            sent = failed | {"reply": str(error)}
        self._row["test"] = sent
        first, *more = trial.text_of(sent)
        self._say(f"test message to {found.to}: {first}", *more)
        delivered = bool(sent["state"] == "delivered")
        if not delivered and sent["id"]:
            self._note(f"`relaymta message explain {sent['id']}` says more" if self._running else "the test message is not kept")
        return delivered

    @contextlib.contextmanager
    def _relay(self) -> Iterator["Running"]:
        """The running daemon where it has the new configuration, else a relay for this message."""
        from relaymta.cli import trial

        found = self._of_daemon()
        if found is not None:
            yield found
            return
        with trial.started(self._config, self._path) as relay:
            yield relay

    def _of_daemon(self) -> "Running | None":
        from relaymta.cli import trial
        from relaymta.config import parse_hostport

        peer = running(Configuration(self._path, {}))
        if peer is None:
            return None
        listens = peer.ask("status")["listeners"]
        address = next((listener.address for listener in self._config.listener if listener.address in listens), "")
        answer = str(peer.ask("reload")) if address else f"it listens on {', '.join(listens)}"
        self._running = answer.startswith("reloaded") and "restart" not in answer
        if not self._running:
            self._late = True
            self._note("; ".join(["the relay that runs needs a restart", *answer.split("\n")]))
            return None
        host, port = parse_hostport(address)
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        return trial.Running(local.get(host, host), port, self._config.control_path, ours=False)

    def end(self) -> None:
        """Report what to do next."""
        options = "" if self._path == usual_path().resolve() else f" -c {shlex.quote(str(self._path))}"
        why = "stop the relay that runs, and start it again" if self._late else "start it"
        steps = [] if self._running else [(self._start(options), why)]
        steps += [
            (f"relaymta status{options}", "is it up?"),
            (f"relaymta doctor domain {self._config.dkim[0].domain if self._config.dkim else self._found.domain}{options}",
             "once the DNS has the records"),
        ]  # fmt: skip
        self._row["next"] = [command for command, _ in steps]
        most = max(len(command) for command, _ in steps)
        self._say("Next:", *(f"  {command:<{most}}  {why}" for command, why in steps))
        self._say("Pages: docs/submission.md (logins and TLS for clients), docs/delivery.md (routes), docs/dkim.md, docs/cli.md")
        if self._json:
            say_json(self._row)

    def _start(self, options: str) -> str:
        if options or os.geteuid() != 0 or not any(os.path.exists(f"{folder}/{UNIT}") for folder in UNITS):
            return f"relaymta serve{options}"
        return "systemctl restart relaymta" if self._late else "systemctl enable --now relaymta"


async def _pointers(config: "Config") -> list[str]:
    """What is wrong with the names of our own addresses, from which mail is sent."""
    from relaymta.cli.doctor import addresses_of
    from relaymta.cli.doctor_names import reverse
    from relaymta.dns import Resolver

    resolver = Resolver(config.delivery.nameservers)
    try:
        rows = [row for address in addresses_of(config) for row in await reverse(resolver, address, config.hostname)]
    finally:
        await resolver.close()
    private = "this host sends from a private address: see `relaymta doctor domain` with the public one as --address"
    return [private if what.startswith("address") else f"{what}: {found}" for what, state, found in rows if state != "ok"]
