"""`relaymta filter test`: what it says about a message is what the relay would do with it."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from relaymta.cli import main
from relaymta.proto.clamd import END

LISTENER = '[[listener]]\naddress = "127.0.0.1:2525"\n'


class Finder:
    """A clamd that finds "Found" in each text, at `address`."""

    def __init__(self, folder: Path) -> None:
        self.address = f"unix:{folder}/c"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(f"{folder}/c")
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            with peer:
                seen = b""
                while not seen.endswith(END) and (data := peer.recv(65536)):
                    seen = seen[-8:] + data
                peer.sendall(b"1: stream: Found FOUND\0")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def finder(tmp_path) -> Iterator[Finder]:
    made = Finder(tmp_path)
    yield made
    made.close()


def tried(folder: Path, settings: str, data: bytes, *options: str) -> Result:
    config, file = folder / "relaymta.toml", folder / "x.eml"
    config.write_text(f'spool = "{folder}/spool"\nhostname = "mx.example"\n{LISTENER}{settings}')
    file.write_bytes(data)
    return CliRunner().invoke(main, ["-c", str(config), "filter", "test", str(file), *options])


def table(finder: Finder, *more: str, name: str = "virus") -> str:
    return "\n".join(["[[filter]]", f'name = "{name}"', 'type = "clamd"', f'address = ["{finder.address}"]', *more, ""])


@pytest.mark.parametrize(
    "key", ['recipient_domain = ["a.example"]', 'networks = ["198.51.100.0/24"]', 'clients = "trusted"'], ids=lambda key: key[:8]
)
def test_only_asks_a_filter_whatever_it_looks_at(tmp_path, finder, key):
    settings = table(finder, key) + table(finder, name="other")
    found = tried(tmp_path, settings, b"Subject: x\r\n\r\nx\r\n", "--only", "virus")
    assert found.exit_code == 2 and "refused: 554 5.7.1 Refused by virus: Found" in found.stdout
    assert "not asked" not in found.stdout  # the other one was not meant to be
    found = tried(tmp_path, settings, b"Subject: x\r\n\r\nx\r\n", "--only", "viru")
    assert found.exit_code == 64 and 'did you mean "virus"?' in found.stderr


def changes(folder: Path, settings: str, data: bytes, *options: str) -> list[str]:
    found = tried(folder, settings, data, "--json", *options)
    assert found.exit_code == 1, found.output
    return json.loads(found.stdout)["changes"]


def test_fields_that_pass_for_our_tags_are_shown_as_gone(tmp_path, finder):
    settings = table(finder, 'verdicts = { FOUND = "tag" }')
    data = b"X-Spam: No\nSubject: x\nx-spam: no\n folded\n\nx\n"
    assert changes(tmp_path, settings, data) == ["- X-Spam: No", "- x-spam: no", "-  folded", "+ X-Spam: Yes"]
    trusted = '[relay]\nnetworks = ["192.0.2.0/24"]\n' + settings
    assert changes(tmp_path, trusted, data) == ["+ X-Spam: Yes"]
    assert changes(tmp_path, settings, b"X-Spam: Yes\n\nx\n") == []  # another one, which is the same


def test_lines_of_a_diff_are_lines_of_the_message(tmp_path, finder):
    settings = table(finder, 'verdicts = { FOUND = "tag" }') + '[filters]\nsubject = "[SPAM] {subject}"\n'
    found = changes(tmp_path, settings, b"Subject: a\x0b\x85\xe2\x80\xa8b\n\nx\n")
    assert found == ["- Subject: a\x0b\ufffd\u2028b", "+ X-Spam: Yes", "+ Subject: [SPAM] a\x0b\ufffd\u2028b"]


def test_a_diff_of_many_lines_that_are_much_alike(tmp_path, finder):
    header = b"".join(b"X-A: " + bytes([97 + n % 26]) * 90 + b"\n" for n in range(1200))
    settings = table(finder, 'verdicts = { FOUND = "tag" }') + '[filters]\nsubject = "[SPAM] {subject}"\n'
    found = changes(tmp_path, settings, b"Subject: x\n" + header + b"\nx\n")
    assert found == ["- Subject: x", "+ X-Spam: Yes", "+ Subject: [SPAM] x"]
