"""The checks of `relaymta doctor`, and how they are run: at the same time, each within its own time, and whatever becomes of one,
the others are there.

Root looks at files and connects with the rights of the relay's user: a process of its own, which has become that user for good,
does all checks but those of CALLER.
"""

import asyncio
import contextlib
import dataclasses
import enum
import inspect
import json
import os
import signal
from collections.abc import Awaitable, Callable
from importlib import import_module
from pwd import struct_passwd
from typing import NamedTuple, cast

from relaymta.cli import (
    doctor_config,
    doctor_daemon,
    doctor_disk,
    doctor_here,
    doctor_limits,
    doctor_names,
    doctor_tls,
    doctor_ways,
)
from relaymta.cli.doctor_scene import Row, Scene, in_thread
from relaymta.dns import Resolver
from relaymta.errors import ConfigError
from relaymta.privileges import become

__all__ = ["CHECKS", "LIMIT", "Check", "Need", "results"]

LIMIT = 10.0  # seconds for a check
SPARE = 2.0  # ... and for the process that runs them to tell so
# What checks import when they run, and the relay's user may not be able to read.
_LATER = (
    "cryptography.x509", "dns.asyncquery", "dns.asyncbackend", "dns.message", "dns.rcode", "encodings.idna", "encodings.punycode",
    "relaymta.accept.tls", "relaymta.cli.filter", "relaymta.cli.judged", "relaymta.filter.chain", "relaymta.filter.dnsbl",
    "relaymta.route.mx", "relaymta.route.ourselves", "relaymta.route.sites", "relaymta.send.cures", "relaymta.send.opener",
    "relaymta.supervisor.checks",
)  # fmt: skip


class Need(enum.Flag):
    """What a check needs: a valid configuration; to send packets to other hosts (--offline: it is left out); the rights of the
    relay's user. CALLER: not those, but the rights of whoever calls, which may be root's."""

    CONFIG = enum.auto()
    OUT = enum.auto()
    RIGHTS = enum.auto()
    CALLER = enum.auto()


class Check(NamedTuple):
    """A check: `name` is that of its rows, or the beginning of it. `about(scene)`: whether there is anything to check."""

    name: str
    run: Callable[[Scene], list[Row] | Awaitable[list[Row]]]
    needs: Need = Need(0)
    about: Callable[[Scene], object] = lambda scene: True


def _has_files(scene: Scene) -> bool:
    """Whether a route has files for TLS of its own."""
    return any(route.ca_file or route.client_certificate for route in scene.config.route)


_C, _OUT, _RIGHTS, _CALLER = Need.CONFIG, Need.OUT, Need.RIGHTS, Need.CALLER
CHECKS = [
    Check("interpreter", doctor_here.interpreter),
    Check("kernels", doctor_here.kernels),
    Check("configuration", doctor_config.configuration, _CALLER),
    Check("daemon", doctor_daemon.daemon, _CALLER),
    Check("workers", doctor_daemon.workers, _CALLER),
    Check("control socket", doctor_daemon.control_socket, _CALLER),
    Check("port", doctor_daemon.ports, _C | _CALLER),
    Check("permissions", doctor_disk.permissions, _C | _RIGHTS),
    Check("certificate", doctor_tls.certificates, _C | _RIGHTS, lambda scene: scene.config.certificate),
    Check("client_certificate", doctor_tls.client_certificates, _C | _RIGHTS, _has_files),
    Check("disk", doctor_disk.disks, _C),
    Check("descriptors", doctor_limits.descriptors, _C | _CALLER),
    Check("listen queue", doctor_limits.listen_queue),
    Check("address space", doctor_limits.address_space, _CALLER),
    Check("memory", doctor_limits.memory_left, _C | _CALLER),
    Check("clock", doctor_here.clock, _CALLER),
    Check("hostname", doctor_names.hostname, _C),
    Check("nameserver", doctor_names.nameservers, _C | _OUT),
    Check("source", doctor_names.sources, _C),
    Check("PTR", doctor_names.pointers, _C | _OUT),
    Check("DNSBL", doctor_names.listings, _C | _OUT, lambda scene: scene.dnsbl),
    Check("smart host", doctor_ways.smart_hosts, _C | _OUT),
    Check("port 25", doctor_ways.port_25, _C | _OUT, lambda scene: scene.to_mx),
    Check("mail loop", doctor_ways.loops, _C),
    Check("mail for", doctor_ways.own_domains, _C | _OUT),
    Check("open relay", doctor_config.open_relay, _C),
    Check("filters", doctor_config.filters, _C | _OUT, lambda scene: scene.config.filter),
]


def results(scene: Scene) -> list[Row]:
    """What all checks that apply find, in their order. It takes little more than LIMIT seconds at most."""
    chosen = {number: check for number, check in enumerate(CHECKS) if _applies(check, scene)}
    user = scene.user
    found: dict[int, list[Row]] = {}
    for number, check in list(chosen.items()):
        if Need.RIGHTS in check.needs and not scene.rights:
            found[number] = [(check.name, "warning", f"run as {scene.who} to check this with the rights of the relay")]
            del chosen[number]
    others = {}
    if user is not None and user.pw_uid != 0 and os.geteuid() == 0:
        others = {number: check for number, check in chosen.items() if Need.CALLER not in check.needs}
    forked = _forked(scene, others, user) if others and user is not None else None  # before there is an event loop
    own = {number: check for number, check in chosen.items() if number not in others}
    asyncio.run(_everything(scene, own, forked, found))
    for number, check in others.items():
        found.setdefault(number, [(check.name, "wrong", f"this could not be checked as {scene.who}: its process has ended")])
    return [row for number in sorted(found) for row in found[number]]


def _applies(check: Check, scene: Scene) -> bool:
    if (Need.CONFIG in check.needs and not scene.given) or (Need.OUT in check.needs and scene.offline):
        return False
    return bool(check.about(scene))


async def _everything(
    scene: Scene, own: dict[int, Check], forked: tuple[int, int] | None, found: dict[int, list[Row]]
) -> None:  # fmt: skip
    """Run checks, while another process runs others; the rows of each go to `found`."""
    if forked is None:
        await _all(scene, own, found.__setitem__)
        return
    said, _ = await asyncio.gather(_read(*forked), _all(scene, own, found.__setitem__))
    for line in said.splitlines():
        number, rows = json.loads(line)
        found[number] = [cast(Row, tuple(row)) for row in rows]


def _forked(scene: Scene, checks: dict[int, Check], user: struct_passwd) -> tuple[int, int]:
    """Start a process that becomes `user` and runs these checks; its id, and where it writes [number, rows] of each that has
    ended, a line of JSON each."""
    from relaymta.supervisor.checks import import_all

    import_all(scene.config)
    for name in _LATER:
        import_module(name)
    theirs, ours = os.pipe()
    process = os.fork()
    if process:
        os.close(ours)
        return process, theirs
    try:  # the other process: it ends here, and leaves all else that was begun to the first one

        def tell(number: int, rows: list[Row]) -> None:
            os.write(ours, json.dumps([number, rows]).encode() + b"\n")

        try:
            become(user)
        except (ConfigError, OSError) as error:
            for number, check in checks.items():
                tell(number, [(check.name, "warning", f"this could not be checked as {user.pw_name}: {error}")])
        else:
            asyncio.run(_all(scene, checks, tell))
    finally:
        os._exit(0)


async def _read(process: int, pipe: int) -> bytes:
    """All that a process writes within its time. Then it is ended."""
    pieces: list[bytes] = []

    def read() -> None:
        while piece := os.read(pipe, 1 << 16):
            pieces.append(piece)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LIMIT + SPARE):
            await in_thread(read)
    os.kill(process, signal.SIGKILL)  # it is not waited for yet: no other has its number
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SPARE):
            await in_thread(lambda: os.waitpid(process, 0))
    text = b"".join(pieces)
    return text[: text.rfind(b"\n") + 1]


async def _all(scene: Scene, checks: dict[int, Check], tell: Callable[[int, list[Row]], None]) -> None:
    """Run checks at the same time; `tell(number, rows)` is called as each ends."""
    resolver = Resolver(scene.config.delivery.nameservers)
    there = dataclasses.replace(scene, resolver=resolver)

    async def one(number: int, check: Check) -> None:
        tell(number, await _rows(there, check))

    try:
        await asyncio.gather(*(one(number, check) for number, check in checks.items()))
    finally:
        await resolver.close()


async def _rows(scene: Scene, check: Check) -> list[Row]:
    """What a check finds, or that it could not."""
    try:
        async with asyncio.timeout(LIMIT) as limit:
            if inspect.iscoroutinefunction(check.run):
                return cast(list[Row], await check.run(scene))
            return await in_thread(lambda: cast(list[Row], check.run(scene)))
    except Exception as error:
        if limit.expired():
            cure = "see whether a file system, a nameserver or a host hangs, and run it again"
            return [(check.name, "wrong", f"this check took longer than {LIMIT:g} s: {cure}")]
        return [(check.name, "wrong", f"this check failed ({type(error).__name__}: {error}): please report it")]
