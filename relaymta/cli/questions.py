"""The questions of `relaymta init`: each with the option that answers it."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import click

from relaymta.cli import answers
from relaymta.cli.answers import MISSING, Answers
from relaymta.cli.console import say
from relaymta.cli.options import absolute, fail
from relaymta.files import read_secret

__all__ = ["asks", "change", "take"]

SELECTOR = "relay1"


class Question(NamedTuple):
    """One question. `name`: of the answer; `text`: what is asked on a terminal, "": nothing, the option alone sets it; `check`:
    an answer in the form in which it is kept, ValueError for one that is not possible; `default`: MISSING: there is none; `due`:
    whether it is asked after the answers so far; `several`: the answer is a list."""

    name: str
    option: str
    text: str
    check: Callable[[str, Answers], str]
    default: Callable[[Answers], str] = lambda found: ""
    due: Callable[[Answers], bool] = lambda found: True
    several: bool = False


def asks() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty()


def _sends(found: Answers) -> bool:
    return bool(found.smarthosts)


QUESTIONS = (
    Question("smarthosts", "--smarthost", "Smart host, as host[:port] (empty: deliver to the MX of each domain)",
             answers.smart_host, lambda found: MISSING, several=True),
    Question("username", "--username", "User name there (empty: no login)", answers.login, due=_sends),
    Question("tls", "--tls", "", answers.tls, lambda found: "verify", _sends),
    Question("ca_file", "--ca-file", "", answers.ca_file, due=_sends),
    Question("domain", "--domain", "Domain of your mail: what is behind the @ of its senders", answers.domain,
             answers.usual_domain),
    Question("hostname", "--hostname", "Full name of this host, for EHLO", answers.hostname, answers.usual_hostname),
    Question("networks", "--network", "Networks of clients that may relay beside this machine, such as 10.0.0.0/8 (empty: none)",
             answers.network, several=True),
    Question("listen", "--listen", "Addresses to accept mail on, as host:port", answers.listen, answers.usual_listen,
             several=True),
    Question("user", "--user", "", answers.user, answers.usual_user),
    Question("selector", "--selector", "", answers.selector, lambda found: SELECTOR, lambda found: found.dkim),
    Question("to", "--to", "Send a test message to (empty: to nobody)", answers.address),
    Question("sender", "--from", "", answers.address, answers.usual_sender, lambda found: bool(found.to)),
)  # fmt: skip
_NEEDS = {"username": "--smarthost", "tls": "--smarthost", "ca_file": "--smarthost", "selector": "--dkim", "sender": "--to"}
_OF_HOST = ("smarthosts", "username", "tls")


def take(given: dict[str, Any], spool: str | None, asking: bool) -> Answers:
    """The answers: from the options `given` (by the names of questions; `direct`, `dkim`, `password_file`, `password_stdin`),
    from who sits at the terminal (`asking`), else the defaults. `spool`: None: the usual one. Ends the program (64) with every
    option that is wrong, or missing."""
    found = Answers(dkim=given["dkim"], spool=answers.usual_spool() if spool is None else spool)
    wrong: list[str] = []
    missing: list[str] = []
    for question in QUESTIONS:
        values = given[question.name]
        values = list(values or ()) if question.several else [] if values is None else [values]
        if question.name == "smarthosts" and given["direct"]:
            if values:
                wrong.append("--direct: there is a --smarthost: give one of them")
        elif not question.due(found):
            wrong += [f"{question.option}: it needs {_NEEDS[question.name]}"] if values and not (wrong or missing) else []
        elif values:
            wrong += _set(question, found, values)
        elif asking and question.text:
            _ask(question, found)
        elif (default := question.default(found)) == MISSING:
            missing.append(question.option)
        else:
            wrong += _set(question, found, default.split() if question.several else [default] if default else [])
        if question.name == "username" and not wrong:
            wrong += _secret(found, given, asking)
    if missing:
        names = {"--smarthost": "--smarthost HOST[:PORT], or --direct to deliver to the MX of each domain"}
        wrong += [f"{names.get(option, option)}: it is missing, and nobody is asked" for option in missing]
    if wrong:
        fail(64, "\n".join(wrong))
    answers.give_ports(found)
    return found


def change(found: Answers) -> None:
    """Ask again for the smart host and the login there."""
    for question in QUESTIONS:
        if question.name in _OF_HOST and question.due(found):
            _ask(question._replace(text=question.text or "TLS there: verify, encrypt, may or off"), found, now=True)
    found.password = found.password_file = ""
    _secret(found, {"password_file": None, "password_stdin": False}, True)
    answers.give_ports(found)


def _set(question: Question, found: Answers, values: list[str]) -> list[str]:
    """Note an answer; what is wrong with it, one line for each value."""
    good: list[str] = []
    wrong = []
    if question.several:
        setattr(found, question.name, good)
    for value in values:
        try:
            if not value:
                raise ValueError("it is empty")
            good.append(question.check(value, found))
        except (ValueError, UnicodeError) as error:
            wrong.append(f"{question.option}: {error}")
    if not question.several:
        setattr(found, question.name, good[0] if good else "")
    return wrong


def _ask(question: Question, found: Answers, now: bool = False) -> None:
    """Ask until the answer is possible. `now`: the default is what was answered before."""
    known = getattr(found, question.name)
    default = " ".join(known) if isinstance(known, list) else known
    default = default if now else question.default(found)
    if question.name == "smarthosts" and not now:
        default = ""  # an answer, other than no option at all
    text = question.text.partition(" (empty:")[0] if now and default else question.text
    while True:
        answer = click.prompt(text, None if default == MISSING else default, show_default=bool(default), err=True).strip()
        values = answer.replace(",", " ").split() if question.several else [answer] if answer else []
        wrong = _set(question, found, values or ([""] if default == MISSING else []))
        if not wrong:
            return
        say(*(line.removeprefix(f"{question.option}: ") for line in wrong), err=True)


def _secret(found: Answers, given: dict[str, Any], asking: bool) -> list[str]:
    """Get the password of the login; what is wrong."""
    file, from_stdin = given["password_file"], given["password_stdin"]
    if not found.username:
        option = "--password-file" if file is not None else "--password-stdin" if from_stdin else ""
        return [f"{option}: it needs {'--smarthost and ' if not found.smarthosts else ''}--username"] if option else []
    if file is not None and from_stdin:
        return ["--password-stdin: there is a --password-file: give one of them"]
    if file is not None:
        found.password_file = absolute(file)
        try:
            read_secret(found.password_file)
        except OSError as error:
            fail(74, f"--password-file: {found.password_file}: {error.strerror}")
        return []
    if not asking and not from_stdin:
        return ["--password-stdin or --password-file: the password is missing, and nobody is asked"]
    while True:
        try:
            found.password = answers.password(_typed_in(found) if asks() else _piped())
            return []
        except ValueError as error:
            if not asks():
                return [f"--password-stdin: {error}"]
            say(str(error), err=True)


def _typed_in(found: Answers) -> str:
    return str(click.prompt(f"Password of {found.username} at {found.host}", hide_input=True, err=True))


def _piped() -> str:
    """All of standard input, without a line end behind it."""
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise ValueError("the password is not UTF-8") from None
    return text.removesuffix("\n").removesuffix("\r")
