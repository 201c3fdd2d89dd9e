"""Staging: all mail of a test system is redirected to one address; a header field lists the original recipients."""

from relaymta.proto.address import comparable, compared

__all__ = ["Redirection"]

LISTED = 20  # recipients named in the banner


class Redirection:
    """`redirect`: the address that replaces recipients; `allow`: addresses and domains, those with or without "@", that are not
    replaced."""

    def __init__(self, redirect: str, allow: list[str]) -> None:
        self.redirect = redirect
        domains = ("@" + entry if "@" not in entry else entry for entry in allow)
        self._allow = set(map(comparable, (*domains, redirect)))

    def allows(self, recipient: str) -> bool:
        """Whether mail to a recipient is not redirected."""
        address = compared(recipient)
        return address in self._allow or "@" + address.rpartition("@")[2] in self._allow

    def recipients(self, wanted: list[str]) -> list[str]:
        """The recipients of a message for `wanted`: redirected, without duplicates."""
        return list(dict.fromkeys(address if self.allows(address) else self.redirect for address in wanted))

    def banner(self, wanted: list[str]) -> bytes:
        """The header field X-Staging-Recipients with the replaced recipients; empty when none was replaced."""
        replaced = [address for address in wanted if not self.allows(address)]
        if not replaced:
            return b""
        more = f" and {len(replaced) - LISTED} more" if len(replaced) > LISTED else ""
        names = ",\r\n\t".join(f"<{address}>" for address in replaced[:LISTED])
        return f"X-Staging-Recipients: {names}{more}\r\n".encode()
