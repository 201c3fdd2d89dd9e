"""IMAP: imaptest's scripts, and its clients, which use one user's mail at once and compare what they are told."""

import itertools

import pytest

from tests.support.imap_servers import SERVERS, Account, ImapServer, started
from tests.support.imaptest import PROGRAM, SECONDS, needs, scripted, session, stressed

pytestmark = [
    pytest.mark.skipif(not PROGRAM, reason="IMAPTEST is not set: the path of Dovecot's imaptest"),
    pytest.mark.timeout(3600 + SECONDS),
]

# What clients do. Probabilities are in percent: sessions are short, unless "logout" is small.
STRESS = {
    "short sessions": "clients=10 checkpoint=1",
    "long sessions": "clients=10 checkpoint=1 logout=1 expunge=10",
    "one command at a time": "clients=10 checkpoint=1 logout=1 expunge=10 no_pipelining",
    "copies and moves": "clients=10 checkpoint=1 logout=1 copybox=copies copy=30 move=20",
    "messages with owners": "clients=10 logout=1 expunge=5 own_msgs",
    "mailboxes": "clients=10 mcreate=50 mdelete=20 mrename=50 msubs=50",
}
# Words of imaptest, and the capabilities that they need.
ENABLED = {"rev1": ("", set()), "qresync": ("qresync", {"QRESYNC"}), "rev2": ("imap4rev2", {"IMAP4REV2", "QRESYNC"})}
# Of these it reads the answers of IMAP4rev1 only.
QUERIES = {
    "search": ("clients=1 logout=0 search=100 expunge=10", set()),
    "search of several": ("clients=5 checkpoint=1 logout=1 search=50", set()),
    "sort and thread": ("clients=5 checkpoint=1 logout=1 sort=50 thread=50", {"SORT", "THREAD=REFERENCES"}),
}
_count = itertools.count()


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory):
    with started(request.param, tmp_path_factory.mktemp("imaptest")) as running:
        yield running


@pytest.fixture
def account(server: ImapServer) -> Account:
    """A new user."""
    return server.account(f"tester{next(_count)}")


def offered(account: Account) -> set[str]:
    """The capabilities, in capitals."""
    with session(account) as client:
        return set(client.capability()[1][0].decode().upper().split())


# It wants a keyword to exist once it was removed from messages that never had it.
REMOVED = "STORE didn't create keyword"


def lasts(account: Account, folder, words: str, required: set[str]) -> None:
    """A stress test ends without a complaint, and its clients were not idle."""
    if not required <= offered(account):
        pytest.skip(f"the server does not offer {required - offered(account)}")
    found = stressed(account, folder, words.split(), SECONDS)
    ignored = [REMOVED, "RECENT", "\\Recent"] if "imap4rev2" in words else [REMOVED]  # which IMAP4rev2 does not have
    assert [line for line in found.complaints if not any(word in line for word in ignored)] == [], found.output
    assert min(found.answered[name] for name in ("Logi", "Sele", "Fetc", "Stor", "Appe")) > 0, found.output
    if "checkpoint=1 logout=1" in words:
        assert found.answered["ChkP"] > 0, found.output


@pytest.mark.parametrize("security", ["clear", "implicit"])
def test_scripts(account, tmp_path, security):
    needed, capabilities = needs(), offered(account)
    found = scripted(account._replace(security=security), tmp_path)
    assert (found.failed, found.bad) == (0, (0, 0)), found.output
    assert (found.scripts, found.skipped) == (len(needed), sum(not words <= capabilities for words in needed.values()))
    assert min(found.commands) > 0


@pytest.mark.parametrize("enabled", ENABLED)
@pytest.mark.parametrize("what", STRESS)
def test_clients_see_the_same(account, tmp_path, what, enabled):
    word, required = ENABLED[enabled]
    with session(account) as client:
        client.create("copies")
    lasts(account, tmp_path, f"{STRESS[what]} {word}", required)


@pytest.mark.parametrize("what", QUERIES)
def test_queries(account, tmp_path, what):
    lasts(account, tmp_path, *QUERIES[what])


def test_flags_with_owners(account, tmp_path):
    """Each flag is changed by one client only; STORE tells the flags of each message, of those too that had them already."""
    lasts(account, tmp_path, "clients=10 logout=1 own_flags delete=0 expunge=0", set())
