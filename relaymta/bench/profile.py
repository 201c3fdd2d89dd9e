"""What a sink does wrong: a profile, from a file in TOML. A mistake in it reads `file:line: key: what (did you mean ...)`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from relaymta.config.merging import merge_files
from relaymta.config.origin import Origin
from relaymta.config.sentences import problems_of
from relaymta.config.values import Duration, Rate, Table
from relaymta.errors import ConfigError, NoSuch
from relaymta.toml import Source, read_toml

__all__ = ["SHIPPED", "Profile", "load_profile", "profile_named"]

SHIPPED = Path(__file__).parent / "profiles"


def _reply(text: str) -> str:
    if not (
        len(text) > 4 and text[:3].isdigit() and text[0] in "45" and text[3] == " " and text.isascii() and text.isprintable()
    ):
        raise ValueError(f'{text!r}: a reply such as "421 4.7.0 Try again later"')
    return text


Chance = Annotated[float, Field(ge=0, le=1)]
Reply = Annotated[str, AfterValidator(_reply)]


class Connections(Table):
    """[connections]"""

    per_address: Annotated[int, Field(ge=0)] = 0  # at once from one client address; 0: any number
    rate: Rate = 0.0  # new ones from one address; 0: any
    refused: Chance = 0.0  # chance that one gets `reply`
    dropped: Chance = 0.0  # chance that one is closed without a greeting
    messages: Annotated[int, Field(ge=0)] = 0  # on one connection; more get `reply`
    reply: Reply = "421 4.7.0 Too many connections"


class Messages(Table):
    """[messages]"""

    rate: Rate = 0.0  # from one address; more get `reply`, and the connection is closed
    reply: Reply = "421 4.7.28 Too many messages"


class Storm(Table):
    """[storm]"""

    every: Duration = 0.0  # from the beginning of one storm to the next; 0: no storms
    lasts: Duration = 0.0
    at: Literal["banner", "mail", "dot"] = "mail"  # what is answered by `reply`
    reply: Reply = "421 4.3.2 Service not available"

    def problems(self) -> list[tuple[str, str]]:
        if self.every and not 0 < self.lasts < self.every:
            return [("lasts", "longer than 0, and shorter than every")]
        return [("every", "is missing: how often is there a storm?")] if self.lasts and not self.every else []


class Greylisting(Table):
    """[greylisting]"""

    delay: Duration = 0.0  # for which a new pair of sender and recipient is refused; 0: no greylisting
    reply: Reply = "450 4.7.1 Greylisted, try again later"


class Refuse(Table):
    """[refuse]"""

    recipient: Chance = 0.0
    recipient_reply: Reply = "450 4.2.1 Mailbox busy"
    dot: Chance = 0.0
    dot_reply: Reply = "451 4.3.0 Try again later"


class Slow(Table):
    """[slow]"""

    banner: Duration = 0.0
    reply: Duration = 0.0  # before each reply
    dot: Duration = 0.0  # before the reply to the final dot
    chance: Chance = 1.0  # of a connection that is slow


class Cut(Table):
    """[cut]"""

    in_data: Chance = 0.0  # the connection is closed within the message data
    at_dot: Chance = 0.0  # it is closed after the final dot; the message is thrown away
    after_dot: Chance = 0.0  # likewise; the message is kept: it is in doubt, and comes again
    in_reply: Chance = 0.0  # it is closed within the reply to the final dot; the message is kept
    reset: bool = False  # by RST


class Tls(Table):
    """[tls]"""

    offer: bool = False  # STARTTLS, with a certificate that nobody has signed
    broken: Literal["", "refused", "handshake", "closed"] = ""  # 454; nonsense in the handshake; closed in it
    chance: Chance = 1.0  # of a handshake that is broken

    def problems(self) -> list[tuple[str, str]]:
        return [("broken", "needs offer = true")] if self.broken and not self.offer else []


class Profile(Table):
    """A profile. The default: a sink that accepts everything at once."""

    description: str = ""
    chunking: bool = False  # BDAT is offered
    connections: Connections = Connections()
    messages: Messages = Messages()
    storm: Storm = Storm()
    greylisting: Greylisting = Greylisting()
    refuse: Refuse = Refuse()
    slow: Slow = Slow()
    cut: Cut = Cut()
    tls: Tls = Tls()


def load_profile(path: Path) -> Profile:
    """The profile in a file. ConfigError with every problem."""
    text, data = read_toml(path)
    sources = [Source(path, text, data)]
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise ConfigError(problems_of(Profile, Origin(path, sources, merge_files(Profile, sources)), error)) from None


def profile_named(name: str) -> Path:
    """The file of a profile: one of ours by its name, or a path. NoSuch."""
    ours = {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}
    if name in ours:
        return ours[name]
    if "/" in name or name.endswith(".toml") or Path(name).exists():
        return Path(name).absolute()
    raise NoSuch("profile", name, ours)
