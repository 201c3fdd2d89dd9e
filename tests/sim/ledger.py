"""What the world knows about each message: who was told what, and what therefore may and may not happen to it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from relaymta.proto.envelope import DELIVERED, DSN, FAILED, PENDING, PERMANENT, SUCCESS, TRANSIENT
from relaymta.queue import Entry, format_id, parse_id
from relaymta.send.trail import HOSTS
from tests.sim.peers import Taken

__all__ = ["Ledger", "Message"]


@dataclass(eq=False)
class Message:
    """A message. `acknowledged`: None until its client has an answer. `states`: by recipient. `outcomes`: results that were
    passed to the queue and are not known to be durable. `deleting`: an operator's deletion is under way; `contested`: another
    began meanwhile, and either of them may have reached it."""

    ident: int
    shard: int
    sender: str
    recipients: list[str]
    data: bytes | None
    acknowledged: bool | None = None
    dsn: bool = False
    states: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    deleting: bool = False
    contested: bool = False
    deleted: bool = False
    taken: list[Taken] = field(default_factory=list)
    offered: list[float] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # recipients whom a host has answered by 5xx in the attempt under way
    asked: set[tuple[int, str]] = field(default_factory=set)  # queue, and host, of what that attempt has begun

    def __post_init__(self) -> None:
        self.states = dict.fromkeys(self.recipients, "pending")

    @property
    def name(self) -> str:
        return format_id(self.ident)

    @property
    def ended(self) -> bool:
        return self.deleted or "pending" not in self.states.values()


class Ledger:
    """All messages. `wrong(text, message)` is called for what must not happen."""

    def __init__(self, wrong: Callable[[str, Message | None], None]) -> None:
        self.messages: dict[int, Message] = {}
        self._by_name: dict[str, Message] = {}
        self._wrong = wrong

    def add(self, message: Message) -> Message:
        self.messages[message.ident] = message
        self._by_name[message.name] = message
        return message

    def named(self, name: str) -> Message | None:
        return self._by_name.get(name)

    # Clients and outcomes

    def answered(self, message: Message, error: Exception | None) -> None:
        """The client of a message was told whether it is durable."""
        if message.acknowledged is not None:
            self._wrong("a client was answered twice", message)
        message.acknowledged = error is None

    def finished(self, entry: Entry, results: Any, now: int) -> None:
        """An outcome was passed to the queue."""
        message = self.messages.get(entry.ident)
        if message is None:
            return
        message.asked = {pair for pair in message.asked if pair[0] != entry.queue}
        for index, address in entry.recipients:
            message.refused.pop(address, None)
            attempt = None if results is None else results.get(index)
            if results is None or (attempt is not None and attempt.kind == SUCCESS):
                outcome = "delivered"
            elif attempt is not None and (
                attempt.kind == PERMANENT or (attempt.kind == TRANSIENT and now >= entry.envelope.deadline)
            ):
                outcome = "failed"
            else:
                outcome = "pending"
            message.outcomes[address] = outcome

    # The log

    def logged(self, worker: Any, event: str, fields: dict[str, Any]) -> None:
        if event == "queued":
            ident = parse_id(fields["id"])
            known, recipients = self.messages.get(ident), list(fields["recipients"])
            # A process that dies may leave an id that nobody was told of, and that its successor gives away again.
            if known is None or (not known.acknowledged and known.recipients != recipients):
                self.add(Message(ident, worker.slot, fields["sender"], recipients, None, True, True))
        elif event == "delivered":
            for address in fields["recipients"]:
                self._end(fields["id"], address, "delivered")
        elif event == "bounced":
            message = self._end(fields["id"], fields["recipient"], "failed")
            if message is not None and message.sender and not fields["dsn"]:
                self._wrong("a recipient failed, and there is no DSN", message)
        elif event == "deferred":
            message = self.named(fields["id"])
            if message is not None:
                message.outcomes.pop(fields["recipient"], None)
                if message.states.get(fields["recipient"]) != "pending" or message.deleted:
                    self._wrong(f"deferred after its end: {fields['recipient']}", message)

    def _end(self, name: str, address: str, state: str) -> Message | None:
        message = self.named(name)
        if message is None:
            self._wrong(f"{name} is not known: {state}", None)
            return None
        was = message.states.get(address)
        message.outcomes.pop(address, None)
        if was != "pending" or message.deleted:
            self._wrong(f"ended twice: {address} was {'deleted' if message.deleted else was}, and is {state}", message)
        if state == "delivered" and not any(taken.address == address for taken in message.taken):
            self._wrong(f"delivered, and no peer has it: {address}", message)
        message.states[address] = state
        return message

    # Peers

    def began(self, message: Message, queue: int, host: str, addresses: list[str], first: bool) -> None:
        """An attempt begins, or (not `first`) goes on, perhaps at another host."""
        if first:
            message.asked = {pair for pair in message.asked if pair[0] != queue}
        message.asked.add((queue, host))
        if sum(one == queue for one, _ in message.asked) > HOSTS:
            self._wrong(f"more than {HOSTS} hosts are asked to take it in one attempt", message)
        for address in addresses:
            if address in message.refused:
                self._wrong(f"{address} is asked for again, though refused for good by {message.refused[address]}", message)

    def refused(self, ident: int | None, address: str, host: str) -> None:
        """A peer's 5xx for a recipient of a message has reached the session."""
        message = self.messages.get(ident) if ident is not None else None
        if message is not None:
            message.refused[address] = host

    def taken(self, record: Taken, data: bytes) -> None:
        """A peer has accepted a message for a recipient."""
        name = _name_in(data)
        message = self.named(name)
        if message is None:
            self._wrong(f"a peer has accepted an unknown message: {data[:80]!r}", None)
            return
        record.ident = name
        if message.data is not None and data != message.data:
            self._wrong(f"a peer has other message data than the client sent: {data[:200]!r}", message)
        if record.address not in message.states:
            self._wrong(f"delivered to {record.address}, who is no recipient", message)
            return
        for before in message.taken:
            sure = before.answered and not before.doubtful and not before.process.dead
            if before.address == record.address and sure and not record.doubtful:
                self._wrong(f"delivered again, though the peer's answer had come: {record.address}", message)
        if message.states[record.address] != "pending" and not message.deleted and not record.doubtful:
            self._wrong(f"delivered after its end: {record.address} is {message.states[record.address]}", message)
        message.taken.append(record)

    # After a kill

    def compare(self, shard: int, found: dict[int, tuple[Any, dict[int, Any]]]) -> None:
        """Compare with what a shard's disk holds after its process died: `found`: id -> envelope, recipients' states."""
        for message in list(self.messages.values()):
            if message.shard == shard:
                if message.ident in found:
                    self._there(message, *found[message.ident])
                else:
                    self._gone(message)
                message.outcomes.clear()
                message.asked.clear()
                message.refused.clear()
                message.deleting = False
        for ident, (envelope, states) in found.items():
            if ident not in self.messages:
                if not envelope.flags & DSN:
                    self._wrong(f"{format_id(ident)} is on the disk, and nobody has sent it", None)
                self._there(
                    self.add(Message(ident, shard, envelope.sender, list(envelope.recipients), None, True, True)),
                    envelope,
                    states,
                )

    def _there(self, message: Message, envelope: Any, states: dict[int, Any]) -> None:
        if message.ended:
            self._wrong("it came back after its end", message)
            return
        if message.acknowledged is False:
            self._wrong("its client was told that it could not be stored, and it is", message)
        message.acknowledged = True
        for index, address in enumerate(envelope.recipients):
            state = {PENDING: "pending", DELIVERED: "delivered", FAILED: "failed"}[
                states[index].state if index in states else PENDING
            ]
            was = message.states[address]
            if state != was:
                if was != "pending" or message.outcomes.get(address) != state:
                    self._wrong(f"{address} is {state} on the disk, was {was}", message)
                message.states[address] = state

    def _gone(self, message: Message) -> None:
        if message.ended:
            return
        if message.acknowledged:
            if message.deleting:
                message.deleted = True
                return
            for address, state in message.states.items():
                if state == "pending" and message.outcomes.get(address) in ("delivered", "failed"):
                    message.states[address] = message.outcomes[address]
            if not message.ended:
                self._wrong("lost: it was acknowledged, and is not on the disk", message)
                message.deleted = True
        else:
            message.acknowledged = False
            message.deleted = True  # it never was


def _name_in(data: bytes) -> str:
    """The id that the simulation, or the queue in a DSN, wrote into a message."""
    for line in data.split(b"\r\n"):
        if line.startswith(b"X-Sim: "):
            return line[7:].decode()
        if line.startswith(b"Message-ID: <"):
            return line[13:].partition(b"@")[0].decode()
        if not line:
            break
    return ""
