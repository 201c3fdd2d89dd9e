"""Files that a configuration of ours names: passwords, each in one of its own, and maps."""

import re

__all__ = ["Beside"]


class Beside:
    """What is to be written beside the configuration: path -> content. `secrets`, `folder`: absolute paths of folders, "" where
    none is given; then nothing is written, and the paths are those that an operator would choose."""

    def __init__(self, secrets: str, folder: str) -> None:
        self.has_secrets, self.has_folder = bool(secrets), bool(folder)
        self._secrets = secrets or "/etc/relaymta/secrets"
        self._folder = folder or "/etc/relaymta"
        self.passwords: dict[str, str] = {}
        self.files: dict[str, str] = {}

    def password(self, name: str, password: str) -> str:
        """The path of the file with a password; `name`: of what it is for."""
        base = re.sub(r"[^A-Za-z0-9.@_-]+", "-", name).strip("-.") or "password"
        path, number = f"{self._secrets}/{base}", 1
        while self.passwords.get(path, password) != password:
            number += 1
            path = f"{self._secrets}/{base}-{number}"
        self.passwords[path] = password
        return path

    def file(self, name: str, text: str) -> str:
        """The path of a file of this name."""
        path = f"{self._folder}/{name}"
        self.files[path] = text
        return path
