"""A user's Sieve scripts, and to whom the user's vacation replies went: rows of the table `sieve`, by transactions.

    user, 0                 ScriptsRow
    user, 1, name           ScriptRow
    user, 2, id, number     a piece of the script's text (PIECE octets): no value needs pages of its own
    user, 3, key            until when (s, wall clock) no vacation reply of this key is sent again, and for whom one is sent

A script that is replaced has a new id; where a user comes to from another shard, ids begin anew. What reads takes any
transaction; what changes takes that of a `Change`, for a Task, which is undone when it is refused.
"""

import struct
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from typing import Any, Final, NamedTuple

import msgspec

from relaymta.proto import sieve
from relaymta.proto.envelope import encode
from relaymta.store.collected import CANNOT, EXISTS, LIMIT, MISSING, OVERQUOTA, Refusal
from relaymta.store.rows import MailShard

__all__ = [
    "INVALID", "NAME_MOST", "REPLIES_MOST", "SCRIPTS_MOST", "Script", "activate", "active_ident",
    "active_text", "all_scripts", "check", "check_size", "clear",
    "contradictions", "mend", "name_problem", "put", "remember_reply", "remove", "rename", "replied_until", "replies", "scripts",
    "take", "text",
]  # fmt: skip

INVALID: Final = "invalid"  # why a script is refused: it does not compile
SCRIPTS_MOST: Final = 32  # of a user
NAME_MOST: Final = 512  # octets (RFC 5804 1.6)
REPLIES_MOST: Final = 5000  # that are remembered of a user
KEY_MOST: Final = 32  # octets of a reply's key; of longer ones a digest

PIECE = 1900
PRUNED = 16  # replies that each new one looks at, to forget those whose time is over
_NAME_IN_KEY = 480  # octets of a name that are in its key

_HEAD = struct.Struct(">QB")
_PIECE = struct.Struct(">QBQH")
_UNTIL = struct.Struct(">Q")
_OWN, _NAME, _TEXT, _REPLY = range(4)


class ScriptsRow(msgspec.Struct, array_like=True, gc=False):
    """`active`: the id of the script that is run, 0: none; `last`: the highest id that was given; `replies`: how many are
    remembered."""

    active: int = 0
    last: int = 0
    replies: int = 0


class ScriptRow(msgspec.Struct, array_like=True, gc=False):
    """A script; `size` in octets."""

    name: str
    ident: int
    size: int


class Script(NamedTuple):
    """A script as it is listed."""

    name: str
    size: int
    active: bool


_decode_own = msgspec.msgpack.Decoder(ScriptsRow).decode
_decode_script = msgspec.msgpack.Decoder(ScriptRow).decode


def name_problem(name: str) -> str | None:
    """Why this cannot be the name of a script (RFC 5804 1.6); None when it can."""
    if not name:
        return "a script needs a name"
    if len(name.encode("utf-8", "surrogatepass")) > NAME_MOST:
        return f"the name has more than {NAME_MOST} octets"
    if any(char < " " or "\x7f" <= char <= "\x9f" or char in "\u2028\u2029" or "\ud800" <= char <= "\udfff" for char in name):
        return "there are control characters in the name"
    return None


def check_size(octets: int) -> None:
    """Whether a script may be as long. Refusal."""
    if octets > sieve.SCRIPT_MOST:
        raise Refusal(OVERQUOTA, f"a script has {sieve.SCRIPT_MOST} octets at most")


def check(text: bytes) -> None:
    """Whether a script compiles: some ms. Refusal."""
    try:
        sieve.compile(text)
    except sieve.SieveError as error:
        raise Refusal(INVALID, str(error)) from None


# Reading


def scripts(shard: MailShard, txn: Any, user: int) -> list[Script]:
    """All scripts of a user, in the order of their names."""
    found = _own(shard, txn, user).active
    return [Script(row.name, row.size, row.ident == found) for row in _rows(shard, txn, user)]


def text(shard: MailShard, txn: Any, user: int, name: str) -> bytes | None:
    """The text of a script; None when there is none of that name."""
    row = _script(shard, txn, user, name)
    return None if row is None else _text(shard, txn, user, row.ident)


def active_ident(shard: MailShard, txn: Any, user: int) -> int:
    """The id of the script that is run for a user; 0: none."""
    return _own(shard, txn, user).active


def active_text(shard: MailShard, txn: Any, user: int) -> tuple[int, bytes] | None:
    """The id and the text of that script."""
    ident = active_ident(shard, txn, user)
    return (ident, _text(shard, txn, user, ident)) if ident else None


def all_scripts(shard: MailShard, txn: Any, user: int) -> list[tuple[str, bytes, bool]]:
    """(name, text, whether it is active) of each script."""
    found = _own(shard, txn, user).active
    return [(row.name, _text(shard, txn, user, row.ident), row.ident == found) for row in _rows(shard, txn, user)]


def replied_until(shard: MailShard, txn: Any, user: int, key: bytes) -> int:
    """Until when (s, wall clock) no reply of this key is sent again; 0: it may be."""
    raw = None if _table(shard) is None else txn.get(_reply_key(user, key), db=_table(shard))
    return 0 if raw is None else int(_UNTIL.unpack_from(raw)[0])


def replies(shard: MailShard, txn: Any, user: int) -> list[tuple[bytes, int, bytes]]:
    """(key, until when, claimant) of all replies that are remembered."""
    found = _scan(shard, txn, _HEAD.pack(user, _REPLY))
    return [(key[9:], _UNTIL.unpack_from(value)[0], value[_UNTIL.size :]) for key, value in found]


# Changing


def put(shard: MailShard, txn: Any, user: int, name: str, data: bytes) -> None:
    """Keep a script, which the caller has compiled; one of that name is replaced, and stays active. Refusal."""
    _check_name(name)
    check_size(len(data))
    own, before = _own(shard, txn, user), _script(shard, txn, user, name)
    if before is None and sum(1 for _ in _rows(shard, txn, user)) >= SCRIPTS_MOST:
        raise Refusal(LIMIT, f"{SCRIPTS_MOST} scripts are the most that a user may have")
    own.last += 1
    if before is not None:
        _remove_text(shard, txn, user, before.ident)
        own.active = own.last if own.active == before.ident else own.active
    for number, start in enumerate(range(0, len(data), PIECE)):
        txn.put(_PIECE.pack(user, _TEXT, own.last, number), data[start : start + PIECE], db=_table(shard))
    _put_row(shard, txn, user, ScriptRow(name, own.last, len(data)))
    _put_own(shard, txn, user, own)


def activate(shard: MailShard, txn: Any, user: int, name: str) -> None:
    """From now on this script is run; "": none. Refusal."""
    own = _own(shard, txn, user)
    own.active = _there(shard, txn, user, name).ident if name else 0
    _put_own(shard, txn, user, own)


def remove(shard: MailShard, txn: Any, user: int, name: str) -> None:
    """Remove a script that is not active. Refusal."""
    row = _there(shard, txn, user, name)
    if row.ident == _own(shard, txn, user).active:
        raise Refusal(CANNOT, "the active script cannot be removed")
    _remove_text(shard, txn, user, row.ident)
    txn.delete(_name_key(user, name), db=_table(shard))


def rename(shard: MailShard, txn: Any, user: int, old: str, new: str) -> None:
    """Give a script another name; it stays active. Refusal."""
    row = _there(shard, txn, user, old)
    _check_name(new)
    if _script(shard, txn, user, new) is not None:
        raise Refusal(EXISTS, "there is a script of that name")
    txn.delete(_name_key(user, old), db=_table(shard))
    _put_row(shard, txn, user, msgspec.structs.replace(row, name=new))


def remember_reply(shard: MailShard, txn: Any, user: int, key: bytes, until: int, now: int, claimant: bytes) -> bool:
    """Remember that a vacation reply is sent now, and not again before `until` (both s, wall clock); False: one was, and its time
    is not over. Whoever asks again, as the same `claimant`, gets the same answer. What is over is forgotten by and by; of more
    than REPLIES_MOST, some that are over soonest."""
    place = _reply_key(user, key)
    if replied_until(shard, txn, user, key) > now:
        return bool(txn.get(place, db=_table(shard))[_UNTIL.size :] == claimant)
    own = _own(shard, txn, user)
    own.replies += not txn.delete(place, db=_table(shard))
    own.replies -= _prune(shard, txn, user, place, now, own.replies > REPLIES_MOST)
    txn.put(place, _UNTIL.pack(until) + claimant, db=_table(shard))
    _put_own(shard, txn, user, own)
    return True


def take(
    shard: MailShard, txn: Any, user: int, given: list[tuple[str, bytes, bool]], remembered: list[tuple[bytes, int, bytes]]
) -> None:
    """What `all_scripts` and `replies` have told elsewhere, of a user who has none here."""
    for name, data, is_active in given:
        put(shard, txn, user, name, data)
        if is_active:
            activate(shard, txn, user, name)
    own = _own(shard, txn, user)
    for key, until, claimant in remembered:
        txn.put(_HEAD.pack(user, _REPLY) + key, _UNTIL.pack(until) + claimant, db=_table(shard))
    own.replies = len(remembered)
    if given or remembered:
        _put_own(shard, txn, user, own)


def clear(shard: MailShard, txn: Any, user: int, most: int) -> int:
    """Remove rows of a user; how many: `most` while there may be more."""
    return _delete(shard, txn, [key for key, _ in islice(_scan(shard, txn, _HEAD.pack(user, 0)[:8]), most)])


# Verifying


def contradictions(shard: MailShard, txn: Any, users: set[int]) -> Iterator[str]:
    """A sentence for each contradiction in the rows of these users, who are all that are here."""
    known = _users(shard, txn)
    yield from (f"user {user}, who is not here, has Sieve scripts" for user in sorted(known - users))
    for user in sorted(known & users):
        yield from (f"user {user}: {what}" for what in _wrong(shard, txn, user))


def mend(shard: MailShard, txn: Any, users: set[int]) -> None:
    """Correct that: a script whose text is not whole goes."""
    for user in _users(shard, txn):
        if user not in users:
            clear(shard, txn, user, 1 << 62)
        elif any(True for _ in _wrong(shard, txn, user)):
            kept = [one for one, row in zip(all_scripts(shard, txn, user), _rows(shard, txn, user), strict=True)
                    if len(one[1]) == row.size]  # fmt: skip
            remembered, last = replies(shard, txn, user), _own(shard, txn, user).last
            clear(shard, txn, user, 1 << 62)
            _put_own(shard, txn, user, ScriptsRow(last=last))
            take(shard, txn, user, kept, remembered)


def _wrong(shard: MailShard, txn: Any, user: int) -> Iterator[str]:
    own, rows = _own(shard, txn, user), list(_rows(shard, txn, user))
    idents = {row.ident for row in rows}
    for row in rows:
        if len(_text(shard, txn, user, row.ident)) != row.size:
            yield f"the Sieve script {row.name} is not whole"
    if own.active and own.active not in idents:
        yield "the active Sieve script is missing"
    if max([0, *idents]) > own.last or len(idents) < len(rows):
        yield "Sieve scripts have wrong ids"
    texts = {_PIECE.unpack(key)[2] for key, _ in _scan(shard, txn, _HEAD.pack(user, _TEXT))}
    if texts - idents:
        yield "there are texts of Sieve scripts without a name"
    count = sum(1 for _ in _scan(shard, txn, _HEAD.pack(user, _REPLY)))
    if count != own.replies:
        yield f"{own.replies} vacation replies should be remembered, and {count} are"


def _users(shard: MailShard, txn: Any) -> set[int]:
    """The users who have rows."""
    found: set[int] = set()
    table = _table(shard)
    if table is not None:
        cursor = txn.cursor(db=table)
        while cursor.set_range(_HEAD.pack(max(found, default=-1) + 1, 0)):
            found.add(_HEAD.unpack(cursor.key()[:9])[0])
    return found


# Rows


def _table(shard: MailShard) -> Any:
    """None where the shard is only read, and an older version wrote it."""
    return shard.tables.get("sieve")


def _scan(shard: MailShard, txn: Any, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    table = _table(shard)
    cursor = None if table is None else txn.cursor(db=table)
    if cursor is not None and cursor.set_range(prefix):
        for key, value in cursor:
            if not key.startswith(prefix):
                return
            yield key, value


def _delete(shard: MailShard, txn: Any, keys: list[bytes]) -> int:
    for key in keys:
        txn.delete(key, db=_table(shard))
    return len(keys)


def _own(shard: MailShard, txn: Any, user: int) -> ScriptsRow:
    raw = None if _table(shard) is None else txn.get(_HEAD.pack(user, _OWN), db=_table(shard))
    return ScriptsRow() if raw is None else _decode_own(raw)


def _put_own(shard: MailShard, txn: Any, user: int, row: ScriptsRow) -> None:
    txn.put(_HEAD.pack(user, _OWN), encode(row), db=_table(shard))


def _name_key(user: int, name: str) -> bytes:
    """Of a name that is too long for LMDB, its beginning and a digest of all of it."""
    raw = name.encode("utf-8", "surrogatepass")
    if len(raw) > _NAME_IN_KEY:
        raw = raw[:_NAME_IN_KEY] + b"\xff" + sha256(raw).digest()[:16]
    return _HEAD.pack(user, _NAME) + raw


def _reply_key(user: int, key: bytes) -> bytes:
    return _HEAD.pack(user, _REPLY) + (key if len(key) <= KEY_MOST else sha256(key).digest())


def _script(shard: MailShard, txn: Any, user: int, name: str) -> ScriptRow | None:
    raw = None if _table(shard) is None else txn.get(_name_key(user, name), db=_table(shard))
    return None if raw is None else _decode_script(raw)


def _there(shard: MailShard, txn: Any, user: int, name: str) -> ScriptRow:
    row = _script(shard, txn, user, name)
    if row is None:
        raise Refusal(MISSING, "there is no script of that name")
    return row


def _rows(shard: MailShard, txn: Any, user: int) -> Iterator[ScriptRow]:
    return (_decode_script(value) for _, value in _scan(shard, txn, _HEAD.pack(user, _NAME)))


def _put_row(shard: MailShard, txn: Any, user: int, row: ScriptRow) -> None:
    txn.put(_name_key(user, row.name), encode(row), db=_table(shard))


def _text(shard: MailShard, txn: Any, user: int, ident: int) -> bytes:
    return b"".join(value for _, value in _scan(shard, txn, _PIECE.pack(user, _TEXT, ident, 0)[:17]))


def _remove_text(shard: MailShard, txn: Any, user: int, ident: int) -> None:
    _delete(shard, txn, [key for key, _ in _scan(shard, txn, _PIECE.pack(user, _TEXT, ident, 0)[:17])])


def _check_name(name: str) -> None:
    problem = name_problem(name)
    if problem is not None:
        raise Refusal(CANNOT, problem)


def _prune(shard: MailShard, txn: Any, user: int, place: bytes, now: int, too_many: bool) -> int:
    """Forget replies whose time is over among some that follow `place`, in a circle, and, where there are too many, that of them
    whose time is over first; how many."""
    head = _HEAD.pack(user, _REPLY)
    cursor = txn.cursor(db=_table(shard))
    seen: dict[bytes, int] = {}
    at = place
    while len(seen) < PRUNED:
        found = cursor.set_range(at) and cursor.key().startswith(head)
        if (not found and at == head) or (found and cursor.key() in seen):
            break
        if found:
            seen[cursor.key()] = _UNTIL.unpack_from(cursor.value())[0]
        at = cursor.key() + b"\x00" if found else head
    gone = [key for key, until in seen.items() if until <= now]
    if too_many and not gone and seen:
        gone = [min(seen, key=lambda key: seen[key])]
    return _delete(shard, txn, gone)
