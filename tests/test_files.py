"""Files that operators write are read in one way: whatever an editor puts at the beginning of one, and whatever it is not."""

from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from relaymta.accept import tls
from relaymta.accept.endpoint import _recipients
from relaymta.auth import web
from relaymta.config import Config, Route, load, load_accounts
from relaymta.errors import ConfigError
from relaymta.files import Unreadable, read_octets, read_secret, read_text
from relaymta.filter.keys import load_key
from relaymta.route.table import RouteTable
from relaymta.send import login, oauth
from relaymta.watch import Watched

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"a\n", "a\n"), (BOM + b"a\n", "a\n"), (BOM, ""), (b"", ""), (b"a\r\nb\rc", "a\nb\nc"), (BOM + BOM + b"a", "\ufeffa"),
     ("\u00e4\u2028\n".encode(), "\u00e4\u2028\n")],
)  # fmt: skip
def test_text(tmp_path, data, text):
    (tmp_path / "f").write_bytes(data)
    assert read_text(tmp_path / "f") == text


@pytest.mark.parametrize(
    ("data", "why", "line"),
    [
        ("word\n".encode("utf-16"), "this is UTF-16: save it as UTF-8", 0),
        (b"\xfe\xff\0w", "this is UTF-16: save it as UTF-8", 0),
        ("w".encode("utf-32"), "this is UTF-32: save it as UTF-8", 0),
        ("word\n".encode("utf-16-le"), "this looks like UTF-16: save it as UTF-8", 0),
        ("word\n".encode("utf-16-be"), "this looks like UTF-16: save it as UTF-8", 0),
        (b"a\nb\0c\n", "a NUL octet", 2),
        (b"a\n\nsch\xf6n\n", "not UTF-8: save it as UTF-8", 3),
    ],
)
def test_what_is_no_text(tmp_path, data, why, line):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(Unreadable) as refused:
        read_text(tmp_path / "f")
    assert (refused.value.why, refused.value.line) == (why, line)
    assert str(refused.value.strerror) == (f"line {line}: {why}" if line else why)


@pytest.mark.parametrize(
    ("data", "secret", "why"),
    [(b"word\n", "word", ""), (BOM + b" word \r\n", "word", ""), (BOM + b"\n", "", "is empty"), (b"", "", "is empty"),
     (b"old\r\nnew\n", "", "more than one line"), (b"\n\nword\n\n", "word", "")],
)  # fmt: skip
def test_secrets(tmp_path, data, secret, why):
    (tmp_path / "f").write_bytes(data)
    if why:
        with pytest.raises(Unreadable, match=why):
            read_secret(tmp_path / "f")
    else:
        assert read_secret(tmp_path / "f") == secret


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_octets(tmp_path / "none")


def config(**keys: Any) -> Config:
    return load(None, {"listener": [{"address": "127.0.0.1:1"}], "hostname": "a.example", **keys})


def signing_key() -> bytes:
    form = serialization.PrivateFormat.PKCS8
    key = ed25519.Ed25519PrivateKey.generate()
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def certificate() -> bytes:
    return trustme.CA().issue_cert("relay.example").private_key_and_cert_chain_pem.bytes()


def of_map(path: Path) -> Any:
    routes = RouteTable(config(route_map=str(path), route=[{"name": "main", "sender": ["x@y.example"], "hosts": ["h"]}]))
    return routes._map is not None and routes._map.find("a@one.example").label  # type: ignore[union-attr]


def of_key(path: Path) -> Any:
    made = config(dkim=[{"domain": "a.example", "selector": "s", "key": str(path)}])
    return load_key(made.dkim[0]).settings.domain


READERS = [  # (what it is, its content, what is made of it, the result)
    ("configuration", b'spool = "/one"\n[[listener]]\naddress = "127.0.0.1:25"\n', lambda path: load(path, {}).spool, "/one"),
    ("route map", b"one.example main\n", of_map, "main"),
    ("recipients", b"a@one.example\n", lambda path: _recipients(str(path)), {"a@one.example"}),
    ("accounts", b'[[account]]\nname = "ann"\n', lambda path: load_accounts(path)[0].name, "ann"),
    (
        "password",
        b"word\n",
        lambda path: login._password(Route(hosts=["h"], username="u", tls="verify", password_file=str(path))),
        "word",
    ),
    ("token", b"word\n", lambda path: oauth._secret(str(path)), "word"),
    ("client secret", b"word\n", lambda path: web._secret(str(path)), "word"),
    ("DKIM key", signing_key(), of_key, "a.example"),
    ("certificate", certificate(), lambda path: tls.check(config(certificate=[{"chain": str(path)}])), None),
]


@pytest.mark.parametrize(("name", "content", "read", "result"), READERS, ids=[row[0] for row in READERS])
def test_a_byte_order_mark_is_taken_off(tmp_path, name, content, read, result):
    for data in (content, BOM + content):
        (tmp_path / "f").write_bytes(data)
        assert read(tmp_path / "f") == result


@pytest.mark.parametrize(("name", "content", "read", "result"), READERS, ids=[row[0] for row in READERS])
def test_utf_16_is_named(tmp_path, name, content, read, result):
    (tmp_path / "f").write_bytes(content.decode().encode("utf-16"))
    with pytest.raises(
        (ConfigError, login.LoginFailed, oauth.TokenError, web.Unavailable), match="this is UTF-16: save it as UTF-8"
    ):
        read(tmp_path / "f")


def test_a_certificate_and_a_key_in_two_files_that_begin_with_a_mark(tmp_path):
    made = trustme.CA().issue_cert("relay.example")
    (tmp_path / "chain").write_bytes(BOM + b"".join(one.bytes() for one in made.cert_chain_pems))
    (tmp_path / "key").write_bytes(BOM + made.private_key_pem.bytes())
    tls.check(config(certificate=[{"chain": str(tmp_path / "chain"), "key": str(tmp_path / "key")}]))


def test_what_is_in_doubt_is_loaded_at_each_look(tmp_path):
    """Whether a file may be read now is not seen by its time."""
    path, found = tmp_path / "file", iter([1, 1, 2, 3])
    watched = Watched([str(path)], lambda: next(found), lambda value: value == 1)
    for expected in (1, 1, 2, 2):
        watched.refresh()
        assert watched.value == expected
    path.touch()
    watched.refresh()
    assert watched.value == 3
