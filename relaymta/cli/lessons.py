"""What `filter learn` and `quarantine learn` have in common: texts become lessons of the filters that learn."""

from collections.abc import Iterator
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import click

from relaymta.cli.console import say, say_json
from relaymta.cli.options import Configuration, config_with, fail
from relaymta.cli.peer import Daemon, Offline
from relaymta.errors import RelayError

if TYPE_CHECKING:
    from relaymta.config import Config
    from relaymta.config import Filter as Settings
    from relaymta.filter.judgement import Learner
    from relaymta.filter.lessons import Lesson

__all__ = ["Learning", "again", "learning", "taught"]

LEARN = ("rspamd", "spamd")
again = click.option("--again", is_flag=True, help="Also what they have learned before.")


class Learning(NamedTuple):
    """The configuration, and the filters that learn."""

    config: "Config"
    learners: "list[Settings]"


def learning(read: Configuration, only: str) -> Learning:
    """The filters that learn; `only` this one, where it is given. Ends the program when there is none."""
    config = config_with(read, "filter")
    learners = [one for one in config.filter if one.type in LEARN and only in ("", one.name)]
    if not learners:
        fail(64 if only else 78, f"--only: {only} does not learn" if only else "no [[filter]] learns: rspamd and spamd do")
    return Learning(config, learners)


def taught(
    peer: Daemon | Offline | None, of: Learning, texts: Iterator[tuple[str, bytes]], spam: bool, as_json: bool, again: bool
) -> bool:
    """Teach the filters by these texts, each with its name for people, and say what they have made of each. Whether all were
    learned. `peer`: who remembers which were, None: nobody does; `again`: that does not matter."""
    import asyncio  # as below: not all verbs of `filter` learn

    return asyncio.run(_taught(_Memory(peer, again), of, texts, spam, as_json))


async def _taught(memory: "_Memory", of: Learning, texts: Iterator[tuple[str, bytes]], spam: bool, as_json: bool) -> bool:
    from relaymta.cli.judged import means
    from relaymta.filter.chain import made
    from relaymta.filter.lessons import Lessons

    good = True

    def tell(name: str, lessons: "list[Lesson]") -> None:
        nonlocal good
        for one in lessons:
            good = good and not one.error
            if as_json:
                say_json({"message": name} | one._asdict())
            else:
                say(f"{name}: {one.filter}: {one.error or one.done}")

    async with AsyncExitStack() as stack:
        given = await stack.enter_async_context(means(of.config))
        learners: dict[str, Learner] = {}
        for one in of.learners:
            asking = made(one.model_copy(update={"address": one.address[:1]}), given)
            stack.callback(asking.close)
            learners[one.name] = cast("Learner", asking)
        lessons = Lessons(learners, {one.name: one.timeout for one in of.learners}, memory)
        stack.callback(lessons.close)
        try:
            for name, data in texts:
                await lessons.put(data, spam, partial(tell, name))
        except SystemExit:  # a text cannot be read: those before it are learned, and it is said what has come of them
            await lessons.finished()
            raise
        await lessons.finished()
    return good


class _Memory:
    """That of the daemon."""

    def __init__(self, peer: Daemon | Offline | None, again: bool) -> None:
        self._again = again
        self._peer = peer if isinstance(peer, Daemon) else None

    async def known(self, keys: list[bytes], spam: bool) -> list[bool]:
        """As of lessons.Memory."""
        if self._peer is None or self._again:
            return [False] * len(keys)
        return self._ask("lessons", keys=keys, spam=spam) or [False] * len(keys)

    async def learned(self, key: bytes, spam: bool) -> None:
        """As of lessons.Memory."""
        self._ask("learned", key=key, spam=spam)

    def _ask(self, op: str, **args: object) -> Any:
        """The daemon's answer; None: it has gone, and filters learn all the same."""
        if self._peer is None:
            return None
        try:
            return self._peer.ask(op, **args)
        except (RelayError, OSError) as error:
            self._peer = None
            say(f"the relay does not remember from here on which texts are learned: {error}", err=True)
            return None
