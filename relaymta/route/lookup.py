"""Route lookup by HTTP: the smart hosts or the route of a domain, cached for as long as the response allows.

`GET URL?domain=D&application=A` returns 200 and a JSON object, {"hosts": ["mx.example:25"]} or {"route": "its name"}, or 404: as
if the route had no lookup. `Cache-Control: max-age=N` sets the seconds for which the answer is cached.
"""

import re
from dataclasses import dataclass
from typing import Any

from relaymta.config import parse_hostport
from relaymta.web import WebError, object_in, request

__all__ = ["Answer", "LookupFailed", "ask"]

TIMEOUT = 10.0
DEFAULT_SECONDS = 60.0
LONGEST_SECONDS = 3600.0
LARGEST = 65_536  # octets of an answer
MOST_HOSTS = 20

_MAX_AGE = re.compile(r"\bmax-age=(\d+)")


class LookupFailed(Exception):
    """The lookup failed, or returned an invalid answer; str() is the reason."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`hosts`: smart hosts, or `route`: a route's name; neither (404): the route applies as it is. `seconds`: to cache it."""

    hosts: tuple[str, ...]
    route: str
    seconds: float


async def ask(url: str, domain: str, application: str) -> Answer:
    """The answer for a domain. LookupFailed when there is no valid one."""
    try:
        response = await request(
            "GET", url, seconds=TIMEOUT, largest=LARGEST, params={"domain": domain, "application": application}
        )
        found = _MAX_AGE.search(response.cache)
        seconds = min(float(found[1]), LONGEST_SECONDS) if found is not None else DEFAULT_SECONDS
        if response.status == 404:
            return Answer((), "", seconds)
        if response.status != 200:
            raise LookupFailed(f"{response.status} {response.reason}")
        return _read(object_in(response.body), seconds)
    except (WebError, ValueError) as error:
        raise LookupFailed(str(error)) from None


def _read(found: dict[str, Any], seconds: float) -> Answer:
    """The Answer in a JSON value. ValueError when it is invalid."""
    if not (found.keys() <= {"hosts", "route"} and len(found) == 1):
        raise ValueError('expected {"hosts": [...]} or {"route": "..."}')
    route, hosts = found.get("route", ""), found.get("hosts", [])
    if not isinstance(route, str) or not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        raise ValueError("hosts are a list of strings, a route is a string")
    if not route and not 0 < len(hosts) <= MOST_HOSTS:
        raise ValueError(f"from 1 to {MOST_HOSTS} hosts")
    for host in hosts:
        parse_hostport(host, 25)
    return Answer(tuple(hosts), route, seconds)
