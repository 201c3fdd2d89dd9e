"""Conditions on addresses, as routes have them, and addresses that stand for all that meet one."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from relaymta.proto.address import domain_of

__all__ = ["ANYBODY", "ANYWHERE", "SOMEBODY", "Condition", "above"]

SOMEBODY = "somebody-whom-nobody-names"
ANYWHERE = "any-domain.invalid"
ANYBODY = f"anybody@{ANYWHERE}"  # a sender whom nobody names
_BELOW = "any-sub-domain"
KINDS = ("address", "domain", "below", "any")  # the special ones first


class Condition(NamedTuple):
    """Whose addresses: `kind` says what `value` is. below: any domain below this one, and not this one itself; any: all."""

    kind: Literal["address", "domain", "below", "any"]
    value: str = ""

    @property
    def rank(self) -> tuple[int, int]:
        """Special conditions are before general ones; those of one rank exclude each other."""
        return KINDS.index(self.kind), -self.value.count(".") if self.kind == "below" else 0

    @property
    def domain(self) -> str:
        """The domain that it is about."""
        return domain_of(self.value) if self.kind == "address" else self.value

    @property
    def sample(self) -> str:
        """An address that meets it, and none that is more special."""
        if self.kind == "address":
            return self.value
        domains = {"domain": self.value, "below": f"{_BELOW}.{self.value}", "any": ANYWHERE}
        return f"{SOMEBODY}@{domains[self.kind]}"

    @property
    def pattern(self) -> str:
        """It as a list of domains or addresses has it: ".example" for what is below."""
        return f".{self.value}" if self.kind == "below" else self.value

    def __str__(self) -> str:
        return self.pattern or ("all other mail" if self.kind == "any" else "<>")


def above(condition: Condition) -> Iterator[Condition]:
    """The more general conditions that all of this one's addresses meet, as routes understand them, the special ones first:
    ".example" is met by "example", too."""
    if condition.kind == "any":
        return
    if condition.kind == "address" and condition.value:
        yield Condition("domain", condition.domain)
    rest = condition.domain
    if condition.kind == "below":
        rest = rest.partition(".")[2]
    while rest:
        yield Condition("below", rest)
        rest = rest.partition(".")[2]
    yield Condition("any")
