"""DKIM signatures of our own mail, and the verification of others'."""

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, field_validator

from relaymta.config.values import Duration, Reload, Table, in_dns

__all__ = ["Dkim", "Verify"]


class Dkim(Table):
    """A DKIM key that signs mail of clients that may relay. `[[dkim]]`, repeatable; every key that matches signs. Files are read
    again when they change."""

    domain: Reload[str] = Field(description="the signing domain: d=")
    selector: Reload[str] = Field(description="selector of its DNS record: s=")
    key: Reload[str] = Field(description="PEM file of the private key, RSA or Ed25519 (`relaymta dkim keygen`)")
    authors: Reload[list[str]] = Field(
        [], description='domains in From: whose mail it signs, ".example" for subdomains, "*" for all; empty: the signing domain'
    )
    application: Reload[list[str]] = Field([], description="applications whose mail it signs; empty: all")
    canonicalization: Reload[Literal["relaxed/relaxed", "relaxed/simple", "simple/relaxed", "simple/simple"]] = Field(
        "relaxed/relaxed", description="header/body canonicalization: c="
    )
    signed: Reload[list[str]] = Field([], description="header fields to sign in addition to the usual ones")
    oversigned: Reload[list[str]] = Field(
        [], description="header fields that must not be added later; empty: From, To, Subject, Date and similar ones"
    )
    expires: Reload[Duration] = Field(0, description="validity of a signature (x=); 0: it does not expire")

    @field_validator("domain", "selector")
    @classmethod
    def _is_domain(cls, name: str) -> str:
        return in_dns(name)

    @field_validator("authors")
    @classmethod
    def _are_domains(cls, names: list[str]) -> list[str]:
        return [name if name == "*" else "." * name.startswith(".") + in_dns(name.removeprefix(".")) for name in names]

    @field_validator("signed", "oversigned")
    @classmethod
    def _are_fields(cls, names: list[str]) -> list[str]:
        wrong = next((name for name in names if not re.fullmatch(r"[!-9<-~]+", name)), None)  # `;` would end h=
        if wrong is not None:
            raise ValueError(f"{wrong!r} is not the name of a header field")
        return [name.lower() for name in names]

    def problems(self) -> Iterator[tuple[str, str]]:
        if "dkim-signature" in self.oversigned:
            yield "oversigned", "DKIM-Signature: each further signature, also one of ours, adds one"

    def signs_for(self, application: str) -> bool:
        """Whether this key signs mail of an application, apart from its author."""
        return not self.application or application in self.application

    def signs(self, author: str) -> bool:
        """Whether this key signs mail of an author's domain, given in A-labels and lower case; "": the author has no domain."""
        return any(
            own in ("*", author) or (own.startswith(".") and author.endswith(own)) for own in self.authors or [self.domain]
        )


class Verify(Table):
    """SPF, DKIM and DMARC checks of mail from unauthenticated clients. `[verify]`"""

    results: Reload[bool] = Field(False, description="check, and add the results as Authentication-Results: (RFC 8601)")
    dmarc: Reload[Literal["report", "enforce"]] = Field(
        "report",
        description="report: only add the result; enforce: if DMARC fails, reject where the author's domain has p=reject, hold "
        "where it has p=quarantine",
    )
    no_author: Reload[Literal["accept", "reject"]] = Field(
        "accept", description="mail without From:, or without an address in it (also where results = false)"
    )
