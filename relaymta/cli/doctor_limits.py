"""What `relaymta doctor` checks of the limits of this machine: descriptors, the listen queue, address space, memory."""

import contextlib
import resource
import sys
from pathlib import Path

from relaymta import memory
from relaymta.accept.admission import DESCRIPTORS_KEPT
from relaymta.cli.doctor_scene import Row, Scene
from relaymta.cli.peer import size
from relaymta.disk.environment import MAP_SIZE
from relaymta.sockets import BACKLOG

__all__ = ["address_space", "descriptors", "listen_queue", "memory_left"]

FEW = 1024  # descriptors with which no relay works well, whatever is configured
EACH_PROCESS = 64 << 20  # octets that each process of the relay takes, with some to spare (docs/benchmarks.md)
SPARE = 4 << 30  # octets of address space beside the map
UNLIMITED = 1 << 62
_SOMAXCONN = Path("/proc/sys/net/core/somaxconn")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_MEMINFO = Path("/proc/meminfo")


def descriptors(scene: Scene) -> list[Row]:
    """Whether each worker may have as many descriptors as connections are allowed."""
    config, workers = scene.config, scene.workers
    limit, whose = _limit(scene, "Max open files", resource.RLIMIT_NOFILE)
    most = (config.limits.connections + config.delivery.connections) // workers + DESCRIPTORS_KEPT
    cure = f"raise it to {1 << most.bit_length()} (LimitNOFILE= of the unit, ulimit -Hn), or lower limits.connections"
    what = f"{_count(limit)} descriptors for each process{whose}"
    if limit < FEW:
        return [("descriptors", "wrong", f"{what}: too few for a relay; {cure}")]
    if limit < most:
        allowed = f"limits.connections and delivery.connections allow {most - DESCRIPTORS_KEPT} connections a worker"
        return [("descriptors", "warning", f"{what}, and {allowed}: beyond it clients wait; {cure}")]
    return [("descriptors", "ok", what)]


def listen_queue(scene: Scene) -> list[Row]:
    """Whether the kernel allows as many waiting connections as the relay asks for."""
    try:
        most = int(_SOMAXCONN.read_text())
    except (OSError, ValueError):
        return [("listen queue", "ok", "net.core.somaxconn cannot be read here")]
    if most < BACKLOG:
        cure = f"`sysctl -w net.core.somaxconn={4 * BACKLOG}`, and in /etc/sysctl.d"
        return [("listen queue", "warning", f"net.core.somaxconn = {most} cuts it from {BACKLOG} connections: {cure}")]
    return [("listen queue", "ok", f"{BACKLOG} connections (net.core.somaxconn = {most})")]


def address_space(scene: Scene) -> list[Row]:
    """Whether the tables of a shard can be mapped. They are mapped shared, and so take no memory that is committed
    (vm.overcommit_memory)."""
    if sys.maxsize < MAP_SIZE:
        return [("address space", "wrong", "a 32-bit interpreter cannot map the tables of a shard: use a 64-bit one")]
    limit, whose = _limit(scene, "Max address space", resource.RLIMIT_AS)
    if limit < MAP_SIZE + SPARE:
        what = f"{size(limit)} of address space for each process{whose}, and the tables of a shard are mapped at {size(MAP_SIZE)}"
        return [("address space", "wrong", f"{what}: lift the limit (LimitAS=infinity of the unit, ulimit -v unlimited)")]
    return [("address space", "ok", "unlimited" if limit >= UNLIMITED else f"{size(limit)} for each process")]


def memory_left(scene: Scene) -> list[Row]:
    """Whether the cgroup, and the machine, have memory enough for all processes and what is kept for delivery."""
    config = scene.config
    least = (scene.workers + 1) * EACH_PROCESS + scene.workers * config.queue.window_bytes
    needs = f"{scene.workers} workers with queue.window_bytes of message data each take up to {size(least)}"
    limit, used = memory.limit(scene.processes[0] if scene.processes else "self")
    limit = min((one for one in (limit, config.limits.memory) if one), default=0)
    cure = "raise it (MemoryMax= of the unit, or the container's; limits.memory), or set fewer workers"
    if used > memory.TIGHT:
        state = "wrong" if used > memory.REFUSE else "warning"
        what = "mail is temporarily rejected" if used > memory.REFUSE else "no message data is kept in memory"
        return [("memory", state, f"{used:.0%} of the limit of {size(limit)} are in use: {what}; {cure}")]
    if limit and limit < least:
        return [("memory", "warning", f"the limit is {size(limit)}, and {needs}: {cure}")]
    info = _meminfo()
    left = info.get("MemAvailable", UNLIMITED)
    if not scene.processes and left < least:
        return [("memory", "warning", f"{size(left)} are free, and {needs}: free some, or set fewer workers")]
    committed = info.get("CommitLimit", UNLIMITED) - info.get("Committed_AS", 0)
    if _strict() and committed < least:
        cure = "raise vm.overcommit_ratio, or set vm.overcommit_memory to 0"
        return [("memory", "warning", f"the kernel promises {size(max(0, committed))} more, and {needs}: {cure}")]
    shown = [f"limit {size(limit)}"] if limit else []
    return [("memory", "ok", ", ".join([*shown, *([f"{size(left)} free"] if left < UNLIMITED else [])]) or "unlimited")]


def _limit(scene: Scene, name: str, number: int) -> tuple[int, str]:
    """The lowest limit of the processes of the running relay, else the one that a relay would have that is started here; and
    whose it is."""
    found = [one for process in scene.processes if (one := _of_process(process, name)) is not None]
    if found:
        return min(found), ""
    hard = resource.getrlimit(number)[1]  # the soft one of descriptors is raised to it at the start
    return (UNLIMITED if hard == resource.RLIM_INFINITY else hard), ", if it is started as this command was"


def _of_process(process: int, name: str) -> int | None:
    """The soft limit of a process; None where it cannot be read."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/limits").read_text().splitlines():
            if line.startswith(name):
                soft = line.removeprefix(name).split()[0]
                return UNLIMITED if soft == "unlimited" else int(soft)
    return None


def _count(limit: int) -> str:
    return "unlimited" if limit >= UNLIMITED else str(limit)


def _meminfo() -> dict[str, int]:
    """/proc/meminfo, octets."""
    with contextlib.suppress(OSError, ValueError):
        rows = [line.split() for line in _MEMINFO.read_text().splitlines()]
        return {words[0].rstrip(":"): int(words[1]) * 1024 for words in rows if len(words) == 3}
    return {}


def _strict() -> bool:
    """Whether the kernel promises no more memory than there is (vm.overcommit_memory = 2)."""
    with contextlib.suppress(OSError):
        return _OVERCOMMIT.read_text().strip() == "2"
    return False
