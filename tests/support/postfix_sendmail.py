"""The installed Postfix's sendmail(1), without a running Postfix: what it would hand to postdrop(1), of messages that it
writes at once (4096 octets)."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.programs import need

__all__ = ["PostfixSendmail"]

POSTDROP = """\
#!/bin/sh
printf 'protocol\\0postdrop_protocol\\0queue_id\\0ABC\\0\\0'
dd bs=65536 count=1 of={folder}/records 2>/dev/null
printf 'status\\0000\\0reason\\0\\0\\0'
"""


class PostfixSendmail:
    """`folder`: where its configuration is, MAIL_CONFIG. It skips a test where sendmail is another program's."""

    def __init__(self, folder: Path) -> None:
        self.program, self.folder = need("sendmail"), folder
        script = folder / "postdrop"
        script.write_text(POSTDROP.format(folder=folder))
        script.chmod(0o755)
        main = folder / "main.cf"
        main.write_text(f"compatibility_level=3.6\ncommand_directory={folder}\nmyhostname=h.test\n")
        os.utime(main, (0, 0))  # Postfix waits two seconds for one that was just written
        if self.run("-f", "s@h.test", "ann@shop.test", given=b"\nx\n") or self.recipients != {b"ann@shop.test"}:
            pytest.skip("sendmail is not Postfix's")

    def run(self, *words: str, given: bytes) -> int:
        """Run it; its exit status."""
        (self.folder / "records").unlink(missing_ok=True)
        environment = os.environ | {"MAIL_CONFIG": str(self.folder)}
        return subprocess.run(
            [self.program, *words], input=given, env=environment, capture_output=True, timeout=30, check=False
        ).returncode

    def records(self, kinds: bytes) -> list[tuple[bytes, bytes]]:
        """(type, value) of the records of these types that the last run has handed over: S the sender, R a recipient, N a line of
        the message, L a part of one that goes on."""
        try:
            data = (self.folder / "records").read_bytes()
        except FileNotFoundError:
            return []
        found, at = [], 0
        while at < len(data):  # one octet of type, a length in seven bits an octet, the value (rec_get of its source)
            kind, size, shift = data[at : at + 1], 0, 0
            at += 1
            while True:
                octet = data[at] if at < len(data) else 0
                at, size, shift = at + 1, size | (octet & 127) << shift, shift + 7
                if not octet & 128:
                    break
            if kind in kinds:
                found.append((kind, data[at : at + size]))
            at += size
        return found

    @property
    def recipients(self) -> set[bytes]:
        return {value for _, value in self.records(b"R")}

    @property
    def sender(self) -> bytes:
        return self.records(b"S")[0][1]

    @property
    def message(self) -> bytes:
        return b"".join(value + (b"\n" if kind == b"N" else b"") for kind, value in self.records(b"NL"))
