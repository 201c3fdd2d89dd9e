"""What the machine gives and what operators see of it: limits, metrics, the control socket, the log."""

from typing import Literal

from pydantic import Field

from relaymta.config.values import Address, Domain, Quota, Reload, Restart, Size, Table

__all__ = ["Control", "LimitsTable", "Local", "Log", "Metrics"]


class LimitsTable(Table):
    """Limits. `[limits]`"""

    message_size: Reload[Size] = Field(50 << 20, gt=0, description="maximum size of a message (octets)")
    connections: Reload[int] = Field(20_000, ge=1, description="concurrent incoming connections, of all workers together")
    memory: Reload[Size] = Field(
        0, description="memory of all workers together: above 80 % no message data is kept in memory, above 95 % mail is "
        "temporarily rejected; 0: the limit of the cgroup, and of each above it",
    )  # fmt: skip
    connections_per_client: Reload[int] = Field(
        50,
        ge=1,
        description="concurrent connections from one address (IPv6: one /64, as in all limits by address); relay networks: at "
        "least 200",
    )
    sessions_per_user: Reload[int] = Field(100, ge=1, description="concurrent IMAP sessions of one user")
    connection_rate: Reload[Quota] = Field(
        "", description='rate of new connections from one address, such as "60/m"; empty: unlimited'
    )
    message_rate: Reload[Quota] = Field("", description="rate of messages from one address; empty: unlimited")
    recipient_rate: Reload[Quota] = Field("", description="rate of recipients from one address; empty: unlimited")


class Metrics(Table):
    """Prometheus metrics. `[metrics]`"""

    listen: Restart[Address | Literal["off"]] = Field("127.0.0.1:9125", description='host:port of /metrics, or "off"')


class Control(Table):
    """The socket of the command line. `[control]`"""

    socket: Restart[str] = Field("", description="path; default: control.sock in the spool")
    group: Restart[str] = Field(
        "", description="group whose members may use the command line, too; empty: that of the relay's user; docs/privileges.md"
    )


class Local(Table):
    """Mail of the programs and users of this machine, by sendmail(1). `[local]`"""

    socket: Restart[str] = Field(
        "", description='path of the socket of sendmail(1), "off" for none; default: sendmail.sock beside the control socket. '
        "Every user may open it: the system says which one does; docs/sendmail.md",
    )  # fmt: skip
    drop: Reload[str] = Field(
        "/var/spool/relaymta/drop", description="folder from which mail is taken that sendmail(1) could not hand over, if it is "
        'there and belongs to the relay\'s user; "off": none',
    )  # fmt: skip
    pickup: Reload[str] = Field(
        "", description="folder from which files NAME.eml are taken, each a message; empty: none. Who may write there may send"
    )
    aliases: Reload[str] = Field(
        "", description="file of aliases, such as /etc/aliases, for addresses at `hostname` and in `alias_domains`, and for "
        "names without a domain in mail by sendmail(1); empty: none. It is read again when it changes, or a file that it "
        "includes. Programs and files as targets are refused; docs/sendmail.md",
    )  # fmt: skip
    alias_domains: Reload[list[Domain]] = Field([], description="other domains for whose addresses they hold")
    application: Restart[str] = Field("", description="application of this mail, as routes, limits and log records name it")


class Log(Table):
    """The log. `[log]`"""

    file: Restart[str] = Field("-", description='path, "-" for standard error')
    format: Restart[Literal["json", "postfix"]] = Field(
        "json", description="json: one object a line; postfix: the lines that pflogsumm and fail2ban read; docs/log.md"
    )
    history: Restart[Size] = Field(
        256 << 20,
        description="octets of the history that `message history` shows, of all workers together; 0: off. Where mail is kept in "
        "mailboxes, a quarter as much again for `mailbox history`",
    )
