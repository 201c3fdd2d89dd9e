"""`python -m tests.fuzz TARGET SECONDS [libFuzzer's flags]`: fuzz one target with atheris, coverage-guided by the interpreted
kernels. Findings are written to crash-* here, new inputs to build/corpus; the repository has a selection of them."""

import sys
from pathlib import Path
from types import FunctionType, ModuleType

import atheris
from aiohttp import multipart
from jinja2 import compiler as jinja_compiler
from jinja2 import lexer as jinja_lexer
from jinja2 import parser as jinja_parser
from jinja2 import sandbox as jinja_sandbox

from relaymta import problems
from relaymta.accept.connection import Connection
from relaymta.accept.http import compose, contents, fields, models, receiving, templating
from relaymta.accept.rights import Rights
from relaymta.accept.transaction import IncomingTransaction
from relaymta.api import access, operations, page
from relaymta.api import verbs as api_verbs
from relaymta.filter import published, signatures
from relaymta.proto import (
    access_session,
    addressees,
    attachment_names,
    attachments,
    auth_exchange,
    authres,
    clamd,
    imap_grammar,
    imap_messages,
    imap_search,
    imap_server,
    imap_session,
    imap_text,
    imap_words,
    managesieve_grammar,
    managesieve_reply,
    managesieve_server,
    milter,
    mime_envelope,
    mime_structure,
    mime_text,
    policy,
    pop3_maildrop,
    pop3_server,
    pop3_session,
    pop3_verbs,
    proxy,
    sasl,
    session,
    sieve,
    sieve_actions,
    sieve_address,
    sieve_arguments,
    sieve_dates,
    sieve_grammar,
    sieve_lexer,
    sieve_match,
    sieve_message,
    sieve_outcome,
    sieve_program,
    sieve_replies,
    sieve_run,
    sieve_strings,
    sieve_tests,
    sieve_vacation,
    sieve_values,
    smtp_server,
    spamc,
    verbs,
    zip_names,
)
from relaymta.proto import header as header_fields
from relaymta.proto import mime as mime_section
from relaymta.sendmail import message, options
from tests.fuzz import targets

CORPUS = Path(__file__).parent / "corpus"


MODULES = (
    attachment_names, attachments, zip_names,
    authres, clamd, header_fields, proxy, sasl, signatures, published, verbs, pop3_verbs, auth_exchange, imap_grammar,
    imap_messages, imap_search, imap_text, mime_section, mime_envelope, mime_structure, mime_text, managesieve_grammar,
    managesieve_reply, managesieve_server, milter, policy, sieve, sieve_actions, sieve_address, sieve_arguments, sieve_dates,
    sieve_grammar, sieve_lexer, sieve_match, sieve_message, sieve_outcome, sieve_program, sieve_replies, sieve_run, sieve_strings,
    sieve_tests, sieve_vacation, sieve_values, spamc, access, operations, page, problems, api_verbs,
    models, compose, contents, fields, templating, jinja_compiler, jinja_lexer, jinja_parser, jinja_sandbox,
    receiving, multipart, addressees, message, options,
)  # fmt: skip
CLASSES = (
    imap_session.Session, imap_server.ServerSession, imap_words.Words, pop3_maildrop.Maildrop, pop3_maildrop.Wanted,
    pop3_session.Session, pop3_server.ServerSession, session.Session, smtp_server.ServerSession, Connection, IncomingTransaction,
    Rights, access_session.AccessSession,
)  # fmt: skip


def instrument(*classes: type) -> None:
    """The methods of classes."""
    for one in classes:
        for name, member in list(vars(one).items()):
            if isinstance(member, FunctionType):
                setattr(one, name, atheris.instrument_func(member))


def instrument_module(module: ModuleType) -> None:
    """All functions and classes of a module; also where tables have the functions already, since their code is changed."""
    for member in list(vars(module).values()):
        if getattr(member, "__module__", None) != module.__name__:
            continue
        if isinstance(member, FunctionType):
            atheris.instrument_func(member)
        elif isinstance(member, type):
            instrument(member)


def main() -> None:
    name, seconds, *flags = sys.argv[1:]
    target = targets.TARGETS[name]
    interpreted = [one for one in (*targets.PARSERS, *targets.REPLIES) if isinstance(one.feed, FunctionType)]
    interpreted += [one for one in targets.IMAP if isinstance(one.event, FunctionType)]
    assert len(interpreted) == 3
    structure = targets.STRUCTURES[1]
    instrument(*interpreted, *CLASSES, structure.Addresses, structure.Octets)
    for module in (*MODULES, targets.MIME[1], targets.TEXTS[1], structure, *targets.SEARCHES[1]):
        instrument_module(module)
    found = Path("build/corpus") / name
    found.mkdir(parents=True, exist_ok=True)

    def one(data: bytes) -> None:
        if len(data) >= 4:
            target(data)

    arguments = [sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", *flags, str(found), str(CORPUS / name)]
    atheris.Setup(arguments, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
