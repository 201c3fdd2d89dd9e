"""`python -m tests.fuzz TARGET SECONDS [libFuzzer's flags]`: fuzz one target with atheris, coverage-guided by the interpreted
kernels. Findings are written to crash-* here, new inputs to build/corpus; the repository has a selection of them."""

import sys
from pathlib import Path
from types import FunctionType

import atheris

from relaymta.accept.connection import Connection
from relaymta.accept.rights import Rights
from relaymta.accept.transaction import IncomingTransaction
from relaymta.filter import published, signatures
from relaymta.proto import (
    authres,
    imap_grammar,
    imap_messages,
    imap_search,
    imap_server,
    imap_session,
    imap_words,
    mime_envelope,
    pop3_maildrop,
    pop3_server,
    pop3_session,
    pop3_verbs,
    proxy,
    sasl,
    session,
    smtp_server,
    verbs,
)
from relaymta.proto import header as header_fields
from tests.fuzz import targets

CORPUS = Path(__file__).parent / "corpus"


def instrument(*classes: type) -> None:
    for one in classes:
        for name, member in list(vars(one).items()):
            if isinstance(member, FunctionType):
                setattr(one, name, atheris.instrument_func(member))


def main() -> None:
    name, seconds, *flags = sys.argv[1:]
    target = targets.TARGETS[name]
    interpreted = [one for one in (*targets.PARSERS, *targets.REPLIES) if isinstance(one.feed, FunctionType)]
    interpreted += [one for one in targets.IMAP if isinstance(one.event, FunctionType)]
    assert len(interpreted) == 3
    instrument(imap_session.Session, imap_server.ServerSession, imap_words.Words)
    instrument(pop3_maildrop.Maildrop, pop3_maildrop.Wanted, pop3_session.Session, pop3_server.ServerSession)
    for kernel in (targets.MIME[1], targets.TEXTS[1]):
        instrument(*(one for one in vars(kernel).values() if isinstance(one, type)))
    modules = (
        authres, header_fields, proxy, sasl, signatures, published, verbs, pop3_verbs, mime_envelope, imap_grammar, imap_messages,
        imap_search,
    )  # fmt: skip
    instrument(*interpreted, session.Session, smtp_server.ServerSession, Connection, IncomingTransaction, Rights)
    for module in (*modules, targets.MIME[1], targets.TEXTS[1]):
        for member in list(vars(module).values()):
            if isinstance(member, FunctionType) and member.__module__ == module.__name__:
                atheris.instrument_func(member)
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
