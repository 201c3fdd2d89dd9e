"""The HTTP API of a running relay: what the verbs do, the log of changes, the process behind it. One relay for all of it."""

import contextlib
import json
import os
import signal
import socket
import ssl
import time
from pathlib import Path

import msgspec
import pytest
import trustme

from relaymta import control
from relaymta.api.routes import ROUTES
from relaymta.control import Refused
from tests.support.api import Api
from tests.support.daemon import Relay, free_port, wait_for

COUNT = 12
UNKNOWN = "1ZZZZZZZZZZZZ"


class Setup:
    """The relay, whose smart host is down, with COUNT messages; the API by its unix socket, and its port."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost")
        self.chain = folder / "chain.pem"
        certificate.private_key_and_cert_chain_pem.write_to_path(str(self.chain))
        self.context = ssl.create_default_context()
        authority.configure_trust(self.context)
        self.port = free_port()
        self.relay = Relay(
            folder, f"127.0.0.1:{free_port()}", f'certificate=[{{chain="{self.chain}"}}]', "admin.tls=true",
            f"admin.listen=0.0.0.0:{self.port}", workers=2,
        )  # fmt: skip
        self.local = Api(self.relay.spool / "admin.sock")

    def over_tls(self, token: str) -> Api:
        return Api(self.port, token, self.context)

    def audits(self) -> list[dict]:
        return self.relay.events("audit")

    def process(self) -> int:
        """The process of the API; 0: none."""
        assert self.relay.process is not None
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if (
                    b"relaymta.api" in path.read_bytes()
                    and f"\nPPid:\t{self.relay.process.pid}\n" in (path.parent / "status").read_text()
                ):
                    return int(path.parent.name)
        return 0


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    found = Setup(tmp_path_factory.mktemp("api"))
    with found.relay as relay:
        for number in range(COUNT):
            relay.send(
                "Subject: =?utf-8?q?h=C3=A9llo?=\r\n\r\nhello\r\n", f"s{number % 3}@b.example", f"r{number}@d{number % 2}.example"
            )
        wait_for(lambda: sum(row["deferred"] for row in relay.summary()), what="the first attempt")
        yield found


def test_the_process_is_started_by_the_first_connection_and_again_after_its_death(setup):
    assert setup.process() == 0, "nobody has needed it"
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", setup.port)) != 0, "the port is open to others only when there is a token"
    assert setup.local.get("/status")[1]["version"]
    first = wait_for(setup.process)
    os.kill(first, signal.SIGKILL)
    assert wait_for(lambda: setup.local.get("/readiness"))[1] == {"ready": True, "reasons": [], "missing": []}
    assert setup.process() not in (0, first)
    mode = (setup.relay.spool / "admin.sock").stat().st_mode & 0o777
    assert mode == 0o660


def test_answers_are_as_their_models_say(setup):
    ident = setup.local.get("/messages")[1]["messages"][0]["id"]
    for route in ROUTES.values():
        if route.changes or route.octets or route.name in ("abuse_why", "suppressions_of"):
            continue
        status, found = setup.local.get(route.path.replace("{id}", ident).replace("{name}", "smarthost"))
        if route.name == "site":
            continue
        assert status == 200, (route.name, found)
        made = msgspec.convert(found, route.answer)
        if route.name not in ("message", "explain", "status"):  # of these the models name what is most important
            assert found.keys() <= msgspec.to_builtins(made).keys(), route.name
            for rows in (found.get("messages"), found.get("queues")):
                assert (
                    not rows
                    or set(rows[0]) <= msgspec.to_builtins(made)["messages" if "messages" in found else "queues"][0].keys()
                )
    status, _, text = setup.local.ask("GET", f"/api/v1/messages/{ident}/raw")
    assert status == 200 and text.endswith(b"\r\nhello\r\n") and b"Received:" in text
    fields = {one["name"]: one["value"] for one in setup.local.get(f"/messages/{ident}/header")[1]["header"]}
    assert fields["Subject"] == "héllo"
    pool = setup.local.get("/sites")[1]["sites"][0]["pool"]
    assert setup.local.get(f"/sites/{pool.replace('/', '%2F')}")[1]["sites"][0]["pool"] == pool


def test_pages_follow_each_other_and_lines_are_all_of_them(setup):
    ids, cursor = [], ""
    while True:
        status, found = setup.local.get(f"/messages?limit=5&cursor={cursor}")
        assert status == 200 and 0 < len(found["messages"]) <= 5
        ids += [row["id"] for row in found["messages"]]
        cursor = found["next"]
        if not cursor:
            break
    _, headers, text = setup.local.ask("GET", "/api/v1/messages", headers={"Accept": "application/x-ndjson"})
    assert headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line)["id"] for line in text.splitlines()] == ids and len(set(ids)) == COUNT
    chosen = setup.local.get("/messages?from=s1@b.example&domain=d1.example")[1]["messages"]
    assert chosen and all(row["sender"] == "s1@b.example" for row in chosen)
    found = setup.local.get("/messages/find?to=r3@d1.example&since=1d")[1]["messages"]
    assert [row["recipients"][0]["address"] for row in found] == ["r3@d1.example"]
    for path, argument in (("?cursor=1.2", "cursor"), ("?from=a b", "from"), ("?domain=a@b", "domain")):
        status, said = setup.local.get("/messages" + path.replace(" ", "%20"))
        assert (status, said["argument"]) == (400, argument)
    assert setup.local.get("/messages/find?since=soon")[0] == 400
    assert [setup.local.get(f"/messages/{one}")[0] for one in (UNKNOWN, "zz")] == [404, 400]
    assert [setup.local.get(f"/messages/{UNKNOWN}/{what}")[0] for what in ("explain", "history", "header", "raw")] == [404] * 4


def test_a_change_is_counted_before_it_is_made_and_told_in_the_log_with_who_has_made_it(setup):
    token = setup.relay.cli(
        "token", "create", "--name", "night shift", "--scope", "queue:read", "--scope", "queue:write"
    ).stdout.strip()
    wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", setup.port)) == 0, what="the port to be opened")
    remote, before = setup.over_tls(token), len(setup.audits())
    status, found = remote.post("/queue/hold", from_="s2@b.example", dry_run=True)
    assert status == 200 and found["matched"] == COUNT // 3 and found["changed"] == 0 and found["dry_run"]
    status, found = remote.post("/queue/hold", from_="s2@b.example", expect=1)
    assert (status, found["matched"], found["argument"]) == (409, COUNT // 3, "expect")
    assert len(setup.audits()) == before and not setup.local.get("/messages?held=true")[1]["messages"]
    status, found = remote.post("/queue/hold", from_="s2@b.example", expect=COUNT // 3)
    assert (status, found["changed"]) == (200, COUNT // 3)
    held = sorted(row["id"] for row in setup.local.get("/messages?held=true")[1]["messages"])
    told = wait_for(lambda: (one := setup.audits()[before:]) and sum(len(row["ids"]) for row in one) == len(held) and one)
    assert sorted(ident for row in told for ident in row["ids"]) == held
    for row in told:
        assert (row["who"], row["where"], row["action"], row["result"]) == (
            "token night shift",
            "127.0.0.1",
            "queue hold",
            "done",
        )
        assert row["count"] == len(row["ids"]) and row["worker"] == -1
    assert setup.relay.cli("queue", "release", held[0]).returncode == 0
    (row,) = wait_for(lambda: [one for one in setup.audits() if one["action"] == "queue release"])
    assert row["who"].endswith("(uid 0)") and (row["where"], row["ids"], row["count"]) == ("control socket", [held[0]], 1)
    assert setup.local.post("/queue/release", ids=held, all=True)[1]["changed"] == len(held) - 1
    assert setup.local.post("/queue/delete", ids=[UNKNOWN])[1]["unknown"] == [UNKNOWN]
    status, said = remote.post("/sites/suspend", site="d0.example")
    assert status == 403 and "site:write" in said["detail"]
    wait_for(lambda: any(one["result"].startswith("denied: ") and one["who"] == "token night shift" for one in setup.audits()))
    setup.relay.cli("token", "revoke", "night shift")
    assert remote.get("/queues")[0] == 401, "at once"


def test_sites_policies_and_the_rest(setup):
    local = setup.local
    pool = local.get("/sites")[1]["sites"][0]["pool"]
    status, found = local.post("/sites/suspend", site=pool, seconds=60, reason="for a test")
    assert status == 200 and found["known"]
    assert [one["reason"] for one in local.get("/decisions")[1]["decisions"] if one["kind"] == "suspended"] == ["for a test"]
    assert local.post("/sites/resume", site=pool)[1]["changed"] >= 1
    assert local.post("/sites/resume", site="none.example")[0] == 404
    assert local.post("/sites/suspend", seconds=5)[1]["argument"] == "site"
    held = "/messages?held=true&domain=d1.example&limit=100"
    assert local.post("/policies", kind="hold", domain="d1.example")[1]["changed"] <= COUNT // 2  # some may be tried just now
    wait_for(lambda: len(local.get(held)[1]["messages"]) == COUNT // 2, what="all of them to be held")
    (policy,) = local.get("/policies")[1]["policies"]
    assert local.post("/policies", kind="hold", domain="a b")[0] == 400
    assert local.post("/policies/remove", kind="hold", about=policy["about"])[1]["changed"] == 1
    assert local.post("/queue/reroute", all=True, route_to="nowhere")[1]["argument"] == "route_to"
    assert local.get("/readings")[1]["totals"]["accepted"] == COUNT
    status, found = local.post("/reload")
    assert status == 200 and found["text"].startswith("reloaded")
    wait_for(lambda: {"site suspend", "site resume", "policy set", "reload"} <= {one["action"] for one in setup.audits()})
    about = next(one["about"] for one in setup.audits() if one["action"] == "site suspend")
    assert "reason=for a test" in about and "seconds=60" in about


def test_a_worker_that_does_not_answer_is_named_and_a_change_is_made_and_told_though_its_client_has_gone(setup):
    stopped = setup.relay.worker_pids()[1]
    os.kill(stopped, signal.SIGSTOP)
    try:
        began = time.monotonic()
        one = setup.local.connection()
        one.request("POST", "/api/v1/queue/hold", json.dumps({"all": True}), {"Content-Type": "application/json"})
        wait_for(lambda: time.monotonic() - began > 0.5)
        one.close()
        status, found = setup.local.get("/queues")
        assert status == 200 and found["missing"] == [1]
        status, found = setup.local.get(f"/messages/{UNKNOWN}")
        assert (status, found["workers"]) == (503, [1]) and "worker 1 does not answer" in found["detail"]
    finally:
        os.kill(stopped, signal.SIGCONT)
    wait_for(lambda: len(setup.local.get("/messages?held=true&limit=100")[1]["messages"]) > 0, what="the change to be made")
    wait_for(lambda: [row for row in setup.audits() if row["action"] == "queue hold" and row["where"] == "admin socket"])


def test_only_the_relay_itself_asks_on_behalf_of_others(setup):
    pid = os.fork()
    if not pid:  # another user, who may open the socket
        with contextlib.suppress(BaseException):
            os.chmod(setup.relay.spool, 0o755)
            os.chmod(setup.relay.spool / "control.sock", 0o666)
            os.chdir(setup.relay.spool)  # the folders above are closed to others
            os.setuid(65534)
            try:
                control.begin(Path("control.sock"), "reload", ("root", "here"))()
            except Refused as error:
                os._exit(0 if "only the relay itself" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    told = wait_for(lambda: [row for row in setup.audits() if "only the relay itself" in row["result"]])
    assert told[0]["who"] == "nobody (uid 65534)" and told[0]["where"] == "control socket"


def test_the_process_ends_with_the_supervisor(setup):
    assert setup.local.get("/status")[0] == 200
    pid = setup.process()
    assert setup.relay.process is not None
    os.kill(setup.relay.process.pid, signal.SIGKILL)
    setup.relay.process.wait()
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])
    setup.relay.kill()
