"""Lists of restrictions of smtpd(8): smtpd_relay_restrictions and the like, and whom they let pass."""

from typing import Literal, NamedTuple

from relaymta.cli.postfix.lines import Origin
from relaymta.cli.postfix.main_cf import Scope

__all__ = ["LISTS", "Access", "Restriction", "Restrictions"]

# In the order of the dialogue; a message has to pass all of them.
LISTS = ("client", "helo", "sender", "relay", "recipient", "data", "end_of_data")

# Restrictions that take a word behind them.
_WITH_WORD = (
    "check_", "reject_rbl_client", "reject_rhsbl_", "permit_dnswl_client", "permit_rhswl_client", "reject_maps_rbl", "sleep",
)  # fmt: skip
Whose = Literal["network", "login", "anybody"]
_PERMITS: dict[str, Whose] = {"permit_mynetworks": "network", "permit_sasl_authenticated": "login"}


class Restriction(NamedTuple):
    """A member of a list. `argument`: the word behind it, "" for none; `warned`: it is only logged (warn_if_reject)."""

    name: str
    argument: str
    origin: Origin
    warned: bool = False


class Restrictions(NamedTuple):
    """A list, in its order; restriction classes are replaced by what they stand for."""

    name: str
    members: list[Restriction]

    @classmethod
    def read(cls, scope: Scope, name: str) -> "Restrictions":
        """The list of this name."""
        return cls(name, _read(scope, name, set(scope.words("smtpd_restriction_classes"))))

    def place_of(self, *names: str) -> int:
        """Where the first of some restrictions is; the length of the list where none is in it."""
        found = (at for at, one in enumerate(self.members) if one.name in names and not one.warned)
        return next(found, len(self.members))

    def let_pass(self, whose: Whose, elsewhere: bool) -> bool:
        """Whether mail passes. `whose`: its client is in mynetworks, has logged in, or neither; `elsewhere`: it is for a domain
        that is none of Postfix's. Tables and services that are asked count as if they said nothing."""
        for one in self.members:
            if (
                one.name == "permit"
                or _PERMITS.get(one.name) == whose
                or (one.name == "permit_auth_destination" and not elsewhere)
            ):
                return True
            refuses = one.name in ("reject", "defer") or (one.name.endswith("_unauth_destination") and elsewhere)
            if refuses and not one.warned:
                return False
        return True


class Access:
    """What the lists of a service let clients do."""

    def __init__(self, scope: Scope) -> None:
        self._lists = [Restrictions.read(scope, f"smtpd_{name}_restrictions") for name in LISTS]

    def relays(self, whose: Whose) -> bool:
        """Whether a client may send to any domain."""
        return all(one.let_pass(whose, elsewhere=True) for one in self._lists)

    def takes(self, whose: Whose) -> bool:
        """Whether a client may send to Postfix's own domains."""
        return all(one.let_pass(whose, elsewhere=False) for one in self._lists)

    @property
    def need_login(self) -> bool:
        """Whether who has not logged in is refused, wherever the client is."""
        return self.takes("login") and not self.takes("network") and not self.takes("anybody")

    def refusing(self, whose: Whose, elsewhere: bool = False) -> str:
        """The name of the first list that does not let a client pass; where all do, of that about relaying."""
        refusing = (one.name for one in self._lists if not one.let_pass(whose, elsewhere))
        return next(refusing, "smtpd_relay_restrictions")


def _read(scope: Scope, name: str, classes: set[str]) -> list[Restriction]:
    """The members of a list. `classes`: names that stand for others; in one list each is read once, since it would say the same
    again."""
    found, words, at, warned = list[Restriction](), scope.words(name), 0, False
    while at < len(words):
        word, argument = words[at], ""
        at += 1
        if word == "warn_if_reject":
            warned = True
            continue
        if word in classes:
            classes.discard(word)
            found += (one._replace(warned=one.warned or warned) for one in _read(scope, word, classes))
            warned = False
            continue
        if word.startswith(_WITH_WORD) and at < len(words):
            argument, at = words[at], at + 1
        elif ":" in word and not word.startswith("["):
            word, argument = "check_access", word
        found.append(Restriction(word.lower(), argument, scope.origin(name, argument or word), warned))
        warned = False
    return found
