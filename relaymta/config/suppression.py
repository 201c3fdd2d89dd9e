"""Recipients to whom no mail is to be sent any more."""

from pydantic import Field

from relaymta.config.values import Duration, Reload, Table

__all__ = ["SuppressionTable"]


class SuppressionTable(Table):
    """Recipients who are refused at RCPT: the suppression list. `[suppression]` docs/suppression.md."""

    enabled: Reload[bool] = Field(False, description="refuse recipients who are in the list, from clients that may relay")
    hard_bounces: Reload[bool] = Field(
        True, description="add recipients by themselves whose host says that there is no such mailbox, or that it is disabled"
    )
    complaints: Reload[bool] = Field(True, description="add recipients by themselves who have complained")
    hard_bounce_expires: Reload[Duration] = Field(
        180 * 86400, le=36500 * 86400, description="for how long after a hard bounce; 0: for ever"
    )
    complaint_expires: Reload[Duration] = Field(0, le=36500 * 86400, description="for how long after a complaint; 0: for ever")
    entries: Reload[int] = Field(
        2_000_000, ge=1, le=20_000_000, description="how many there may be; further ones are not added, and mail goes on"
    )
    ignore_suppression: Reload[list[str]] = Field(
        [], description="applications whose mail is taken all the same, such as one that resets passwords"
    )

    @property
    def follows(self) -> bool:
        """Whether recipients are added by themselves, by what becomes of mail."""
        return self.enabled and (self.hard_bounces or self.complaints)
