"""Outbound abuse: when mail of an account is not like its own any more (`[[abuse]]`)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from relaymta.config.values import Duration, Name, Reload, Table

__all__ = ["FLOORS", "Abuse"]

Watch = Literal["volume", "spread", "failures", "network", "rule"]

FLOORS = {"volume": 200, "spread": 50, "failures": 50, "network": 50, "rule": 1}  # where `floor` is not given


class Abuse(Table):
    """A look at what each account sends: who logs in, and each application, by itself. `[[abuse]]`, repeatable.
    docs/abuse.md."""

    name: Reload[Name] = Field(description="its name in log, metrics, the quarantine and on the command line")
    watch: Reload[Watch] = Field(
        description='"volume": recipients within an hour; "spread": domains of recipients within a clock hour; "failures": the '
        'share of its last 200 recipients that failed for good; "network": recipients within an hour from networks that it has '
        'not used before yesterday; "rule": messages within an hour that match the [[mail_rule]] `rule`',
    )  # fmt: skip
    floor: Reload[int] = Field(
        0, ge=0, description="below this nothing is said: recipients, domains or messages within the hour, failures: of the "
        "last recipients; 0: 200, spread, failures and network 50, rule 1",
    )  # fmt: skip
    factor: Reload[float] = Field(
        5.0, ge=1, le=1000, description="volume, spread: so many times as in its own busiest hour of the last 7 days"
    )
    share: Reload[float] = Field(0.1, gt=0, le=1, description="failures: more than this share")
    rule: Reload[str] = Field("", description="rule: the name of a [[mail_rule]], which need not be enforced")
    user: Reload[list[str]] = Field([], description="only these users; with `application` empty, too: all accounts")
    application: Reload[list[str]] = Field([], description="only these applications")
    verdict: Reload[Literal["hold", "suspend"]] = Field(
        "hold", description="hold: what comes from it is put into the quarantine; suspend: its mail, also what is queued, waits, "
        "and goes on at the end",
    )  # fmt: skip
    lasts: Reload[Duration] = Field(86400, ge=60, le=365 * 86400, description="for how long, or until `relaymta abuse clear`")
    enforce: Reload[bool] = Field(False, description="false: it is logged and counted, and nothing is done")

    def problems(self) -> Iterator[tuple[str, str]]:
        for key, belongs in (("factor", ("volume", "spread")), ("share", ("failures",)), ("rule", ("rule",))):
            if getattr(self, key) != type(self).model_fields[key].get_default() and self.watch not in belongs:
                yield key, f'has no meaning with watch = "{self.watch}": leave it out'
        if self.watch == "rule" and not self.rule:
            yield "rule", "is empty: give the name of a [[mail_rule]]"

    @property
    def least(self) -> int:
        """`floor`, or what stands for it."""
        return self.floor or FLOORS[self.watch]

    def is_about(self, account: str) -> bool:
        """Whether it looks at an account: "user=NAME" or "application=NAME"."""
        kind, _, name = account.partition("=")
        return not (self.user or self.application) or name in (self.user if kind == "user" else self.application)
