"""Staging: a test system's mail goes to one address, whatever recipients it names, and says for whom it was."""

__all__ = ["Redirection"]

LISTED = 20  # recipients named in the banner


class Redirection:
    """Where mail goes instead. `redirect`: the address; `allow`: addresses and "@domain"s that are left alone."""

    def __init__(self, redirect: str, allow: list[str]) -> None:
        self.redirect = redirect
        self._allow = {pattern.lower() for pattern in (*allow, redirect)}

    def allows(self, recipient: str) -> bool:
        """Whether a recipient may get mail."""
        lower = recipient.lower()
        return lower in self._allow or "@" + lower.rpartition("@")[2] in self._allow

    def recipients(self, wanted: list[str]) -> list[str]:
        """The recipients of a message that names `wanted`."""
        return list(dict.fromkeys(address if self.allows(address) else self.redirect for address in wanted))

    def banner(self, wanted: list[str]) -> bytes:
        """The header field that says who would have got it; empty when nobody was replaced."""
        replaced = [address for address in wanted if not self.allows(address)]
        if not replaced:
            return b""
        more = f" and {len(replaced) - LISTED} more" if len(replaced) > LISTED else ""
        names = ",\r\n\t".join(f"<{address}>" for address in replaced[:LISTED])
        return f"X-Staging-Recipients: {names}{more}\r\n".encode()
