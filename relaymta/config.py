"""The configuration: one typed schema; one TOML file, flags that win over it, and every mistake named at once.

Each option has its type, bounds, default and sentence here, and nowhere else: `config describe`, the reference file and
the error messages come from it. A problem reads `file:line: key: what (did you mean ...)`.
"""

import difflib
import ipaddress
import re
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from relaymta.errors import ConfigError

__all__ = ["Config", "Listener", "Route", "load", "parse_hostport"]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\Z")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMG]?)i?[bB]?\Z")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, None: 1}
_OCTETS = {"": 1, "k": 1 << 10, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _duration(value: object) -> object:
    if isinstance(value, str):
        match = _DURATION.match(value.strip())
        if match is None:
            raise ValueError('a duration such as "90s", "10m", "5d"')
        return float(match[1]) * _SECONDS[match[2]]
    return value


def _size(value: object) -> object:
    if isinstance(value, str):
        match = _SIZE.match(value.strip())
        if match is None:
            raise ValueError('a size such as "50MB"')
        return int(float(match[1]) * _OCTETS[match[2]])
    return value


def parse_hostport(text: str, default_port: int | None = None) -> tuple[str, int]:
    """`host:port`, `[v6]:port`, or `host` with a default port. ValueError when it is neither."""
    host, colon, port = text.rpartition(":")
    if text.endswith("]") or not colon:
        host, port = text, ""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: write an IPv6 address in brackets")
    if not port and default_port is not None and host:
        return host, default_port
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r}: expected host:port")
    return host, int(port)


def _address(value: object) -> object:
    if isinstance(value, str):
        parse_hostport(value)
    return value


def _host(value: object) -> object:
    if isinstance(value, str):
        parse_hostport(value, 25)
    return value


def _network(value: object) -> object:
    if isinstance(value, str):
        return str(ipaddress.ip_network(value))
    return value


Duration = Annotated[float, BeforeValidator(_duration), Field(ge=0)]
Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]
Address = Annotated[str, BeforeValidator(_address)]
Host = Annotated[str, BeforeValidator(_host)]
Network = Annotated[str, BeforeValidator(_network)]
LOOPBACK = ["127.0.0.0/8", "::1/128"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Listener(_Table):
    """A socket on which mail comes in. `[[listener]]`, repeatable."""

    address: Address = Field(description="host:port to listen on")
    application: str = Field("", description="name that routes, limits and log records use for mail taken here")
    submission: bool = Field(False, description="add Date and Message-ID where they are missing (RFC 6409 8)")


class Route(_Table):
    """Where mail goes. `[[route]]`, repeatable; the first that matches is taken."""

    name: str = Field("", description="shown in logs, metrics and `queue summary`; default: the first host")
    application: list[str] = Field([], description="matches mail of these applications; empty: any")
    sender_domain: list[str] = Field([], description="matches these sender domains; empty: any")
    recipient_domain: list[str] = Field([], description='matches these recipient domains, ".example" and below; empty: any')
    hosts: list[Host] = Field([], description="smart hosts as host[:port], the next is tried when one cannot be reached; "
                              "empty: the recipient domain's MX")  # fmt: skip
    tls: Literal["may", "encrypt", "verify"] = Field("may", description="TLS to these hosts; verify: with a valid certificate")
    username: str = Field("", description="AUTH user name; needs tls = verify")
    password_file: str = Field("", description="file that holds the password")
    password_env: str = Field("", description="environment variable that holds the password")
    connections: int = Field(20, ge=1, le=1000, description="connections to this site at the same time, of the whole machine")
    messages_per_connection: int = Field(1000, ge=1, description="messages after which a connection is closed")

    @model_validator(mode="after")
    def _check(self) -> "Route":
        if self.username and self.tls != "verify":
            raise ValueError('username needs tls = "verify": credentials go over verified TLS only')
        if self.username and not (self.password_file or self.password_env):
            raise ValueError("username needs password_file or password_env")
        return self

    @property
    def label(self) -> str:
        """The route's name, or what stands for it."""
        return self.name or (self.hosts[0] if self.hosts else "mx")


class PeerNetwork(_Table):
    """What holds for clients of some networks, over the tables below. `[[network]]`, repeatable; the first match holds."""

    networks: list[Network] = Field(description="the clients' networks")
    application: str = Field(
        "", description="name that routes, limits and log records use for their mail; wins over the listener's"
    )
    relay: bool | None = Field(None, description="whether they may send to anywhere")
    normalize: bool | None = Field(None, description="whether their bare CR and LF become CRLF, and NUL a space")
    long_lines: bool | None = Field(None, description="whether their lines may be longer than 998 octets")
    message_size: Size | None = Field(None, description="octets of a message of theirs")
    recipients: int | None = Field(None, ge=1, le=65535, description="recipients of one message of theirs")
    connections: int | None = Field(None, ge=1, description="connections from one address of theirs")


class Relay(_Table):
    """Who may relay, and where to. `[relay]`"""

    networks: list[Network] = Field(LOOPBACK, description="clients that may send to anywhere")
    domains: list[str] = Field([], description="recipient domains that anybody may send to")
    open_relay: bool = Field(False, description="start even though the networks above are the whole Internet")


class Intake(_Table):
    """How mail is taken. `[intake]`"""

    normalize_networks: list[Network] = Field(
        [], description="clients whose bare CR and LF become CRLF, and NUL a space; refused from others"
    )
    long_line_networks: list[Network] = Field(LOOPBACK, description="clients whose lines may be longer than 998 octets")
    hops: int = Field(50, ge=1, description="Received: fields at which a message is a loop")
    errors: int = Field(20, ge=1, description="wrong commands until a connection is closed")
    recipients: int = Field(1000, ge=100, le=65535, description="recipients of one message (RFC 5321 4.5.3.1.8)")
    command_timeout: Duration = Field(300, description="wait for a command")
    data_timeout: Duration = Field(180, description="wait for the next block of a message")
    flow_delay: Duration = Field(
        0.02, description="hold each 250 back for so long while texts come in faster than they leave; 0: never"
    )
    data_rate: int = Field(500, ge=0, description="octets a second that a message must come in with at least")


class QueueTable(_Table):
    """The queue. `[queue]`"""

    max_age: Duration = Field(5 * 86400, description="age at which a message is given up")
    window: int = Field(10_000, ge=100, description="messages held in memory for delivery, per worker")
    window_bytes: Size = Field(32 << 20, description="text held in memory for delivery, per worker")


class Delivery(_Table):
    """How mail leaves. `[delivery]`"""

    first_retry: Duration = Field(
        60, description="wait after the first failure; then 2, 5, 10, 20, 40, 60 times as long, 15 % jitter"
    )
    connections: int = Field(500, ge=1, description="outgoing connections of the whole machine")
    connect_timeout: Duration = Field(30, description="wait for a connection")
    patience: float = Field(
        1,
        ge=0.01,
        le=10,
        description="times RFC 5321's timeouts to wait for a peer (MAIL, RCPT 300 s, DATA 120, text 180, final dot 600)",
    )
    idle: Duration = Field(5, description="close a connection that has nothing to send for so long")
    port: int = Field(25, ge=1, le=65535, description="port of MX hosts")
    nameservers: list[str] = Field([], description="DNS servers as host[:port]; empty: the system's")


class LimitsTable(_Table):
    """Limits. `[limits]`"""

    message_size: Size = Field(50 << 20, description="octets of a message")
    connections: int = Field(20_000, ge=1, description="incoming connections of the whole machine")
    connections_per_client: int = Field(50, ge=1, description="from one address; relay networks: at least 200")


class Metrics(_Table):
    """Prometheus metrics. `[metrics]`"""

    listen: Address | Literal["off"] = Field("127.0.0.1:9125", description='host:port of /metrics, or "off"')


class Control(_Table):
    """The socket the CLI speaks to. `[control]`"""

    socket: str = Field("", description="path; default: control.sock in the spool")


class Log(_Table):
    """The log: one JSON object a line. `[log]`"""

    file: str = Field("-", description='path, "-" for standard error')


class Config(_Table):
    """The whole configuration."""

    hostname: str = Field(
        default_factory=socket.getfqdn, description="our name in the banner, EHLO and Received (default: this host's)"
    )
    user: str = Field("", description="user to run as when started as root; empty: stay root, with a warning")
    workers: int = Field(0, ge=0, le=255, description="worker processes; 0: one for each core")
    spool: str = Field("/var/lib/relaymta", description="directory of the queue")
    listener: list[Listener] = Field([], description="sockets on which mail comes in")
    route: list[Route] = Field([], description="where mail goes; none: to the MX of each recipient's domain")
    network: list[PeerNetwork] = Field([], description="what holds for clients of some networks")
    relay: Relay = Relay()
    intake: Intake = Intake()
    queue: QueueTable = QueueTable()
    delivery: Delivery = Delivery()
    limits: LimitsTable = LimitsTable()
    metrics: Metrics = Metrics()
    control: Control = Control()
    log: Log = Log()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if not self.listener:
            raise ValueError("no [[listener]]: give one, or --listen HOST:PORT")
        trusted = [*self.relay.networks, *(n for peer in self.network if peer.relay for n in peer.networks)]
        wide = [n for n in trusted if ipaddress.ip_network(n).prefixlen == 0]
        if wide and not self.relay.open_relay:
            raise ValueError(
                f"{wide[0]} may relay: that is an open relay, which spammers find within hours. "
                "Name your networks, or set relay.open_relay = true if you mean it"
            )
        return self

    @property
    def control_path(self) -> Path:
        """Where the control socket is."""
        return Path(self.control.socket) if self.control.socket else Path(self.spool) / "control.sock"


# Reading the file

_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"))*)\s*=""")
_HEAD = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]")


def _positions(text: str) -> dict[tuple[str | int, ...], int]:
    """The line of every key and table of a TOML file, by path. Multi-line values may add harmless extras."""
    found: dict[tuple[str | int, ...], int] = {}
    counts: dict[str, int] = {}
    table: tuple[str | int, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        head = _HEAD.match(line)
        if head is not None:
            name = head[2].strip()
            parts: tuple[str | int, ...] = tuple(part.strip().strip("\"'") for part in name.split("."))
            if head[1] == "[[":
                parts = (*parts, counts.get(name, 0))
                counts[name] = counts.get(name, 0) + 1
            table = parts
            found.setdefault(table, number)
            continue
        key = _KEY.match(line)
        if key is not None:
            path = (*table, *(part.strip().strip("\"'") for part in key[1].split(".")))
            found.setdefault(path, number)
    return found


def load(path: Path | None, overrides: dict[str, Any]) -> Config:
    """The configuration of a file (None: none) with `overrides` (dotted key -> value, or "listener"/"route" -> tables)
    laid over it. ConfigError names every problem."""
    data: dict[str, Any] = {}
    text = ""
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
            data = tomllib.loads(text)
        except OSError as error:
            raise ConfigError([f"{path}: {error.strerror}"]) from None
        except UnicodeDecodeError:
            raise ConfigError([f"{path}: not UTF-8"]) from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError([_syntax_problem(path, str(error))]) from None
    for key, value in overrides.items():
        _lay_over(data, key, value)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        positions = _positions(text)
        raise ConfigError([_problem(path, positions, overrides, entry) for entry in error.errors()]) from None


def _syntax_problem(path: Path, text: str) -> str:
    match = re.search(r"\(at line (\d+), column \d+\)", text)
    what = re.sub(r"\s*\(at (?:line \d+, column \d+|end of document)\)", "", text)
    what = what.replace("Cannot overwrite a value", "this key was given before")
    return f"{path}:{match[1] if match else 'end'}: {what}"


def _lay_over(data: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for table in tables:
        inner = data.setdefault(table, {})
        if not isinstance(inner, dict):
            raise ConfigError([f"--set {key}: {table} is not a table"])
        data = inner
    data[last] = value


def _problem(path: Path | None, positions: dict[tuple[str | int, ...], int], overrides: dict[str, Any], entry: Any) -> str:
    location: tuple[str | int, ...] = tuple(part for part in entry["loc"] if part != "constrained-str")
    what = re.sub(r"^Value error, ", "", entry["msg"])
    if entry["type"] == "extra_forbidden":
        what = "no such key" + _did_you_mean(location)
    elif entry["type"] == "missing":
        what = "is missing"
    elif "input" in entry and isinstance(entry["input"], str | int | float | bool):
        what = f"{what} (it is {entry['input']!r})" if repr(entry["input"]) not in what else what
    dotted = ".".join(map(str, location))
    if any(dotted == key or dotted.startswith(key + ".") for key in overrides):
        return f"command line: {dotted}: {what}"
    line = 0
    while location and not line:
        line = positions.get(location, 0)
        location = location[:-1]
    where = f"{path}:{line}: " if line else f"{path}: " if path else ""
    return f"{where}{dotted}: {what}" if dotted else f"{where}{what}"


def _did_you_mean(location: tuple[str | int, ...]) -> str:
    model: Any = Config
    for part in location[:-1]:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = getattr(annotation, "__args__", (annotation,))[0]
    near = difflib.get_close_matches(str(location[-1]), list(model.model_fields), 1, 0.6)
    return f' (did you mean "{near[0]}"?)' if near else ""


def parse_value(text: str) -> Any:
    """A `--set key=value` value: TOML when it is, else the string itself."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def describe() -> str:
    """The reference configuration file: every key with its sentence and default, as comments."""
    lines = ["# relaymta: every key, with its default. Lines without a value show keys that have none.", ""]
    nested = [(name, field) for name, field in Config.model_fields.items() if _model_of(field.annotation) is not None]
    lines += _describe_fields(Config, skip={name for name, _ in nested})
    for name, field in nested:
        model = _model_of(field.annotation)
        assert model is not None
        repeated = name in ("listener", "route", "network")
        lines += ["", f"# {(model.__doc__ or '').strip()}", f"#[[{name}]]" if repeated else f"[{name}]"]
        lines += _describe_fields(model, commented=repeated)
    return "\n".join(lines) + "\n"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    inner = getattr(annotation, "__args__", (annotation,))[0]
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _describe_fields(model: type[BaseModel], skip: set[str] | None = None, commented: bool = True) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        if name in (skip or set()):
            continue
        default = None if field.is_required() or field.default_factory is not None else field.default
        lines += [f"# {field.description}", f"#{name} = {_toml(default)}"]
    return lines


def _toml(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(int(value)) if float(value).is_integer() else str(value)
