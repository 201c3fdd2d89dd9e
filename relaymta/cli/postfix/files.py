"""The files of a Postfix configuration, wherever its folder has been copied to."""

import errno
from pathlib import Path

from relaymta.cli.postfix.lines import Line, Place, logical_lines
from relaymta.files import read_octets

__all__ = ["CONFIG_DIRECTORY", "Files"]

CONFIG_DIRECTORY = "/etc/postfix"


class Files:
    """`folder`: where main.cf and master.cf are; what they name below /etc/postfix is looked for there. `root`: where the other
    files of their machine are ("/", or a copy of it); None: "/" where the folder is /etc/postfix, else they are nowhere."""

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        self.folder = folder.absolute()
        self.root = Path("/") if root is None and folder.resolve() == Path(CONFIG_DIRECTORY) else root and root.absolute()
        self.home = CONFIG_DIRECTORY  # the folder, as the files themselves name it
        self._known: dict[str, str] = {}
        self.escaped: list[str] = []

    def locate(self, path: str) -> Path:
        """Where a file is that the configuration calls so. FileNotFoundError: it is not in the folder, and there is no root."""
        inside = path.removeprefix(self.home.rstrip("/") + "/")
        if inside != path or not path.startswith("/"):
            return self.folder / inside
        if self.root is None:
            raise FileNotFoundError(errno.ENOENT, "it is not in this folder: import with --root DIR", path)
        return self.root / path.lstrip("/")

    def shown(self, path: str) -> str:
        """A file as it is named in comments and findings: those of the folder by their name there."""
        return path.removeprefix(self.home.rstrip("/") + "/")

    def text(self, path: str) -> str:
        """The text of a file, read once; what is not UTF-8 is escaped, and the file is one of `escaped`. OSError."""
        if path not in self._known:
            found = self.locate(path)
            if found.exists() and not found.is_file():
                raise OSError(errno.EINVAL, "it is no file", path)
            octets = read_octets(found)
            try:
                self._known[path] = octets.decode()
            except UnicodeDecodeError:
                self._known[path] = octets.decode("utf-8", "backslashreplace")
                self.escaped.append(self.shown(path))
        return self._known[path]

    def lines(self, path: str) -> list[tuple[Place, Line]]:
        """The logical lines of a file, each with its place. OSError."""
        shown = self.shown(path)
        return [(Place(shown, line.number), line) for line in logical_lines(self.text(path))]
