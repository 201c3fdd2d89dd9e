"""What sessions ask of the owner of a shard, and what they are answered; it travels between processes."""

from collections.abc import Awaitable
from typing import Any

import msgspec

from relaymta.disk.big import BigFile
from relaymta.errors import StoreError, StoreFull
from relaymta.store.collected import Refusal

__all__ = ["Answer", "Copied", "Message", "Partial", "Stored"]


class Message(msgspec.Struct, array_like=True):
    """A message to append. `data`: its data, or the file of a large one, which is copied and stays the caller's; `flags`: bits of
    system flags; `keywords`: in any case; `date`: INTERNALDATE (ms, wall clock; 0: now)."""

    data: bytes | BigFile
    flags: int = 0
    keywords: list[str] = []
    date: int = 0


class Stored(msgspec.Struct, array_like=True):
    """What STORE has done. `before`, `after`: the index records (packed) of all messages that it applied to, in the same order;
    those whose flags did not change are the same in both. `modified`: UIDs of those that it did not apply to, since others had
    changed them (RFC 7162 3.1.3). `keywords`: of the mailbox, as in MailboxState."""

    before: bytes = b""
    after: bytes = b""
    modified: list[int] = []
    keywords: list[str] = []


class Copied(msgspec.Struct, array_like=True):
    """Where messages are now: COPYUID, or (no `sources`) APPENDUID. `sources`: their UIDs where they were; `copies`: their UIDs
    in `mailbox`, in the same order; both ascending."""

    mailbox: int
    uidvalidity: int
    sources: list[int] = []
    copies: list[int] = []


class Partial(Refusal):
    """A MOVE that was stopped between two slices: what `copied` names (something, always) is moved, the rest is where it was."""

    def __init__(self, code: str, text: str, copied: Copied) -> None:
        super().__init__(code, text)
        self.copied = copied


class Answer(msgspec.Struct, array_like=True):
    """The result of an operation on its way to another process; or the error in place of it, by its class."""

    result: Any = None
    error: str = ""
    text: str = ""
    code: str = ""

    @classmethod
    async def of(cls, operation: Awaitable[Any]) -> "Answer":
        """What an operation ends with."""
        try:
            return cls(await operation)
        except Partial as error:
            return cls(error.copied, "Partial", str(error), error.code)
        except Refusal as error:
            return cls(None, "Refusal", str(error), error.code)
        except StoreFull as error:
            return cls(None, "StoreFull", str(error))
        except StoreError as error:
            return cls(None, "StoreError", str(error))

    def taken(self, kind: Any) -> Any:
        """The result, of that type. Refusal, Partial, StoreError, StoreFull."""
        match self.error:
            case "":
                return msgspec.convert(self.result, kind)
            case "Partial":
                raise Partial(self.code, self.text, msgspec.convert(self.result, Copied))
            case "Refusal":
                raise Refusal(self.code, self.text)
            case "StoreFull":
                raise StoreFull(self.text)
        raise StoreError(self.text)
