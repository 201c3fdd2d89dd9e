"""A reload: the keys that have changed, and the configuration that is in use afterwards. Keys that need a restart keep their old
values; the result is validated as a whole, so that each process that gets it accepts it."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from relaymta.config.clients import Listener
from relaymta.config.describing import leaves
from relaymta.config.origin import Origin
from relaymta.config.sentences import problems_of
from relaymta.config.values import When, is_list, model_of, when
from relaymta.config.whole import Config
from relaymta.errors import ConfigError

__all__ = ["Change", "merge"]


class Change(NamedTuple):
    """`config`: what is in use after the reload; `applied`, `restart`: the changed keys (dotted) that are in it, and those that
    need a restart; `left_out`: a sentence for each listener that is not as in the file until then."""

    config: Config
    applied: list[str]
    restart: list[str]
    left_out: list[str]


def merge(running: Config, fresh: Config) -> Change:
    """What a reload of `fresh` makes of `running`. ConfigError when the two together are no valid configuration."""
    changed = list(_differences(Config, running, fresh))
    restart = [key for key, mark in changed if mark is When.RESTART]
    data = _merged(Config, json.loads(running.to_json()), json.loads(fresh.to_json()))
    try:
        config = Config.model_validate_json(json.dumps(data))
    except ValidationError as error:
        kept = f"with the running {', '.join(restart)}, which only a restart changes: "
        raise ConfigError([kept + problem for problem in problems_of(Config, Origin(), error)]) from None
    config._origin = fresh._origin
    applied = [key for key, mark in changed if mark is When.RELOAD]
    left_out = [*_left_out(running.listener, fresh.listener), *_mailboxes(running, fresh)]
    return Change(config, applied, restart, left_out)


def _mailboxes(running: Config, fresh: Config) -> Iterator[str]:
    """A sentence about the first route that keeps mail here."""
    named = [route.label for route in fresh.route if route.is_local]
    if named and not running.keeps_mail:
        yield f"route {named[0]}: there are no mailboxes before a restart, and mail for them is deferred until then"


def _left_out(running: list[Listener], fresh: list[Listener]) -> Iterator[str]:
    """A sentence for each listener that only a restart opens, changes or closes."""
    before, after = ({listener.address: listener for listener in listeners} for listeners in (running, fresh))
    for address, listener in after.items():
        if address not in before:
            yield f"listener {address} is not open: only a restart opens it"
        elif listener != before[address]:
            keys = ", ".join(key for key, _ in _differences(Listener, before[address], listener))
            yield f"listener {address} is as before: only a restart changes its {keys}"
    yield from (f"listener {address} stays open: only a restart closes it" for address in before if address not in after)


def _mark(field: FieldInfo) -> When | None:
    """What a reload does with a key; for a repeated table, which is replaced as a whole, with all of its keys."""
    below = model_of(field.annotation)
    return when(field) if below is None else next(when(leaf) for _, leaf in leaves(below))


def _differences(model: type[BaseModel], before: Any, after: Any, prefix: str = "") -> Iterator[tuple[str, When | None]]:
    """(dotted key, what a reload does with it) of each key that differs; of a table that exists once only, its own key."""
    for name, field in model.model_fields.items():
        old, new = getattr(before, name), getattr(after, name)
        below, key = model_of(field.annotation), prefix + (field.alias or name)
        if old == new:
            continue
        if below is None or old is None or new is None:
            yield key, _mark(field)
        elif not is_list(field.annotation):
            yield from _differences(below, old, new, f"{key}.")
        elif len(old) != len(new):
            yield key, _mark(field)
        else:
            for number, (one, other) in enumerate(zip(old, new, strict=True)):
                yield from _differences(below, one, other, f"{key}.{number}.")


def _merged(model: type[BaseModel], running: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """The keys given in `fresh`, but for those that need a restart, which are as in `running`."""
    merged = dict(fresh)
    for name, field in model.model_fields.items():
        key, below = field.alias or name, model_of(field.annotation)
        if below is not None and not is_list(field.annotation):
            if any(when(leaf) is When.RESTART for _, leaf in leaves(below)) and (key in running or key in fresh):
                merged[key] = _merged(below, running.get(key) or {}, fresh.get(key) or {})
        elif _mark(field) is When.RESTART:
            merged.pop(key, None)
            if key in running:
                merged[key] = running[key]
    return merged
