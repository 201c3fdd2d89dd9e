"""A compiled Sieve script, run over one message: what is to become of that (RFC 5228 2.10, 4, 5, and extensions).

No I/O. Bounds: as of sieve_match.Meter and sieve_strings; REDIRECTS_MOST addresses, FILINGS_MOST mailboxes. What exceeds them,
and what cannot be done, is a run-time error: the message is kept, and nothing else is done.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any as Anything
from typing import Final

from relaymta.proto import sieve_program as program
from relaymta.proto.address import comparable
from relaymta.proto.printable import printable
from relaymta.proto.sieve_address import Address, part_of, split, without_detail
from relaymta.proto.sieve_dates import date_in, date_part, now, shifted
from relaymta.proto.sieve_match import EACH, Meter, RunError, compare
from relaymta.proto.sieve_message import Message
from relaymta.proto.sieve_outcome import Action, Answered, Discarded, Filed, Kept, Outcome, Redirected, Rejected
from relaymta.proto.sieve_program import Block, Match, Script, Test, Texts
from relaymta.proto.sieve_strings import Text, clipped
from relaymta.proto.sieve_vacation import message_ids, own, sender_of, subject_of, why_not
from relaymta.proto.sieve_values import ADDRESS_FIELDS, flag_names, mailbox_named, outbound, zone_minutes

__all__ = ["FILINGS_MOST", "RECEIVED_MOST", "REDIRECTS_MOST", "run"]

REDIRECTS_MOST: Final = 4
FILINGS_MOST: Final = 10
RECEIVED_MOST: Final = 50  # fields of a message that is not on its way in a loop
INBOX = "INBOX"
FLAG_COST = 128  # octets that are compared in the time in which one octet of flags is read
PART_COST = 256  # ... in which the type of one MIME part is compared
DELIVERED_SEEN = 100  # fields


def run(
    script: Script,
    message: Message,
    *,
    sender: str,
    recipient: str,
    addresses: Iterable[str] = (),
    exists: Callable[[str], bool] = lambda mailbox: False,
    seconds: int = 0,
    separator: str = "+",
    shared: bool = False,
) -> Outcome:
    """What is to become of a message. `sender` ("": null), `recipient`: of the envelope, the recipient with its +detail;
    `addresses`: all of the user's, the first one being that of replies; `exists`: whether the user has a mailbox; `seconds`: now,
    wall clock, UTC; `separator`: of the detail in an address, "": there is none; `shared`: the recipient is an address of others,
    too: who writes to it has not written to the user (RFC 5230 4.5). No exception is raised but those of `exists`."""
    own_addresses = tuple(addresses)
    why = _loop(message, (recipient, *own_addresses), separator)
    if why:
        return Outcome((Kept(),), loop=why)
    one = _Run(script, message, sender, recipient, own_addresses, exists, seconds, separator, shared)
    try:
        one.block(script.block)
    except RunError as error:
        return Outcome((Kept(),), str(error), one.line)
    return Outcome(one.actions(), notes=tuple(one.notes))


def _loop(message: Message, addresses: Iterable[str], separator: str) -> str:
    """Why a message seems to be on its way in a loop; "": it does not. `addresses`: of the user, whatever the detail is: scripts
    may give each round another one."""
    mine = {without_detail(comparable(address), separator) for address in addresses}
    delivered = message.raw(b"delivered-to")
    for value in delivered[:DELIVERED_SEEN]:
        before = comparable(value[:1024].decode("utf-8", "replace").strip(" \t<>"))
        if without_detail(before, separator) in mine:
            return f"it was delivered to {printable(before)} before"
    for count, name in ((len(delivered), "Delivered-To"), (len(message.raw(b"received")), "Received")):
        if count > RECEIVED_MOST:
            return f"it has {count} {name} fields"
    return ""


class _Run:
    """The state of a run."""

    def __init__(
        self, script: Script, message: Message, sender: str, recipient: str, addresses: tuple[str, ...],
        exists: Callable[[str], bool], seconds: int, separator: str, shared: bool,
    ) -> None:  # fmt: skip
        self.script, self.message = script, message
        self.sender, self.recipient, self.addresses = sender, recipient, addresses
        self.exists, self.moment, self.separator, self.shared = exists, now(seconds), separator, shared
        self.meter = Meter()
        self.variables: dict[str, bytes] = {}  # "": the internal variable of flags
        self.groups: tuple[bytes, ...] = ()  # the match variables
        self.line = 0
        self.stopped = False
        self.cancelled = False  # the implicit keep
        self.places: dict[str, Kept | Filed] = {}
        self.redirects: dict[str, Redirected] = {}
        self.discarded: Discarded | None = None
        self.rejected: Rejected | None = None
        self.vacation: program.Vacation | None = None
        self.answered: list[Action] = []
        self.notes: list[tuple[int, str]] = []

    def actions(self) -> tuple[Action, ...]:
        """What is to be done, once the script has ended."""
        if not self.cancelled and INBOX not in self.places:
            self.places[INBOX] = Kept(self.flags(None))
        found: list[Action] = [*self.places.values(), *self.redirects.values(), *self.answered]
        if self.rejected is not None:
            found.append(self._rejection(self.rejected))
        elif self.discarded is not None and not self.places and not self.redirects:
            found.append(self.discarded)
        return tuple(found)

    def _rejection(self, rejected: Rejected) -> Action:
        """A message with a null sender cannot be refused so that somebody hears of it."""
        return rejected if self.sender else Discarded(rejected.line)

    def block(self, block: Block) -> None:
        """Run the commands of a block."""
        for statement in block:
            self.line = statement.line
            self.meter.step()
            _STATEMENTS[type(statement)](self, statement)
            if self.stopped:
                return

    def test(self, test: Test) -> bool:
        """Whether a test is true."""
        self.meter.step()
        return _TESTS[type(test)](self, test)

    # Strings

    def text(self, text: Text) -> bytes:
        """A string, with the variables as they are now."""
        if not text.pieces:
            return text.raw
        found = text.expanded(self._value)
        self.meter.spend(len(found) + 16 * len(text.pieces))
        return found

    def _value(self, which: str | int) -> bytes:
        if isinstance(which, str):
            return self.variables.get(which, b"")
        return self.groups[which] if which < len(self.groups) else b""

    def texts(self, texts: Texts) -> list[bytes]:
        """The same of several."""
        return [self.text(text) for text in texts]

    def checked(self, text: Text, check: Callable[[bytes], Anything]) -> Anything:
        """What a string names; a run-time error if that is nothing valid."""
        try:
            return check(self.text(text))
        except ValueError as error:
            raise RunError(str(error)) from None

    def flags(self, texts: Texts | None, variable: str = "") -> tuple[str, ...]:
        """The flags that are given, or (None) those of a variable of flags."""
        values = [self.variables.get(variable, b"")] if texts is None else self.texts(texts)
        self.meter.spend(EACH + FLAG_COST * sum(map(len, values)))
        return flag_names(values)

    # Matching

    def matches(self, match: Match, values: Iterable[bytes], count: int | None = None, keys: list[bytes] | None = None) -> bool:
        """Whether a value matches a key. `count`: of the values, if it is not their number; `keys`: if they are not those of the
        test."""
        if match.kind == "count":
            values = [str(self.counted(values) if count is None else count).encode()]
        found = compare(match, values, self.texts(match.keys) if keys is None else keys, self.meter)
        if match.kind == "matches" and found is not None:
            self.groups = found
        return found is not None

    def counted(self, values: Iterable[bytes]) -> int:
        """How many values there are."""
        count = 0
        for _ in values:
            self.meter.spend(EACH)
            count += 1
        return count

    def parts(self, part: str, addresses: Iterable[Address]) -> Iterator[bytes]:
        """A part of each address that has it."""
        separator = self.separator.encode()
        for address in addresses:
            found = part_of(address, part, separator)
            if found is not None:
                yield found

    # Actions

    def place(self, name: str, action: Kept | Filed) -> None:
        """File the message in a mailbox: once, and with the last flags that are said."""
        self.delivers()
        before = self.places.get(name)
        if isinstance(before, Filed) and isinstance(action, Filed) and before.create:
            action = action._replace(create=True)
        self.places[name] = action
        if sum(isinstance(one, Filed) for one in self.places.values()) > FILINGS_MOST:
            raise RunError(f"more than {FILINGS_MOST} mailboxes")

    def delivers(self) -> None:
        """RunError, if the message is refused."""
        if self.rejected is not None:
            raise RunError("the message is refused by reject already")


# Tests


def _exists(one: _Run, test: program.Exists) -> bool:
    return all(one.message.raw(name.lower()) for name in one.texts(test.names))


def _size(one: _Run, test: program.Size) -> bool:
    return one.message.size > test.limit if test.over else one.message.size < test.limit


def _header(one: _Run, test: program.HeaderTest) -> bool:
    names = dict.fromkeys(name.lower() for name in one.texts(test.names))
    return one.matches(test.match, (value for name in names for value in one.message.texts(name)))


def _address(one: _Run, test: program.AddressTest) -> bool:
    names = dict.fromkeys(name.lower() for name in one.texts(test.names))
    found = (address for name in names if name in ADDRESS_FIELDS for address in one.message.addresses(name))
    return one.matches(test.match, one.parts(test.part, found))


def _envelope(one: _Run, test: program.EnvelopeTest) -> bool:
    known = {b"from": one.sender, b"to": one.recipient}
    names = [name.lower() for name in one.texts(test.which)]
    if not known.keys() >= set(names):
        raise RunError("unknown part of the envelope")
    return one.matches(test.match, one.parts(test.part, [split(known[name]) for name in dict.fromkeys(names)]))


def _string(one: _Run, test: program.StringTest) -> bool:
    sources = one.texts(test.sources)
    return one.matches(test.match, sources, sum(bool(source) for source in sources))


def _hasflag(one: _Run, test: program.FlagTest) -> bool:
    found = [flag for name in dict.fromkeys(test.names) for flag in one.flags(None, name)]
    keys = one.texts(test.match.keys)
    if test.match.kind != "count":
        keys = [word for key in keys for word in key.split()]
    return one.matches(test.match, [flag.encode() for flag in found], keys=keys)


def _mailboxexists(one: _Run, test: program.MailboxExists) -> bool:
    for name in one.texts(test.names):
        one.meter.step()
        try:
            mailbox = mailbox_named(name)
        except ValueError:
            return False
        if mailbox != INBOX and not one.exists(mailbox):
            return False
    return True


def _body(one: _Run, test: program.BodyTest) -> bool:
    message = one.message
    if test.types is None:
        return one.matches(test.match, message.body())
    types = one.texts(test.types)
    count = message.parts()
    one.meter.spend(PART_COST * count * len(types))
    return one.matches(test.match, (value for number in range(count) for value in message.content(number, types)))


def _date(one: _Run, test: program.DateTest) -> bool:
    moment = one.moment
    if test.name is not None:
        fields = one.message.raw(one.text(test.name).lower())
        found = date_in(fields[0]) if fields else None
        if found is None:
            return one.matches(test.match, [])
        moment = found
    if test.zone is not None:
        try:
            moment = shifted(moment, one.checked(test.zone, zone_minutes))
        except OverflowError:
            return one.matches(test.match, [])
    part = date_part(moment, one.text(test.part))
    return one.matches(test.match, [] if part is None else [part])


_TESTS: Final[Mapping[type, Callable[[_Run, Anything], bool]]] = {
    program.Constant: lambda one, test: test.value,
    program.Not: lambda one, test: not one.test(test.test),
    program.All: lambda one, test: all(one.test(each) for each in test.tests),
    program.Any: lambda one, test: any(one.test(each) for each in test.tests),
    program.Exists: _exists,
    program.Size: _size,
    program.HeaderTest: _header,
    program.AddressTest: _address,
    program.EnvelopeTest: _envelope,
    program.StringTest: _string,
    program.FlagTest: _hasflag,
    program.MailboxExists: _mailboxexists,
    program.BodyTest: _body,
    program.DateTest: _date,
}


# Commands


def _if(one: _Run, command: program.If) -> None:
    for test, block in command.branches:
        if one.test(test):
            one.block(block)
            return


def _stop(one: _Run, command: program.Stop) -> None:
    one.stopped = True


def _keep(one: _Run, command: program.Keep) -> None:
    one.place(INBOX, Kept(one.flags(command.flags), command.line, False))
    one.cancelled = True


def _fileinto(one: _Run, command: program.Fileinto) -> None:
    mailbox = one.checked(command.mailbox, mailbox_named)
    one.place(mailbox, Filed(mailbox, one.flags(command.flags), command.create, command.line))
    one.cancelled = one.cancelled or not command.copy


def _redirect(one: _Run, command: program.Redirect) -> None:
    one.delivers()
    address = one.checked(command.address, outbound)
    one.redirects.setdefault(comparable(address), Redirected(address, command.line))
    if len(one.redirects) > REDIRECTS_MOST:
        raise RunError(f"more than {REDIRECTS_MOST} redirects")
    one.cancelled = one.cancelled or not command.copy


def _discard(one: _Run, command: program.Discard) -> None:
    one.discarded = Discarded(command.line)
    one.cancelled = True


def _reject(one: _Run, command: program.Reject) -> None:
    """RFC 5429 2: not twice, not with vacation, and not where the message is delivered too."""
    one.delivers()
    if one.vacation is not None:
        raise RunError("reject and vacation exclude each other")
    if one.places or one.redirects:
        raise RunError("the message is delivered already: it cannot be refused")
    one.rejected = Rejected(one.text(command.reason), command.line)
    one.cancelled = True


def _vacation(one: _Run, command: program.Vacation) -> None:
    if one.rejected is not None:
        raise RunError("reject and vacation exclude each other")
    if one.vacation is not None:
        raise RunError("vacation twice")
    one.vacation = command
    mine = own("" if one.shared else one.recipient, one.addresses, one.separator) - {""}
    also = frozenset(comparable(value[:1024].decode("utf-8", "replace")) for value in one.texts(command.addresses))
    why = why_not(one.message, one.sender, mine | also)
    if why:
        one.notes.append((command.line, f"no reply: {why}"))
        return
    given = None if command.sender is None else one.text(command.sender)
    sender = sender_of(given, one.addresses[0] if one.addresses else one.recipient, mine)
    subject = subject_of(None if command.subject is None else one.text(command.subject), one.message)
    ident, references = message_ids(one.message)
    one.answered.append(
        Answered(
            one.sender, sender, subject, one.text(command.reason), command.mime, command.days, command.key, ident, references,
            command.line,
        )
    )  # fmt: skip


def _set(one: _Run, command: program.Set) -> None:
    value = one.text(command.value)
    for modifier in command.modifiers:
        value = _MODIFIERS[modifier](value)
    one.variables[command.name] = clipped(value)


_MODIFIERS: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "lower": bytes.lower,
    "upper": bytes.upper,
    "lowerfirst": lambda value: value[:1].lower() + value[1:],
    "upperfirst": lambda value: value[:1].upper() + value[1:],
    "quotewildcard": lambda value: value.replace(b"\\", b"\\\\").replace(b"*", b"\\*").replace(b"?", b"\\?"),
    "length": lambda value: str(len(value.decode("utf-8", "replace"))).encode(),
}


def _flags(one: _Run, command: program.Flags) -> None:
    given = one.flags(command.flags)
    before = () if command.kind == "setflag" else one.flags(None, command.name)
    if command.kind == "removeflag":
        gone = {flag.lower() for flag in given}
        found = [flag for flag in before if flag.lower() not in gone]
    else:
        found = list({flag.lower(): flag for flag in (*given[::-1], *before[::-1])}.values())[::-1]
    one.variables[command.name] = " ".join(found).encode()


_STATEMENTS: Final[Mapping[type, Callable[[_Run, Anything], None]]] = {
    program.If: _if,
    program.Stop: _stop,
    program.Keep: _keep,
    program.Fileinto: _fileinto,
    program.Redirect: _redirect,
    program.Discard: _discard,
    program.Reject: _reject,
    program.Vacation: _vacation,
    program.Set: _set,
    program.Flags: _flags,
}
