"""No open relay: every known way to relay from outside the trusted networks is rejected."""

import smtplib
import subprocess
import sys

import pytest

from relaymta.config import Config, everywhere, load, notes
from relaymta.errors import ConfigError
from tests.support.daemon import Relay, free_port

SETTINGS = (
    'relay.networks=["192.0.2.0/24"]', 'relay.domains=["ours.example","bücher.example","xn--dmain-jua.example"]',
    "relay.postmaster=ops@far.example", "intake.tarpit=0",
)  # fmt: skip
IDN = [  # RFC 5890 2.3.2.4: U-labels and A-labels of a domain are equivalent, whichever the configuration has
    "x@bücher.example", "x@BÜCHER.Example", "x@xn--bcher-kva.example", "x@XN--BCHER-KVA.example", "x@dömain.example",
    "x@xn--dmain-jua.example",
]  # fmt: skip
OURS = ["x@ours.example", "x@OURS.EXAMPLE", '"x y"@ours.example', "postmaster"]
ELSEWHERE = [
    "x@far.example", "x@FAR.example", "x@far.example.", "x@sub.ours.example", "x@ours.example.far.example", "x@notours.example",
    "x%far.example@ours.example", "x%far.example%ours.example@ours.example", "far.example!x@ours.example",
    "ours.example!far.example!x@ours.example", '"x@far.example"@ours.example', '"x%far.example"@ours.example',
    '"far.example!x"@ours.example', "@ours.example:x@far.example", "@ours.example,@far.example:x@far.example",
    "x@[198.51.100.1]", "x@[127.0.0.1]", "x@[IPv6:::1]", "x@127.0.0.1", "x@localhost", "x", "x@", "x@far.example@ours.example",
    "x@ours.example@far.example", "<x@far.example>", '""@far.example', "x@ours.example>@far.example", "postmaster@far.example",
    "x@xn--urs-tbd.example", "x@оurs.example", "x@ours。example", "x@ｏurs.example", "x@ours.example\0.far.example",
    "x@far.example (x@ours.example)", "x@far.example,x@ours.example", "x@ours.example;x@far.example",
    "ops@far.example", "@ours.example:postmaster@far.example", "<<x@far.example>>", "x @ far.example",
    '"x@ours.example"', '"x@far.example"', "x@far.example(x@ours.example)", "x(@ours.example)@far.example",
    "x@ｂücher.example", "x@bücher。example", "x\\@ours.example@far.example", "x\\@far.example@ours.example",
    '"x"@"ours.example"', "x@ours.example,", "@ours.example:x",
]  # fmt: skip


@pytest.fixture(scope="module")
def relay(tmp_path_factory):
    with Relay(tmp_path_factory.mktemp("relay"), "127.0.0.1:1", *SETTINGS) as made:
        yield made


def refused(client: smtplib.SMTP, to: str) -> bool:
    client.putcmd("RCPT", f"TO:<{to}>")
    code, _ = client.getreply()
    return code >= 500


@pytest.mark.parametrize("sender", ["<>", "<a@ours.example>", "<a@far.example>", "<root@localhost>", "<a@ours.example> SMTPUTF8"])
@pytest.mark.parametrize("helo", ["EHLO ours.example", "HELO localhost", "EHLO [127.0.0.1]", "EHLO 192.0.2.1"])
def test_nothing_is_relayed_for_unauthenticated_clients(relay, sender, helo):
    taken = []
    for start in range(0, len(ELSEWHERE), 12):  # a session is closed after 20 errors
        with smtplib.SMTP("127.0.0.1", relay.port) as client:
            client.command_encoding = "utf-8"
            assert client.docmd(*helo.split(" ", 1))[0] == 250
            assert client.docmd("MAIL", f"FROM:{sender}")[0] == 250 or "SMTPUTF8" in sender
            taken += [to for to in ELSEWHERE[start : start + 12] if not refused(client, to)]
    assert taken == []
    with smtplib.SMTP("127.0.0.1", relay.port) as client:  # while mail for relay domains is accepted
        client.docmd(*helo.split(" ", 1))
        client.docmd("MAIL", "FROM:<a@far.example>")
        assert [client.rcpt(to)[0] for to in OURS] == [250] * len(OURS)


def test_a_relay_domain_is_ours_in_u_labels_and_a_labels(relay):
    with smtplib.SMTP("127.0.0.1", relay.port) as client:
        client.command_encoding = "utf-8"
        client.ehlo("x.example")
        client.docmd("MAIL", "FROM:<a@far.example> SMTPUTF8")
        assert [to for to in IDN if refused(client, to)] == []


def test_no_claim_of_a_client_gives_it_relay_rights(relay):
    for claim in (
        "XCLIENT ADDR=192.0.2.1 LOGIN=root", "XFORWARD ADDR=192.0.2.1", "PROXY TCP4 192.0.2.1 192.0.2.1 1 25",
        "AUTH PLAIN AGEAYg==", "AUTH EXTERNAL =", "MAIL FROM:<a@b.example> AUTH=root@ours.example", "STARTTLS", "VRFY root",
        "EXPN root", "TURN", "ETRN far.example", "SEND FROM:<a@b.example>",
    ):  # fmt: skip
        with smtplib.SMTP("127.0.0.1", relay.port) as client:
            client.ehlo("192.0.2.1")
            client.putcmd(claim)
            if client.getreply()[0] == 421:  # the session was closed
                continue
            client.docmd("MAIL", "FROM:<a@ours.example>")
            assert refused(client, "x@far.example"), claim


@pytest.mark.parametrize(
    ("networks", "open_to_all"),
    [
        (["0.0.0.0/0"], True), (["::/0"], True), (["0.0.0.0/1", "128.0.0.0/1"], True), (["::/1", "8000::/1"], True),
        ([f"{n}.0.0.0/8" for n in range(1, 224) if n != 127], True),  # all addresses in use
        (["0.0.0.0/1"], True), (["2000::/3"], True), (["2000::/4"], True),  # all global IPv6 addresses; and half of them
        ([f"{n:x}::/11" for n in range(0x2400, 0x2800, 0x20)], True),
        (["64:ff9b::/96"], True), (["2002::/16"], True), (["64:ff9b::/97", "64:ff9b::8000:0/97"], True),  # IPv4 by NAT64
        (["::/8"], True), ([], False), (["127.0.0.0/8", "::1/128"], False),
        (["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7", "fe80::/10"], False),
        (["17.0.0.0/8", "2001:db8::/32", "2a00::/16", "64:ff9b::a00:0/104"], False), (["224.0.0.0/3"], False),
    ],
)  # fmt: skip
def test_networks_that_add_up_to_everywhere_are_detected(networks, open_to_all):
    assert everywhere(networks) is open_to_all


HALVES = '["0.0.0.0/1", "128.0.0.0/1"]'
MAPPED = '["::ffff:0.0.0.0/97", "::ffff:128.0.0.0/97"]'
START = '[[listener]]\naddress = "127.0.0.1:25"\n'
TOKENS = "[accounts.tokens]\nissuer = 'https://a.example'\n"
OPEN = [
    (f"{START}[relay]\nnetworks = {HALVES}\n", "4: relay.networks: 0.0.0.0/1, 128.0.0.0/1 may relay: that is an open relay"),
    (f"{START}[relay]\nnetworks = {MAPPED}\n", "4: relay.networks: 0.0.0.0/1, 128.0.0.0/1 may relay"),
    (f'{START}[relay]\nnetworks = ["::/0"]\n', "4: relay.networks: ::/0 may relay"),
    (f"{START}[[network]]\nnetworks = {HALVES}\nrelay = true\n", "4: network.0.networks: "),
    (
        f'{START}[relay]\nnetworks = ["16.0.0.0/5"]\n[[network]]\nnetworks = ["24.0.0.0/6", "28.0.0.0/6"]\nrelay = true\n',
        "6: network.0.networks: ",
    ),
    (f"{START}proxy = {HALVES}\n", "3: listener.0.proxy: 0.0.0.0/1, 128.0.0.0/1 may set their address by PROXY"),
    (f'{START}proxy = ["::/0"]\n', "3: listener.0.proxy: "),
    (f"{START}[[network]]\nnetworks = {HALVES}\nxclient = true\n", "4: network.0.networks: 0.0.0.0/1, 128.0.0.0/1 may set"),
    (
        f'{START}[[network]]\nnetworks = ["0.0.0.0/1"]\nxclient = true\n[[network]]\nnetworks = ["::/0"]\nxclient = true\n',
        "4: network.0.networks: ",
    ),
]
CLEAR = [
    (f'{START}[accounts]\nurl = "http://auth.example/login"\n', "4: accounts.url: passwords would go over plain http"),
    (f'{START}[accounts]\nurl = "http://127.0.0.1@auth.example/"\n', "4: accounts.url: "),
    (f'{START}[accounts]\nurl = "http://10.0.0.1/"\n', "4: accounts.url: "),
    (f'{START}[accounts]\nurl = "http://localhost.example/"\n', "4: accounts.url: "),
    (f'{START}[accounts]\nurl = "http://[2001:db8::1]/"\n', "4: accounts.url: "),
    (f'{START}{TOKENS}jwks = "http://a.example/keys"\n', "5: accounts.tokens.jwks: "),
    (f'{START}{TOKENS}introspection = "http://a.example/"\n', "5: accounts.tokens.introspection: "),
    (
        f'{START}[[route]]\nhosts = ["a.example"]\ntls = "verify"\nusername = "a"\n[route.oauth]\nclient_id = "x"\n'
        'token_url = "http://b.example/"\n',
        "9: route.0.oauth.token_url: ",
    ),
]


@pytest.mark.parametrize(("text", "expected"), [*OPEN, *CLEAR])
def test_an_open_relay_is_rejected_with_its_line_and_key(tmp_path, text, expected):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(path, {})
    assert str(refused.value).startswith(f"{path}:{expected}")


@pytest.mark.parametrize("text", [text for text, _ in OPEN])
def test_an_open_relay_has_its_flag_and_is_reported_all_the_same(tmp_path, text):
    path = tmp_path / "r.toml"
    path.write_text(text)
    config = load(path, {"relay.open_relay": True})
    assert any("open relay" in sentence for sentence in notes(config))
    assert Config.model_validate_json(config.to_json()).model_dump() == config.model_dump()  # as it is passed to workers


def test_all_that_is_open_is_reported_at_once(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(f'{START}proxy = {HALVES}\n[relay]\nnetworks = ["::/0"]\n[accounts]\nurl = "http://a.example/"\n')
    with pytest.raises(ConfigError) as refused:
        load(path, {})
    assert [line.split(": ")[1] for line in str(refused.value).splitlines()] == [
        "relay.networks",
        "listener.0.proxy",
        "accounts.url",
    ]


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080/", "http://localhost/", "http://[::1]:80/", "https://auth.example/"])
def test_back_ends_are_reached_over_tls_or_on_loopback(tmp_path, url):
    path = tmp_path / "r.toml"
    path.write_text(f'{START}[accounts]\nurl = "{url}"\n')
    assert load(path, {}).accounts.url == url


def test_an_open_relay_is_rejected_by_check_serve_and_reload(tmp_path):
    """`config check`, `serve`, and a reload."""
    path, good = tmp_path / "r.toml", "[limits]\nmessage_size = 1000\n"
    path.write_text(good)
    relay = Relay(tmp_path, "127.0.0.1:1")
    plain = relay.command
    relay.command = lambda: [*plain(), "-c", str(path)]  # type: ignore[method-assign]
    with relay:
        for text, what in (
            (f"[relay]\nnetworks = {HALVES}\n", "2: relay.networks: "),
            (f"[[network]]\nnetworks = {HALVES}\nxclient = true\n", "2: network.0.networks: "),
            ('[accounts]\nurl = "http://auth.example/"\n', "2: accounts.url: "),
        ):
            path.write_text(text)
            done = relay.cli("reload", check=False)
            assert done.returncode == 78 and f"{path}:{what}" in done.stdout
            other = ["--set", f"spool={tmp_path}/other", "--listen", f"127.0.0.1:{free_port()}"]
            for words in (["config", "check", *other[:2], "--set", 'listener=[{address="127.0.0.1:1"}]'], ["serve", *other]):
                command = [sys.executable, "-m", "relaymta", *words, "-c", str(path)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=30)
                assert done.returncode == 78 and f"{path}:{what}" in done.stderr
        path.write_text(good)
        assert relay.cli("reload").stdout.startswith("reloaded")


@pytest.mark.parametrize(
    ("url", "named"), [("http://routes.example/", True), ("http://127.0.0.1/", False), ("https://a.example/", False)]
)
def test_a_route_lookup_over_plain_http_is_reported(tmp_path, url, named):
    path = tmp_path / "r.toml"
    path.write_text(f'{START}[[route]]\nlookup = "{url}"\n')
    assert any(": route.0.lookup: " in sentence for sentence in notes(load(path, {}))) is named
