"""Who may log in: the file of accounts, authentication back ends; and OAuth 2.0 for our own logins at smart hosts."""

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Literal

from pydantic import Field

from relaymta.config.values import Duration, Quota, Reload, Table, is_http, repeated

__all__ = ["Account", "AccountsFile", "AccountsTable", "OAuth", "Secret", "TokensTable"]

_HASH = re.compile(r"SCRAM-SHA-256\$\d{4,8}:[A-Za-z0-9+/=]+\$[A-Za-z0-9+/]{43}=:[A-Za-z0-9+/]{43}=\Z|\$argon2id\$\S+\Z")


class TokensTable(Table):
    """OAuth 2.0 bearer tokens that clients log in with (OAUTHBEARER, XOAUTH2). `[accounts.tokens]`"""

    issuer: Reload[str] = Field("", description="required issuer: the `iss` claim; needed with jwks")
    audience: Reload[str] = Field("", description="required audience: the `aud` claim; empty: not checked")
    jwks: Reload[str] = Field("", description="URL of the issuer's keys (JWK set), to verify tokens that are JWTs")
    introspection: Reload[str] = Field("", description="URL of an introspection endpoint (RFC 7662), instead of jwks")
    client_id: Reload[str] = Field("", description="our client id at the introspection endpoint")
    client_secret_file: Reload[str] = Field("", description="file with our client secret")
    user_claim: Reload[str] = Field("email", description="the claim with the user name")

    def problems(self) -> Iterator[tuple[str, str]]:
        for key, url in (("jwks", self.jwks), ("introspection", self.introspection)):
            if url and not is_http(url):
                yield key, f"{url!r} is not an http:// or https:// URL"
        if bool(self.jwks) == bool(self.introspection):
            yield "jwks", "give jwks or introspection"
        if self.jwks and not self.issuer:
            yield "jwks", "needs issuer: other issuers may use the same keys"


class AccountsTable(Table):
    """Authentication: the file of accounts and the back ends. `[accounts]`"""

    file: Reload[str] = Field("", description="file of accounts, edited by `relaymta user` and `relaymta app`")
    dovecot: Reload[str] = Field(
        "", description="auth-client socket of Dovecot: checks the passwords of users who are not in the file"
    )
    url: Reload[str] = Field(
        "", description="HTTP endpoint that checks the passwords of users who are not in the file; see docs/submission.md"
    )
    tokens: TokensTable | None = Field(None, description="bearer tokens")
    failures: Reload[int] = Field(
        10,
        ge=1,
        description="failed login attempts from one address (IPv6: /64; 8 times as many from a /48) or for one account, after "
        "which more are temporarily rejected",
    )
    failures_forgotten: Reload[Duration] = Field(60, description="time after which one failed attempt no longer counts")
    answer_after: Reload[Duration] = Field(1, description="delay from a failed login attempt to its reply, whatever the reason")
    remember: Reload[Duration] = Field(60, description="time for which a verified password is cached; 0: not cached")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.url and not is_http(self.url):
            yield "url", f"{self.url!r} is not an http:// or https:// URL"
        if self.url and self.dovecot:
            yield "url", "url and dovecot: give one of them"

    def __bool__(self) -> bool:
        return bool(self.file or self.dovecot or self.url or self.tokens)


class OAuth(Table):
    """OAuth 2.0 tokens for a smart host that requires them (Microsoft 365, Gmail). `[route.oauth]`"""

    token_url: Reload[str] = Field(description="the token endpoint")
    client_id: Reload[str] = Field(description="our client id")
    client_secret_file: Reload[str] = Field("", description="file with our client secret")
    refresh_token_file: Reload[str] = Field("", description="file with a refresh token; empty: use the grant client_credentials")
    scope: Reload[str] = Field("", description='for example "https://outlook.office365.com/.default"')


class Secret(Table):
    """A password or key of an account."""

    hash: str = Field(description="SCRAM-SHA-256$ITERATIONS:SALT$STORED-KEY:SERVER-KEY, or $argon2id$...")
    expires: datetime | None = Field(None, description="end of its validity; none: it does not expire")

    def problems(self) -> Iterator[tuple[str, str]]:
        if not _HASH.match(self.hash):
            yield "hash", "neither SCRAM-SHA-256$... nor $argon2id$...; `relaymta user add` makes one"
        if self.expires is not None and self.expires.tzinfo is None:
            yield "expires", 'give the offset, too, such as "Z" for UTC'


class Account(Table):
    """A person or an application that may log in. `[[account]]` in the file of accounts"""

    name: str = Field(description="the user name")
    secrets: list[Secret] = Field([], description="passwords and keys, each of which is accepted; none: login is not possible")
    application: str = Field("", description="application of its mail; empty: the listener's")
    priority: Literal["express", "normal", "bulk"] | None = Field(None, description="class of its mail")
    senders: list[str] = Field(
        [], description='addresses it may send as, in the envelope and in From: "a@example.com", "@example.com" for a domain, '
        '"@.example.com" for those below; empty: any',
    )  # fmt: skip

    messages: Quota = Field("", description='quota of messages, such as "60/m" or "10000/d"; empty: unlimited')
    recipients: Quota = Field("", description="quota of recipients")
    octets: Quota = Field("", description="quota of octets")
    over: Literal["reject", "hold"] = Field("reject", description="what happens beyond a quota: 452, or hold until released")
    connections: int = Field(0, ge=0, description="concurrent connections; 0: unlimited")

    def problems(self) -> Iterator[tuple[str, str]]:
        for sender in self.senders:
            if "@" not in sender:
                yield "senders", f'{sender!r} is neither an address nor "@domain"'


class AccountsFile(Table):
    """The file of accounts."""

    account: list[Account] = Field([], description="accounts")

    def problems(self) -> Iterator[tuple[str, str]]:
        for number, name in repeated([account.name for account in self.account]):
            yield f"account.{number}.name", f"two accounts are called {name!r}"
