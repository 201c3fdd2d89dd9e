"""The queue, and how mail is sent."""

from pydantic import Field

from relaymta.config.values import Duration, Nameserver, Reload, Size, Table

__all__ = ["Delivery", "QuarantineTable", "QueueTable"]


class QueueTable(Table):
    """The queue. `[queue]`"""

    max_age: Reload[Duration] = Field(5 * 86400, gt=0, description="age at which a message expires; set when it is accepted")
    window: Reload[int] = Field(10_000, ge=100, description="messages kept in memory for delivery, for each worker")
    window_bytes: Reload[Size] = Field(32 << 20, description="message data kept in memory for delivery, for each worker")


class QuarantineTable(Table):
    """What filters, rules about mail and DMARC hold. `[quarantine]`"""

    keep: Reload[Duration] = Field(30 * 86400, ge=60, description="for how long; then it is deleted, without a DSN")
    octets: Reload[Size] = Field(1 << 30, gt=0, description="what all of it may take; beyond that the oldest is deleted")


class Delivery(Table):
    """How mail is sent. `[delivery]`"""

    first_retry: Reload[Duration] = Field(
        60, gt=0, description="delay after the first attempt; then 2, 5, 10, 20, 40, 60 times as long, with 15 % jitter"
    )
    connections: Reload[int] = Field(500, ge=1, description="concurrent outgoing connections, of all workers together")
    connect_timeout: Reload[Duration] = Field(30, gt=0, description="time to wait for a connection")
    patience: Reload[float] = Field(
        1,
        ge=0.01,
        le=10,
        description="factor for RFC 5321's timeouts (4.5.3.2: MAIL, RCPT 300 s, DATA 120, data block 180, final dot 600)",
    )
    idle: Reload[Duration] = Field(5, description="time after which an idle connection is closed")
    port: Reload[int] = Field(25, ge=1, le=65535, description="port of MX hosts")
    nameservers: Reload[list[Nameserver]] = Field([], description="DNS servers as address[:port]; empty: the system's")
