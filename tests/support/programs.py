"""External programs that tests need: missing, they skip a test on a user's machine and fail it on CI."""

import os
import shutil

import pytest

PACKAGES = {
    "chromium": "chromium",
    "unbound": "unbound",
    "smtp-source": "postfix",
    "smtp-sink": "postfix",
    "postconf": "postfix",
    "sendmail": "postfix",
    "swaks": "swaks",
    "strace": "strace",
    "promtool": "prometheus",
    "gcc": "gcc",
    "dovecot": "dovecot-core",
    "haproxy": "haproxy",
    "opendkim": "opendkim",
    "patch": "patch",
    "curl": "curl",
    "jq": "jq",
    "node": "nodejs",
    "php": "php-cli",
    "fetchmail": "fetchmail",
    "getmail": "getmail6",
    "doveadm": "dovecot-imapd",
    "mbsync": "isync",
    "mutt": "mutt",
    "offlineimap": "offlineimap3",
    "s-nail": "s-nail",
    "sieve-test": "dovecot-sieve",
    "clamd": "clamav-daemon",
    "amavisd": "amavisd-new",
    "debootstrap": "debootstrap",
    "pflogsumm": "pflogsumm",
    "fail2ban-regex": "fail2ban",
    "systemd-nspawn": "systemd-container",
    "systemd-analyze": "systemd",
    "podman": "podman crun",
    "unshare": "util-linux",
}


def need(program: str) -> str:
    """The program's path."""
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        reason = f"{program} is missing: apt-get install {PACKAGES.get(program, program)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found
