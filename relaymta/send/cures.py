"""What an operator can do about a failure, by its cause (proto.envelope.CATEGORIES)."""

from relaymta.config import Route

__all__ = ["cure", "cure_here"]

_CURES = {
    "refused": "start the program that should listen at {hosts}, or correct {where}",
    "timeout": "check the network and the firewalls on the way to {hosts}",
    "network": "check the network on the way to {hosts}, and what {hosts} logged",
    "dns": "correct the name in {where}, or the name servers (delivery.nameservers, else /etc/resolv.conf)",
    "tls": "see the reason; TLS with {hosts} is set by tls, ca_file and client_certificate of route {route}",
    "password": "check that {hosts} accepts {login}, and that the password is there: a variable is read when the relay starts, "
    "a file at each login; nothing is tried without one",
    "421": "wait: {hosts} asked for a pause; fewer connections or a rate in a [[site]] of its name avoid it",
    "policy": "ask who runs {hosts} why it refuses mail from this host (its reply says more), or use another route",
    "reply": "see the reply: who runs {hosts} can say more",
    "loop": "give route {route} another host: this one is the relay itself",
    "message": "use a host that accepts such messages: {hosts} does not",
    "local": "correct what the reason names; the log of the relay may say more",
}

_HERE = {  # by the enhanced status of a mailbox's reply
    "4.2.0": "wait: the mailbox is there again soon (`relaymta mailbox show` says more)",
    "4.2.2": "raise the quota (`relaymta mailbox quota`), or have the user delete mail",
    "4.2.4": "correct the alias (`relaymta mailbox alias`)",
    "4.3.0": "see the log of the relay: the disk with the mailboxes, or the worker that owns them",
    "4.3.1": "make room on the disk with the spool",
    "4.3.5": "restart the relay",
}


def cure_here(reply: str) -> str:
    """A sentence about a mailbox that has refused a message with this reply; "" where there is nothing to do."""
    words = reply.split()
    return _HERE.get(words[1], "") if len(words) > 1 else ""


def cure(category: str, route: Route, hosts: list[str]) -> str:
    """A sentence; "" where there is nothing to do."""
    named = ", ".join(hosts[:3]) + (" ..." if len(hosts) > 3 else "") or "the next hop"
    where = f"hosts of route {route.label}" if route.hosts else "the MX record of the domain"
    login = f"the login ({route.login})" if route.username else "the login"
    return _CURES.get(category, "").format(hosts=named, where=where, route=route.label, login=login)
