"""The sessions of users that this process serves, for operators: which there are, and their end. In slices, since there may be
thousands."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from relaymta.view.access import Access, OpenSession

__all__ = ["disconnect", "rows"]

SHOWN_TOGETHER = 100  # sessions: some 1 ms
ENDED_TOGETHER = 10  # each with a system call or two, and TLS


def _of(access: Access, user: int) -> list[OpenSession]:
    return [one for one in access.open if not user or one.owner == user]


async def rows(access: Access, user: int) -> AsyncGenerator[list[dict[str, Any]], None]:
    """The sessions of a user (0: of all), in the order of their logins, in parts. One that begins or ends meanwhile may be
    missing."""
    found = _of(access, user)
    for start in range(0, len(found), SHOWN_TOGETHER):
        yield [one.shown() for one in found[start : start + SHOWN_TOGETHER] if not one.gone]
        await asyncio.sleep(0)


async def disconnect(access: Access, user: int) -> int:
    """End the sessions of a user, each once its command under way has ended; how many."""
    count = 0
    for number, one in enumerate(_of(access, user), 1):
        if not one.gone:
            one.disconnect()
            count += 1
        if number % ENDED_TOGETHER == 0:
            await asyncio.sleep(0)
    return count
