"""STARTTLS and AUTH as dialogues, without sockets: the same for every split of the client's input."""

import base64
import hashlib
import hmac

import pytest
import scramp
from hypothesis import given
from hypothesis import strategies as st

from relaymta.auth.passwords import argon2id, matches, scram, scram_keys
from relaymta.proto import reply
from relaymta.proto.sasl import MECHANISMS, Password, Proof, Token
from relaymta.proto.session import TLS
from relaymta.proto.smtp_server import Host, Offers, ServerSession

EHLO = b"EHLO client.example\r\n"
KEPT = scram("pencil")


def keys(user: str):
    found = scram_keys(KEPT)
    assert found is not None
    return found


ALL = Offers(starttls=True, mechanisms=tuple(MECHANISMS), clear=True)


class Accounts(Host):
    """Where SCRAM keys are found by `find`."""

    def __init__(self, offers: Offers, find=keys) -> None:
        super().__init__(offers=offers)
        self.keys = find


def checked(made: ServerSession, user: str, answer: bytes) -> bytes:
    """The claim is verified: `user` is authenticated, or ("") not."""
    made.host.user = user
    out = made.checked(answer)
    while made.behind:
        out += made.receive(b"")
    return out


def session(offers: Offers = ALL) -> ServerSession:
    made = ServerSession("mx.example", Accounts(offers))
    made.greet()
    return made


def codes(out: bytes) -> list[int]:
    return [int(line[:3]) for line in out.split(b"\r\n") if line[3:4] == b" "]


def b64(text: str) -> bytes:
    return base64.b64encode(text.encode())


def talk(data: bytes, cuts: list[int], right: tuple = (Password("user", "pencil"), Token("user", "ticket"))):
    """(replies, claims, session): claims are answered, and nothing more is read once TLS begins."""
    made = session()
    out, claims, start = b"", [], 0
    for cut in [*sorted({c for c in cuts if 0 < c < len(data)}), len(data)]:
        piece, start = data[start:cut], cut
        if made.state == TLS or made.closing:
            break
        out += made.receive(piece)
        while made.claim is not None:
            claims.append(made.claim)
            good = made.claim in right or (isinstance(made.claim, Proof) and made.claim.good)
            out += checked(made, "user" if good else "", reply.LOGGED_IN if good else reply.WRONG_CREDENTIALS)
    return out, claims, made


def test_a_temporarily_rejected_login_is_not_tried_for_ever():
    made, line = session(), b"AUTH PLAIN " + b64("\0user\0pencil") + b"\r\n"
    out, tried = made.receive(EHLO + line * 100), 0
    while made.claim is not None and not made.closing:
        tried += 1
        out = checked(made, "", reply.TOO_MANY_LOGINS)
    assert tried == made.host.limits.errors == 20 and codes(out) == [454, 421] and made.claim is None


BEARER = "user=user\1auth=Bearer ticket\1\1"
DIALOGUES = [
    ("plain at once", b"AUTH PLAIN " + b64("\0user\0pencil") + b"\r\n", [235]),
    ("plain, asked for", b"auth plain\r\n" + b64("\0user\0pencil") + b"\r\n", [334, 235]),
    ("plain as oneself", b"AUTH PLAIN " + b64("user\0user\0pencil") + b"\r\n", [235]),
    ("plain for another", b"AUTH PLAIN " + b64("root\0user\0pencil") + b"\r\n", [501]),
    ("plain, wrong", b"AUTH PLAIN " + b64("\0user\0pen") + b"\r\n", [535]),
    ("plain, two parts", b"AUTH PLAIN " + b64("\0user") + b"\r\n", [501]),
    ("login", b"AUTH LOGIN\r\n" + b64("user") + b"\r\n" + b64("pencil") + b"\r\n", [334, 334, 235]),
    ("login with a name", b"AUTH LOGIN " + b64("user") + b"\r\n" + b64("pencil") + b"\r\n", [334, 235]),
    ("cancelled", b"AUTH LOGIN\r\n*\r\nNOOP\r\n", [334, 501, 250]),
    ("no base64", b"AUTH LOGIN\r\nRSET!\r\nNOOP\r\n", [334, 501, 250]),
    ("verbs are no verbs there", b"AUTH LOGIN\r\nRSET\r\nQUIT\r\nNOOP\r\n", [334, 334, 535, 250]),
    ("no such mechanism", b"AUTH CRAM-MD5\r\nNOOP\r\n", [504, 250]),
    ("no mechanism", b"AUTH\r\nNOOP\r\n", [501, 250]),
    ("bearer", b"AUTH XOAUTH2 " + b64(BEARER) + b"\r\n", [235]),
    ("oauthbearer", b"AUTH OAUTHBEARER " + b64("n,a=user,\1host=x\1auth=Bearer ticket\1\1") + b"\r\n", [235]),
    ("oauthbearer, no header", b"AUTH OAUTHBEARER " + b64("auth=Bearer ticket\1\1") + b"\r\n", [501]),
    ("refused bearer", b"AUTH XOAUTH2 " + b64(BEARER.replace("ticket", "x")) + b"\r\nAQ==\r\nNOOP\r\n", [334, 535, 250]),
    ("twice", b"AUTH PLAIN " + b64("\0user\0pencil") + b"\r\nAUTH LOGIN\r\nNOOP\r\n", [235, 503, 250]),
    ("in a transaction", b"MAIL FROM:<a@b>\r\nAUTH LOGIN\r\nNOOP\r\n", [250, 503, 250]),
    ("pipelined behind", b"AUTH PLAIN " + b64("\0user\0pencil") + b"\r\nMAIL FROM:<a@b> AUTH=<>\r\nNOOP\r\n", [235, 250, 250]),
    ("three times wrong", 4 * (b"AUTH PLAIN " + b64("\0user\0x") + b"\r\n"), [535, 535, 535, 421]),
    ("too long", b"AUTH PLAIN " + b"A" * 12300 + b"\r\nNOOP\r\n", [500, 250]),
    ("starttls twice", b"STARTTLS now\r\nNOOP\r\n", [501, 250]),
]


@pytest.mark.parametrize(("said", "expected"), [case[1:] for case in DIALOGUES], ids=[case[0] for case in DIALOGUES])
def test_a_dialogue_is_the_same_in_any_split(said, expected):
    whole = talk(EHLO + said, [])
    assert codes(whole[0]) == [250, *expected]
    one_by_one = talk(EHLO + said, list(range(1, len(EHLO + said)))) if len(said) < 1000 else whole
    assert one_by_one[:2] == whole[:2]
    assert whole[2].host.user == ("user" if 235 in expected else "")


@pytest.mark.parametrize("password", ["pencil", "pen"])
def test_scram_proves_that_both_have_the_password(password):
    made, client = session(), scramp.ScramClient(["SCRAM-SHA-256"], "user", password)
    made.receive(EHLO)
    out = made.receive(b"AUTH SCRAM-SHA-256 " + b64(client.get_client_first()) + b"\r\n")
    client.set_server_first(base64.b64decode(out[4:]).decode())
    assert made.receive(b64(client.get_client_final()) + b"\r\n") == b""  # nothing shows which it was until that is verified
    claim = made.claim
    assert isinstance(claim, Proof) and claim[:2] == ("user", password == "pencil")
    if password == "pencil":
        out = checked(made, "user", reply.LOGGED_IN)
        client.set_server_final(base64.b64decode(out[4:]).decode())  # raises where the server has not proved it
        assert made.receive(b"\r\nNOOP\r\n") == reply.LOGGED_IN + reply.NOOP and made.host.user == "user"
    else:
        assert codes(checked(made, "", reply.WRONG_CREDENTIALS)) == [535] and made.host.user == ""


@pytest.mark.parametrize(
    ("authzid", "password", "good"), [("a=user", "pencil", True), ("a=user", "pen", False), ("a=root", "pencil", None)]
)
def test_scram_of_a_client_that_names_whom_it_acts_for(authzid, password, good):
    """RFC 5802 7: the gs2-header may have an authorization identity (mutt sends one); it must be the user."""
    made = session()
    made.receive(EHLO)
    bare = "n=user,r=abcdefgh"
    out = made.receive(b"AUTH SCRAM-SHA-256 " + b64(f"n,{authzid},{bare}") + b"\r\n")
    if good is None:
        assert codes(out) == [501]
        return
    server_first = base64.b64decode(out[4:]).decode()
    fields = dict(part.split("=", 1) for part in server_first.split(","))
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(fields["s"]), int(fields["i"]))
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    final = f"c={b64(f'n,{authzid},').decode()},r={fields['r']}"
    proof = hmac.digest(hashlib.sha256(client_key).digest(), f"{bare},{server_first},{final}".encode(), "sha256")
    joined = bytes(a ^ b for a, b in zip(client_key, proof, strict=True))
    whole = f"{final},p={base64.b64encode(joined).decode()}"
    made.receive(b64(whole) + b"\r\n")
    assert isinstance(made.claim, Proof) and made.claim[:2] == ("user", good)


def test_no_claim_shows_its_secret():
    assert "pencil" not in repr(Password("user", "pencil")) and "ticket" not in repr(Token("user", "ticket"))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_scram_takes_each_key_of_those_that_share_a_salt(number):
    """And the server's proof is of the same one."""
    first = scram_keys(scram("old"))
    assert first is not None
    others = [scram_keys(scram(password, first.iterations, first.salt)) for password in ("new", "newest")]
    shared = first._replace(others=tuple((one.stored_key, one.server_key) for one in others if one is not None))
    made = session(Offers(mechanisms=("SCRAM-SHA-256",), clear=True))
    made.host.keys = lambda user: shared  # type: ignore[method-assign]
    client = scramp.ScramClient(["SCRAM-SHA-256"], "user", ("old", "new", "newest")[number])
    made.receive(EHLO)
    out = made.receive(b"AUTH SCRAM-SHA-256 " + b64(client.get_client_first()) + b"\r\n")
    client.set_server_first(base64.b64decode(out[4:]).decode())
    made.receive(b64(client.get_client_final()) + b"\r\n")
    assert isinstance(made.claim, Proof) and made.claim.good
    client.set_server_final(base64.b64decode(checked(made, "user", reply.LOGGED_IN)[4:]).decode())
    assert made.receive(b"\r\n") == reply.LOGGED_IN


@pytest.mark.parametrize(
    ("said", "code"), [(b"*\r\n", 501), (b"eA==\r\n", 501), (b"!\r\n", 501), (b"A" * 12300 + b"\r\n", 500)], ids=repr
)
def test_a_client_that_rejects_the_servers_proof_is_disconnected(said, code):
    made, client = session(), scramp.ScramClient(["SCRAM-SHA-256"], "user", "pencil")
    made.receive(EHLO)
    out = made.receive(b"AUTH SCRAM-SHA-256 " + b64(client.get_client_first()) + b"\r\n")
    client.set_server_first(base64.b64decode(out[4:]).decode())
    made.receive(b64(client.get_client_final()) + b"\r\n")
    checked(made, "user", reply.LOGGED_IN)
    assert codes(made.receive(said + b"MAIL FROM:<a@b>\r\n")) == [code] and made.closing


@given(
    behind=st.lists(
        st.sampled_from([b"MAIL FROM:<a@b>\r\n", b"EHLO evil\r\n", b"AUTH PLAIN eA==\r\n", b"QUIT\r\n", b"\r\n", b"x"])
    ),
    cuts=st.lists(st.integers(0, 200)),
)
def test_nothing_in_the_clear_is_executed_after_starttls(behind, cuts):
    data = EHLO + b"STARTTLS\r\n" + b"".join(behind)
    out, claims, made = talk(data, cuts)
    assert codes(out) in ([250, 220], [250, 554]) and claims == [] and made.transaction is None
    assert made.helo == "client.example"
    if made.state == TLS:
        made.tls_started()
        assert made.helo == "" and not made.parser.waiting()
        assert codes(made.receive(b"MAIL FROM:<a@b>\r\n")) == [503]
        assert b"STARTTLS" not in made.receive(EHLO) and made.secure


def test_what_is_offered_depends_on_tls_and_login():
    made = session(Offers(starttls=True, mechanisms=("PLAIN",), tls_needed=True, login_needed=True))
    assert b"STARTTLS" in (out := made.receive(EHLO)) and b"AUTH" not in out
    assert codes(made.receive(b"AUTH PLAIN AA==\r\nMAIL FROM:<a@b>\r\n")) == [538, 530]
    made.receive(b"STARTTLS\r\n")
    made.tls_started()
    assert b"250-AUTH PLAIN\r\n" in made.receive(EHLO)
    assert made.receive(b"MAIL FROM:<a@b>\r\n") == reply.NEED_LOGIN
    made.receive(b"AUTH PLAIN " + b64("\0user\0pencil") + b"\r\n")
    checked(made, "user", reply.LOGGED_IN)
    assert b"AUTH" not in made.receive(EHLO)
    assert codes(made.receive(b"MAIL FROM:<a@b>\r\n")) == [250]


def test_without_a_certificate_tls_is_temporarily_not_available():
    made = session(Offers(starttls=False, tls_needed=True))
    made.receive(EHLO)
    assert made.receive(b"MAIL FROM:<a@b>\r\n") == reply.TLS_UNAVAILABLE


@pytest.mark.parametrize("make", [argon2id, scram])
def test_a_password_matches_its_stored_keys_and_no_other_does(make):
    kept = make("päss")
    assert matches(kept, "päss")
    assert not matches(kept, "pass") and not matches(kept, "") and not matches("nonsense", "päss")
    assert kept != make("päss")  # salted
