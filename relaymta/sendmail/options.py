"""The options of sendmail(1): those of Sendmail and Postfix, read as getopt(3) of POSIX does: the first word that is none, and
all behind it, are recipients. So no recipient in a list that a program passes on is taken for an option."""

from relaymta.sendmail.status import USAGE, Stop

__all__ = ["Options", "parsed"]

# Each letter: whether it takes a value, in the same word or the next one; OWN: in the same word only.
_NONE, _VALUE, _OWN = range(3)
_LETTERS = {
    **dict.fromkeys("GIUcimntvx", _NONE), **dict.fromkeys("ABCFLNORVXbefhopr", _VALUE), "q": _OWN,
}  # fmt: skip
_MODES = ("m", "s", "p", "i", "v")
_NAMES = {"mailq": "p", "newaliases": "i"}
_CONDITIONS = ("success", "failure", "delay")


class Options:
    """What the command line says. `mode`: that of -b; `sender`: the envelope's, None: the user; `dot`: a line of a single dot is
    message data, too; `flush`: None: not, else what is flushed (kind, what); `remarks`: sentences about values
    that are passed over."""

    def __init__(self) -> None:
        self.mode = "m"
        self.sender: str | None = None
        self.full_name = ""
        self.from_header = False
        self.dot = False
        self.eight_bit: bool | None = None
        self.notify = ""
        self.ret = ""
        self.envid = ""
        self.verbose = False
        self.config = ""
        self.flush: tuple[str, str] | None = None
        self.recipients: list[str] = []
        self.remarks: list[str] = []


def parsed(argv: list[str]) -> Options:
    """The options of a command line, of which the first word is the program's name. Stop: they are wrong."""
    options = Options()
    options.mode = _NAMES.get(argv[0].rpartition("/")[2], "m") if argv else "m"
    words = list(argv[1:])
    while words:
        if not words[0].startswith("-") or words[0] == "-":
            break
        word = words.pop(0)
        if word == "--":
            break
        rest = word[1:]
        while rest:
            letter, rest = rest[0], rest[1:]
            kind = _LETTERS.get(letter)
            if kind is None:
                raise Stop(USAGE, f"there is no option -{letter}")
            value = ""
            if kind == _OWN:
                value, rest = rest, ""
            elif kind == _VALUE:
                if not rest and not words:
                    raise Stop(USAGE, f"-{letter} needs a value")
                value, rest = rest or words.pop(0), ""
            _SET.get(letter, _ignored)(options, value)
    options.recipients = words
    return options


def _ignored(options: Options, value: str) -> None:
    """An option that other programs have, and that changes nothing here."""


def _mode(options: Options, value: str) -> None:
    if value not in _MODES:
        raise Stop(USAGE, f"-b{value}: this mode is not supported (there are {', '.join('-b' + one for one in _MODES)})")
    options.mode = value


def _sender(options: Options, value: str) -> None:
    options.sender = "" if value == "<>" else value


def _set_o(options: Options, value: str) -> None:
    """-oVALUE, the options of Sendmail's configuration: only -oi says anything."""
    if value == "i":
        options.dot = True


def _long_o(options: Options, value: str) -> None:
    """-O NAME=VALUE."""
    name, _, what = value.partition("=")
    if name.lower() == "ignoredots" and what[:1].lower() in ("t", "y", "1", ""):
        options.dot = True


def _body(options: Options, value: str) -> None:
    if value.upper() not in ("7BIT", "8BITMIME"):
        raise Stop(USAGE, f"-B {value}: expected 7BIT or 8BITMIME")
    options.eight_bit = value.upper() == "8BITMIME"


# The message is worth more than what is to be reported of it: as by Postfix, what is wrong of these keeps nobody from it.
def _notify(options: Options, value: str) -> None:
    words = [one.strip().lower() for one in value.split(",")]
    if words != ["never"] and any(one not in _CONDITIONS for one in words):
        options.remarks.append(f"-N {value} is passed over: expected never, or a list of {', '.join(_CONDITIONS)}")
    else:
        options.notify = ",".join(words).upper()


def _ret(options: Options, value: str) -> None:
    if value.lower() not in ("full", "hdrs"):
        options.remarks.append(f"-R {value} is passed over: expected full or hdrs")
    else:
        options.ret = value.upper()


def _envid(options: Options, value: str) -> None:
    if not value or any(not 32 <= ord(one) < 127 for one in value) or len(value) > 100:
        options.remarks.append("-V is passed over: expected printable ASCII characters, 100 at most")
    else:
        options.envid = value


def _flush(options: Options, value: str) -> None:
    kinds = {"I": "id", "R": "site"}
    if value and value[0] in kinds:
        if not value[1:]:
            raise Stop(USAGE, f"-q{value}: what is to be flushed is missing")
        options.flush = kinds[value[0]], value[1:]
    elif not value or value[0].isdigit():  # -q15m would be a daemon that looks each 15 minutes: the relay always does
        options.flush = "all", ""
    else:
        raise Stop(USAGE, f"-q{value}: expected -q, -qI with an id or -qR with a domain")
    options.mode = "q"


def _refused(options: Options, value: str) -> None:
    raise Stop(USAGE, "-n (no aliases) is not supported")


def _aliases(options: Options, value: str) -> None:
    options.mode = "i"


def _full_name(options: Options, value: str) -> None:
    options.full_name = value


def _config(options: Options, value: str) -> None:
    options.config = value


def _header(options: Options, value: str) -> None:
    options.from_header = True


def _dot(options: Options, value: str) -> None:
    options.dot = True


def _verbose(options: Options, value: str) -> None:
    options.verbose = True


_SET = {
    "B": _body,
    "C": _config,
    "F": _full_name,
    "I": _aliases,
    "N": _notify,
    "O": _long_o,
    "R": _ret,
    "V": _envid,
    "b": _mode,
    "f": _sender,
    "i": _dot,
    "n": _refused,
    "o": _set_o,
    "q": _flush,
    "r": _sender,
    "t": _header,
    "v": _verbose,
}
