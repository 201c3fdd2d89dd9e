"""What has come of TLS, by a route's `tls`: counted once for each connection (relaymta_tls_sessions_total)."""

import asyncio
import contextlib
import ssl
from typing import Any

import pytest
import trustme

from relaymta.config import Config, Route
from relaymta.metrics import Counters, families
from relaymta.route.sites import Site
from relaymta.send import trust
from relaymta.send.connect import ConnectFailed, Peer
from relaymta.send.opener import Opener
from relaymta.send.trust import Files
from relaymta.shm import Shared
from tests.send.test_trust import CA, Implicit, make, served
from tests.support.fake_mx import CLOSE, SILENT, FakeMx

OFFERS = {"EHLO": b"250-fake\r\n250 STARTTLS\r\n"}
STRANGER = trustme.CA()
# By their names: what the host does (rules, its context, whether TLS begins at once), and what is counted with each `tls`.
HOSTS: dict[str, tuple[dict[str, Any], ssl.SSLContext | None, bool, dict[str, list[str]]]] = {
    "clear": ({}, None, False, {"off": ["clear"], "may": ["clear"], "encrypt": ["failed"], "verify": ["failed"]}),
    "good": ({}, served(), False, {"off": ["clear"], "may": ["encrypted"], "encrypt": ["encrypted"], "verify": ["verified"]}),
    "stranger": ({}, served(authority=STRANGER), False, {"may": ["encrypted"], "encrypt": ["encrypted"], "verify": ["failed"]}),
    "wants ours": ({}, served(wants=True), False, {"may": ["failed", "clear"], "encrypt": ["failed"], "verify": ["failed"]}),
    "not now": (
        OFFERS | {"STAR": b"454 4.7.0 not now\r\n"}, None, False,
        {"off": ["clear"], "may": ["failed", "clear"], "encrypt": ["failed"], "verify": ["failed"]},
    ),
    "hangs up": (OFFERS | {"STAR": CLOSE}, None, False, {"may": ["failed", "clear"], "encrypt": ["failed"]}),
    "no EHLO": ({"EHLO": b"451 4.3.0 later\r\n"}, None, False, {"off": [], "may": [], "encrypt": [], "verify": []}),
    "at once": ({}, served(), True, {"may": ["encrypted"], "encrypt": ["encrypted"], "verify": ["verified"]}),
    "at once, stranger": ({}, served(authority=STRANGER), True, {"encrypt": ["encrypted"], "verify": ["failed"]}),
    "at once, wants ours": ({}, served(wants=True), True, {"may": ["failed"], "verify": ["failed"]}),
    "at once, no EHLO": ({"EHLO": b"451 4.3.0 later\r\n"}, served(), True, {"may": [], "verify": []}),
}  # fmt: skip


class Counted:
    """An opener of connections to the port of one peer, and what it has counted."""

    def __init__(self, tls: str, files: Files = trust.NO_FILES, **route: Any) -> None:
        self.cells = Shared.create().counters(0)
        config = Config.model_validate({"listener": [{"address": "127.0.0.1:1"}]})
        counts = trust.counts(Counters(self.cells))
        self.opener = Opener(config, Any, Any, Any, make, secured=counts)  # type: ignore[arg-type]
        self.site = Site("s", Route(name="out", hosts=["h"], tls=tls, **route), None)
        self.files = files

    async def open(self, port: int, path: str = "", timeout: float = 0.0) -> bool:
        """Whether a connection is there. `timeout`: seconds for each step (0: many)."""
        peer = Peer("localhost", "127.0.0.1", port, path, files=self.files)
        try:
            session = await self.opener.to(self.site, peer, None, timeout)
        except ConnectFailed:
            return False
        session.fail("done")
        return True

    def results(self) -> dict[tuple[str, str], int]:
        (family,) = (one for one in families([self.cells]) if one.name == "relaymta_tls_sessions")  # type: ignore[attr-defined]
        found = {(one.labels["policy"], one.labels["result"]): int(one.value) for one in family.samples}
        return {what: count for what, count in found.items() if count}


CASES = [(host, tls) for host, (_, _, _, counted) in HOSTS.items() for tls in counted]


@pytest.mark.parametrize(("host", "tls"), CASES)
async def test_each_connection_counts_once_as_what_it_was(tmp_path, monkeypatch, host, tls):
    """A connection in the clear behind one that failed in TLS counts by the policy, too: the mail was not encrypted."""
    CA.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    rules, context, implicit, counted = HOSTS[host]
    made = Counted(tls, Files(str(tmp_path / "ca.pem")) if tls == "verify" else trust.NO_FILES)
    with (Implicit if implicit else FakeMx)(dict(rules), tls=context) as peer:
        if implicit:
            monkeypatch.setattr("relaymta.send.connect.IMPLICIT_TLS_PORT", peer.port)
        opened = await made.open(peer.port)
    results = counted[tls]
    assert made.results() == {(tls, result): results.count(result) for result in results}
    assert opened == any(result != "failed" for result in results)


@pytest.mark.parametrize("banner", [b"421 in the clear\r\n", CLOSE])
async def test_implicit_tls_that_does_not_begin_has_failed(monkeypatch, banner):
    made = Counted("may")
    with FakeMx({}, banner=banner) as peer:  # type: ignore[arg-type]
        monkeypatch.setattr("relaymta.send.connect.IMPLICIT_TLS_PORT", peer.port)
        assert not await made.open(peer.port)
    assert made.results() == {("may", "failed"): 1}


@pytest.mark.parametrize("implicit", [False, True])
async def test_a_handshake_that_times_out_has_failed(monkeypatch, implicit):
    made = Counted("encrypt")
    with FakeMx(OFFERS | {"STAR": SILENT}, banner=SILENT if implicit else b"220 fake\r\n") as peer:  # type: ignore[arg-type]
        if implicit:
            monkeypatch.setattr("relaymta.send.connect.IMPLICIT_TLS_PORT", peer.port)
        assert not await made.open(peer.port, timeout=2.0)
    assert made.results() == {("encrypt", "failed"): 1}


@pytest.mark.parametrize("implicit", [False, True])
async def test_one_that_is_given_up_in_the_handshake_is_not_counted(monkeypatch, implicit):
    made = Counted("encrypt")
    with FakeMx(OFFERS | {"STAR": SILENT}, banner=SILENT if implicit else b"220 fake\r\n") as peer:  # type: ignore[arg-type]
        if implicit:
            monkeypatch.setattr("relaymta.send.connect.IMPLICIT_TLS_PORT", peer.port)
        opening = asyncio.ensure_future(made.open(peer.port))
        async with asyncio.timeout(60):
            while not (peer.connections if implicit else "STAR" in peer.commands):
                await asyncio.sleep(0.01)
        opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await opening
    assert made.results() == {}


async def test_what_is_refused_before_tls_or_stays_on_this_machine_is_not_counted(tmp_path):
    made = Counted("encrypt")
    with FakeMx({}) as peer:
        port = peer.port
    assert not await made.open(port)
    assert made.results() == {}
    made = Counted("may", protocol="lmtp")
    with FakeMx({}, path=str(tmp_path / "socket"), lmtp=True):
        assert await made.open(0, str(tmp_path / "socket"))
    assert made.results() == {}


async def test_files_that_cannot_be_used_are_a_failure_of_tls(tmp_path):
    made = Counted("verify", Files(str(tmp_path / "none.pem")))
    with FakeMx({}, tls=served()) as peer:
        assert not await made.open(peer.port)
    assert made.results() == {("verify", "failed"): 1}
