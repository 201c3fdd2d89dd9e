"""What `relaymta doctor` checks of this program and the clock."""

import ctypes
import os
import platform
import struct
import sys
import sysconfig
import time
from pathlib import Path

import relaymta
from relaymta.cli.doctor_scene import Row, Scene

__all__ = ["clock", "interpreter", "kernels"]

DISTRIBUTION = "/usr/bin/"  # where the distribution's interpreters are: all that are known to us are built with optimisation
DATED = (relaymta.__file__, "/etc/os-release", "/var/lib/dpkg/status", "/var/log/wtmp")  # files that were written before now
DAY = 86_400
AHEAD = 300  # seconds by which the spool may have been changed in the future
STA_UNSYNC = 0x40
# struct timex (adjtimex(2)): modes, offset, freq, maxerror, esterror, status.
_TIMEX = struct.Struct("@Illlli")
_TIMEX_OCTETS = 256  # more than all of it


def interpreter(scene: Scene) -> list[Row]:
    """Which interpreter runs, and whether it was built with profile-guided optimisation."""
    path = os.path.realpath(sys.executable)
    what = f"{platform.python_implementation()} {platform.python_version()}, {path}"
    if path.startswith(DISTRIBUTION) or "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or ""):
        return [("interpreter", "ok", what)]
    cure = "that of the distribution is faster (`make clean build PYTHON=/usr/bin/python3`)"
    return [("interpreter", "warning", f"{what}, was built without profile-guided optimisation: {cure}")]


def kernels(scene: Scene) -> list[Row]:
    """Whether the compiled kernels are used: a program without them does not even start (`_speedups`), unless it is told to."""
    if os.environ.get("RELAYMTA_INTERPRETED") == "1":
        return [("kernels", "wrong", "interpreted, many times slower: unset RELAYMTA_INTERPRETED")]
    return [("kernels", "ok", "compiled")]


def clock(scene: Scene) -> list[Row]:
    """Whether the kernel's clock is kept by NTP, and what files say about it: those that are older than now, and the spool."""
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(now))
    before = max((when for when in map(_changed, DATED) if when), default=0.0)
    cure = "set it, and have it kept (`timedatectl set-ntp true`, or chrony)"
    if now < before - DAY:
        then = time.strftime("%Y-%m-%d", time.gmtime(before))
        return [("clock", "wrong", f"{shown}, but this machine has files of {then}: {cure}")]
    ahead = max((when for when in map(_changed, _of_spool(scene)) if when), default=0.0) - now
    if ahead > AHEAD:
        return [("clock", "wrong", f"{shown}, {ahead:.0f} s before the last change of the spool: it was set back; {cure}")]
    try:
        kept = _is_kept()
    except OSError as error:
        where = "as in many containers: see on the host (`timedatectl`)"
        return [("clock", "ok", f"{shown}; whether NTP keeps it cannot be asked here ({error.strerror}), {where}")]
    if not kept:
        why = "mail gets wrong dates, and logins by token and DKIM signatures may be refused"
        return [("clock", "warning", f"{shown}, not kept by NTP: {why}; run `timedatectl set-ntp true`, or chrony")]
    return [("clock", "ok", f"{shown}, kept by NTP")]


def _changed(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _of_spool(scene: Scene) -> list[str]:
    """What is in the spool, as far as we may look."""
    spool = Path(scene.config.spool)
    try:
        return [entry.path for folder in (spool, *spool.glob("shard-*")) for entry in os.scandir(folder)]
    except OSError:
        return []


def _is_kept() -> bool:
    """Whether the kernel takes its clock for synchronised (STA_UNSYNC is not set). OSError where it may not be asked."""
    timex = ctypes.create_string_buffer(_TIMEX_OCTETS)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.adjtimex(timex) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    status: int = _TIMEX.unpack_from(timex.raw)[-1]
    return not status & STA_UNSYNC
