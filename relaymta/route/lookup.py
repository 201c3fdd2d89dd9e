"""Routes that another program knows: where a domain's mail goes is asked by HTTP, and remembered for as long as the answer says.

`GET URL?domain=D&application=A` is answered by 200 and a JSON object, {"hosts": ["mx.example:25"]} or {"route": "its name"}, or
by 404: as if the route had no look-up. `Cache-Control: max-age=N` says for how many seconds that holds.
"""

import json
import re
from dataclasses import dataclass

from relaymta.config import parse_hostport

__all__ = ["Answer", "LookupFailed", "ask"]

TIMEOUT = 10.0
DEFAULT_SECONDS = 60.0
LONGEST_SECONDS = 3600.0
LARGEST = 65_536  # octets of an answer
MOST_HOSTS = 20

_MAX_AGE = re.compile(r"\bmax-age=(\d+)")


class LookupFailed(Exception):
    """The answer is not to be had now, or makes no sense; str() is the reason."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Where mail goes: `hosts`, or by the route of this name; neither: as the route itself says. `seconds`: for how long."""

    hosts: tuple[str, ...]
    route: str
    seconds: float


async def ask(url: str, domain: str, application: str) -> Answer:
    """Ask. LookupFailed when there is no good answer."""
    import aiohttp  # the worker has it already where a route has a look-up: it takes a tenth of a second

    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT)) as client,
            client.get(url, params={"domain": domain, "application": application}, allow_redirects=False) as response,
        ):
            found = _MAX_AGE.search(response.headers.get("Cache-Control", ""))
            seconds = min(float(found[1]), LONGEST_SECONDS) if found is not None else DEFAULT_SECONDS
            if response.status == 404:
                return Answer((), "", seconds)
            if response.status != 200:
                raise LookupFailed(f"{response.status} {response.reason}")
            text = b""
            async for piece in response.content.iter_chunked(LARGEST):
                text += piece
                if len(text) > LARGEST:
                    raise LookupFailed(f"the answer has more than {LARGEST} octets")
            return _read(json.loads(text), seconds)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise LookupFailed(str(error) or type(error).__name__) from None


def _read(found: object, seconds: float) -> Answer:
    """The answer's fields. ValueError when it is not what it should be."""
    if not isinstance(found, dict) or not (found.keys() <= {"hosts", "route"} and len(found) == 1):
        raise ValueError('expected {"hosts": [...]} or {"route": "..."}')
    route, hosts = found.get("route", ""), found.get("hosts", [])
    if not isinstance(route, str) or not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        raise ValueError("hosts are a list of strings, a route is a string")
    if not route and not 0 < len(hosts) <= MOST_HOSTS:
        raise ValueError(f"from 1 to {MOST_HOSTS} hosts")
    for host in hosts:
        parse_hostport(host, 25)
    return Answer(tuple(hosts), route, seconds)
