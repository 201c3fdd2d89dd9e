"""The commands of an IMAP session, one row each."""

from collections.abc import Callable
from typing import Final, NamedTuple

from relaymta.proto import imap_grammar as grammar
from relaymta.proto import imap_messages as messages
from relaymta.proto import imap_search
from relaymta.proto.imap_command import Arguments
from relaymta.proto.imap_words import Words

__all__ = ["ANY", "AUTHENTICATED", "CLEAR", "LOGGED_IN", "SELECTED", "VERBS", "Verb"]

# In which states of RFC 9051 3 a command is allowed.
CLEAR: Final = 1  # not authenticated
AUTHENTICATED: Final = 2
SELECTED: Final = 4
LOGGED_IN: Final = AUTHENTICATED | SELECTED
ANY: Final = CLEAR | LOGGED_IN


class Verb(NamedTuple):
    """A command: the states in which it is allowed, and what makes its arguments of its words. `expunges`: EXPUNGE and VANISHED
    may be told before its end, so that message numbers change: not in FETCH, STORE, SEARCH, SORT, THREAD by number (RFC 9051
    7.5.1).
    `writes`: it changes mailboxes (FETCH only by setting \\Seen). `alters`: the one that is selected, which has to be selected
    read-write."""

    states: int
    parse: Callable[[Words], Arguments]
    expunges: bool = True
    writes: bool = False
    alters: bool = False


VERBS: dict[str, Verb] = {
    # Answered by the session itself
    "CAPABILITY": Verb(ANY, grammar.nothing),
    "LOGOUT": Verb(ANY, grammar.nothing),
    "ID": Verb(ANY, grammar.identify),
    "STARTTLS": Verb(CLEAR, grammar.nothing),
    "AUTHENTICATE": Verb(CLEAR, grammar.authenticate),
    "LOGIN": Verb(CLEAR, grammar.login),
    "ENABLE": Verb(LOGGED_IN, grammar.enable),
    "IDLE": Verb(LOGGED_IN, grammar.nothing),
    # By the caller
    "NOOP": Verb(ANY, grammar.nothing),
    "SELECT": Verb(LOGGED_IN, grammar.select),
    "EXAMINE": Verb(LOGGED_IN, grammar.select),
    "CREATE": Verb(LOGGED_IN, grammar.create, writes=True),
    "DELETE": Verb(LOGGED_IN, grammar.mailbox, writes=True),
    "RENAME": Verb(LOGGED_IN, grammar.rename, writes=True),
    "SUBSCRIBE": Verb(LOGGED_IN, grammar.mailbox, writes=True),
    "UNSUBSCRIBE": Verb(LOGGED_IN, grammar.mailbox, writes=True),
    "LIST": Verb(LOGGED_IN, grammar.list_),
    "LSUB": Verb(LOGGED_IN, grammar.lsub),
    "NAMESPACE": Verb(LOGGED_IN, grammar.nothing),
    "STATUS": Verb(LOGGED_IN, grammar.status),
    "APPEND": Verb(LOGGED_IN, grammar.appended, writes=True),
    "GETQUOTA": Verb(LOGGED_IN, grammar.quota),
    "GETQUOTAROOT": Verb(LOGGED_IN, grammar.mailbox),
    "SETQUOTA": Verb(LOGGED_IN, grammar.set_quota),
    "CHECK": Verb(SELECTED, grammar.nothing),
    "CLOSE": Verb(SELECTED, grammar.nothing, expunges=False, writes=True),  # it expunges where it may, and does not tell
    "UNSELECT": Verb(SELECTED, grammar.nothing, expunges=False),
    "EXPUNGE": Verb(SELECTED, messages.expunge, writes=True, alters=True),
    "SEARCH": Verb(SELECTED, imap_search.search, expunges=False),
    "SORT": Verb(SELECTED, imap_search.sort, expunges=False),
    "THREAD": Verb(SELECTED, imap_search.thread, expunges=False),
    "FETCH": Verb(SELECTED, messages.fetch, expunges=False),
    "STORE": Verb(SELECTED, messages.store, expunges=False, writes=True, alters=True),
    "COPY": Verb(SELECTED, messages.copy, writes=True),
    "MOVE": Verb(SELECTED, messages.copy, writes=True, alters=True),
    "UID EXPUNGE": Verb(SELECTED, messages.uid_expunge, writes=True, alters=True),
    "UID SEARCH": Verb(SELECTED, imap_search.uid_search),
    "UID SORT": Verb(SELECTED, imap_search.uid_sort),
    "UID THREAD": Verb(SELECTED, imap_search.uid_thread),
    "UID FETCH": Verb(SELECTED, messages.uid_fetch),
    "UID STORE": Verb(SELECTED, messages.uid_store, writes=True, alters=True),
    "UID COPY": Verb(SELECTED, messages.uid_copy, writes=True),
    "UID MOVE": Verb(SELECTED, messages.uid_copy, writes=True, alters=True),
}
