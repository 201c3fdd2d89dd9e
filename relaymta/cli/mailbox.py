"""`relaymta mailbox`: users whose mail is kept here, their addresses, and what they have."""

import sys
import time
from pathlib import Path
from typing import Any

import click

from relaymta.cli.console import record, say, say_json, table
from relaymta.cli.options import Configuration, configured, fail, group, loaded
from relaymta.cli.peer import GivenPath, as_json, asked, counted, daemon, given, given_address, seconds_of, size
from relaymta.duration import parse_size

__all__ = ["mailbox"]


@group
def mailbox() -> None:
    """Manage users whose mail is kept here: their mailboxes, addresses and quotas."""


_MOST = 1 << 60  # octets or messages of a quota
_messages = click.option(
    "--messages",
    type=click.IntRange(-1, _MOST),
    help="Messages, -1 for any, 0 for mailboxes.messages (the default of a new user).",
)


def _octets(option: str, text: str | None) -> int:
    """The octets of a size; 0 for None and "default" (that of the configuration), -1 for "none"."""
    if text is None or text == "default":
        return 0
    if text == "none":
        return -1
    try:
        octets = parse_size(text)
    except ValueError:
        fail(64, f'{option} {text}: expected a size such as "5G", "none" or "default"')
    if octets > _MOST:
        fail(64, f'{option} {text}: expected at most "{_MOST >> 30}G", or "none"')
    return octets or -1


PASSWORD_MOST = 1000  # characters


def _password(given: bool) -> str:
    """A password from a terminal, or the first line of standard input."""
    if not given:
        return ""
    if sys.stdin.isatty():
        return str(click.prompt("password", hide_input=True, confirmation_prompt=True))
    password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        fail(64, "--password: there is none on standard input")
    if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in password):  # the second: octets that are not UTF-8
        fail(64, "--password: it has a NUL, or is not UTF-8")
    if len(password) > PASSWORD_MOST:
        fail(64, f"--password: it has more than {PASSWORD_MOST} characters")
    return password


@mailbox.command()
@click.argument("address", callback=given_address)
@click.option("--password", is_flag=True, help="Ask for a password, or read it from standard input.")
@click.option("--quota", callback=given, metavar="SIZE", help='Octets, such as 5G, or "none"; default: mailboxes.quota.')
@_messages
@configured
def create(read: Configuration, address: str, password: bool, quota: str | None, messages: int | None) -> None:
    """Create a user and the mailboxes."""
    octets = _octets("--quota", quota)
    peer, limits = daemon(read), {"octets": octets, "messages": messages or 0}
    found = asked(peer, "mailbox_create", address=address, password=_password(password), **limits)
    say(f"{found['user']} has mailboxes in shard {found['shard']}")


@mailbox.command(name="list")
@as_json
@configured
def list_users(read: Configuration, as_json: bool) -> None:
    """List the users; the relay need not run."""
    from relaymta.cli import mail_files  # here and below: it imports the store

    found = False
    for page in mail_files.users(read):
        found = True
        if as_json:
            for row in page:
                say_json(row)
        else:
            table("", _HEAD, [[row["user"], row["state"], str(row["shard"]), _quota(row), row["login"]] for row in page])
    if not found and not as_json:
        say("there are no users", err=True)


def _given_alias(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """An address, or "@domain"."""
    given_address(context, parameter, f"x{value}" if value.startswith("@") else value)
    return value


_HEAD = ["user", "state", "shard", "quota", "login"]


def _quota(row: dict[str, Any]) -> str:
    own = row["quota"]
    return "default" if not own else "none" if own < 0 else size(own)


@mailbox.command()
@click.argument("address", callback=given)
@click.option("--messages", is_flag=True, help="The messages in each mailbox, too.")
@as_json
@configured
def show(read: Configuration, address: str, messages: bool, as_json: bool) -> None:
    """Show a user: addresses, mailboxes, what is used.

    The relay need not run."""
    from relaymta.cli import mail_files

    found = mail_files.show(read, address, messages)
    if as_json:
        say_json(found)
        return
    record(f"{found['user']}: {found['state']}, shard {found['shard']}, {counted(found['messages'], 'message', 'messages')}, "
           f"{size(found['octets'])} of {_quota(found)}")  # fmt: skip
    record(f"  addresses: {', '.join(found['addresses'])}")
    for row in found["mailboxes"]:
        special = f" ({row['special']})" if row["special"] else ""
        record(f"  {row['name']}{special}: {counted(row['messages'], 'message', 'messages')}, {row['unseen']} unseen")
        for message in row.get("list", []):
            record(f"    {message['uid']}  {size(message['size'])}  {' '.join(message['flags']) or '-'}  {message['subject']}")


@mailbox.command()
@click.argument("address", callback=_given_alias)
@click.argument("targets", nargs=-1, callback=given_address)
@click.option("--remove", is_flag=True, help="Remove the alias.")
@configured
def alias(read: Configuration, address: str, targets: tuple[str, ...], remove: bool) -> None:
    """Let an address lead to others; @DOMAIN is a catch-all."""
    if bool(targets) == remove:
        fail(64, "to which addresses? `relaymta mailbox alias ADDRESS TARGET ...`, or --remove")
    asked(daemon(read), "mailbox_alias", address=address, targets=list(targets))
    say(f"{address} is no alias any more" if remove else f"{address} leads to {', '.join(targets)}")


def _change(name: str, sentence: str, done: str, **changes: Any) -> None:
    @mailbox.command(name=name, help=sentence)
    @click.argument("address", callback=given)
    @configured
    def command(read: Configuration, address: str) -> None:
        asked(daemon(read), "mailbox_change", address=address, changes=changes)
        say(f"{address} {done}")


_change("disable", "Refuse mail and logins of a user; the mailboxes stay.", "is disabled", disabled=True)
_change("enable", "End `disable`, and bring back a user who was deleted.", "is enabled", disabled=False)


@mailbox.command()
@click.argument("address", callback=given)
@click.option("--now", is_flag=True, help="Remove the mail at once, too: it cannot be brought back.")
@configured
def delete(read: Configuration, address: str, now: bool) -> None:
    """Delete a user; `enable` brings the user back for 7 days."""
    asked(daemon(read), "mailbox_delete", address=address, now=now)
    say(f"{address} is removed" if now else f"{address} is deleted; until the mail is removed in 7 days, "
        f"`relaymta mailbox enable {address}` brings the user back")  # fmt: skip


@mailbox.command()
@click.argument("address", callback=given)
@click.argument("new", callback=given_address)
@configured
def rename(read: Configuration, address: str, new: str) -> None:
    """Give a user another name.

    The old address remains one of the user's."""
    found = asked(daemon(read), "mailbox_rename", address=address, new=new)
    say(f"{address} is {found['user']} now")


@mailbox.command()
@click.argument("address", callback=given)
@click.argument("shard", type=click.IntRange(0))
@configured
def move(read: Configuration, address: str, shard: int) -> None:
    """Move a user to another shard.

    Mail for the user is deferred meanwhile. One who is there already stays."""
    found = asked(daemon(read), "mailbox_move", address=address, shard=shard)
    say(f"{found['user']} is in shard {found['shard']} {'now' if found['moved'] else 'already'}")


@mailbox.command()
@click.argument("address", callback=given)
@configured
def password(read: Configuration, address: str) -> None:
    """Set a user's password.

    It is asked for, or read from standard input."""
    asked(daemon(read), "mailbox_change", address=address, changes={"secret": _password(True)})
    say(f"{address} has a new password")


@mailbox.command()
@click.argument("address", callback=given)
@click.argument("octets", callback=given)
@_messages
@configured
def quota(read: Configuration, address: str, octets: str, messages: int | None) -> None:
    """Set a user's quota: a size such as 5G, "none", or "default".

    The number of messages stays as it is without --messages."""
    size_of = _octets("quota", octets)
    changes = {"octets": size_of} | ({} if messages is None else {"messages": messages})
    asked(daemon(read), "mailbox_change", address=address, changes=changes)
    say(f"the quota of {address} is {'none' if size_of < 0 else octets}")


@mailbox.command()
@click.argument("address", callback=given)
@click.option("--since", callback=given, metavar="DURATION", help="Only of the last 2h, 5d ...; default: as far back as is kept.")
@as_json
@configured
def history(read: Configuration, address: str, since: str | None, as_json: bool) -> None:
    """Show what happened to a user's mail, and what the user has done: deliveries, logins, sessions, changes.

    The relay need not run."""
    from relaymta.cli import mail_history

    earliest = time.time() - seconds_of("--since", since) if since is not None else 0.0
    found = False
    for event in mail_history.events(read, address, earliest):
        found = True
        if as_json:
            say_json(event)
        else:
            mail_history.show(event)
    if not found and not as_json:
        say(f"there is nothing about {address} in the history", err=True)


_folder = click.argument("folder", type=GivenPath(path_type=Path, file_okay=False))


@mailbox.command()
@_folder
@configured
def backup(read: Configuration, folder: Path) -> None:
    """Back up all mailboxes into a new folder; the relay may run."""
    from relaymta.cli import mail_files

    mail_files.backup(read, folder)


@mailbox.command()
@_folder
@click.argument("address", default="", callback=given)
@configured
def restore(read: Configuration, folder: Path, address: str) -> None:
    """Restore all mailboxes, or one user, from a backup.

    All: into a spool that has none; ADDRESS: into the running relay."""
    from relaymta.cli import mail_files

    mail_files.restore(read, folder, address)


@mailbox.command()
@click.option("--repair", is_flag=True, help="Correct what can be; the relay must not run.")
@configured
def verify(read: Configuration, repair: bool) -> None:
    """Read and count everything, and say what is wrong.

    The relay need not run."""
    from relaymta.cli import mail_files

    mail_files.verify(read, repair)


@mailbox.command()
@click.argument("address", callback=given)
@_folder
@click.option(
    "--format", "form", type=click.Choice(["maildir", "mbox"]), default="maildir", help="Maildir++, or an mbox file each."
)
@configured
def export(read: Configuration, address: str, folder: Path, form: str) -> None:
    """Write a user's mail to a new folder as Maildir or mbox.

    The relay need not run."""
    from relaymta.cli import mail_transfer

    mail_transfer.export(read, address, folder, form)


@mailbox.command(name="import")
@click.argument("address", callback=given)
@click.argument("source", metavar="PATH", type=GivenPath(path_type=Path, exists=True))
@click.option(
    "--mailbox",
    "below",
    default="",
    callback=given,
    metavar="NAME",
    help="Into this mailbox, and others below it; default: INBOX.",
)
@configured
def import_mail(read: Configuration, address: str, source: Path, below: str) -> None:
    """Import a Maildir, an mbox file, or a folder of .mbox files.

    What is there already is left out."""
    from relaymta.cli import mail_transfer

    mail_transfer.import_from(read, address, source, below)


@mailbox.command()
@click.argument("domain", required=False, callback=given)
@click.option("--autoconfig", is_flag=True, help="The file by which Thunderbird and others find the listeners, instead.")
@as_json
@configured
def dns(read: Configuration, domain: str | None, autoconfig: bool, as_json: bool) -> None:
    """Show the DNS records by which mail, and mail programs, find this relay: MX, and SRV of its listeners.

    DOMAIN: one whose mail is kept here; default: all. The relay need not run."""
    from relaymta.cli.mail_dns import autoconfig_of, records
    from relaymta.errors import near
    from relaymta.proto.address import domain_matches, in_a_labels, in_dns

    config = loaded(read)
    if not config.local_domains:
        fail(69, 'no route has protocol = "mailbox": no mail is kept here')
    domains = [in_a_labels(name) for name in config.local_domains if name[0] != "."]
    if domain is not None:
        domains = [in_a_labels(domain.removesuffix("."))]
        if not in_dns(domains[0]):
            fail(64, f"{domain!r} is not a domain")
        if not domain_matches(domains[0], config.local_domains):
            fail(69, f"no route keeps mail for {domain}{near(domain, config.local_domains)}")
    if autoconfig:
        say(*autoconfig_of(config, domains))
        return
    for one in domains:
        for row in records(config, one):
            if as_json:
                say_json(row._asdict())
            else:
                say(f"{row.name}  {row.kind}  {row.value}")
