"""Spans for an OpenTelemetry collector."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from pydantic import Field

from relaymta.config.values import Duration, Restart, Table, hook_url
from relaymta.proto.otlp import read_header

__all__ = ["Tracing"]

SECRET = ("authorization", "proxy-authorization", "cookie")


class Tracing(Table):
    """Spans of messages for an OpenTelemetry collector; docs/tracing.md. `[tracing]`"""

    endpoint: Restart[str] = Field(
        "",
        description='URL to which spans are posted (OTLP/HTTP), such as "http://127.0.0.1:4318/v1/traces"; empty: none are made',
    )
    ratio: Restart[float] = Field(
        0.0,
        ge=0,
        le=1,
        description="how many of the messages without a traceparent have a trace: 0.01 is one in a hundred, 1 all",
    )
    unsampled: Restart[bool] = Field(
        False, description="messages whose traceparent says that its trace is not recorded have spans, too"
    )
    addresses: Restart[bool] = Field(
        False, description="spans have the addresses of senders and recipients, and the text of replies, which may quote them"
    )
    headers: Restart[list[str]] = Field([], description='header fields of requests, such as "X-Scope-OrgID: relay"')
    header_file: Restart[str] = Field(
        "", description='file with one more, which is secret, in one line: "Authorization: Bearer ..."'
    )
    gzip: Restart[bool] = Field(False, description="compress requests")
    timeout: Restart[Duration] = Field(
        10.0, gt=0, le=60, description="for the answer to a request; after it the request is repeated"
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        """As of all tables."""
        for text in self.headers:
            try:
                name, _ = read_header(text)
            except ValueError as error:
                yield "headers", str(error)
            else:
                if name.lower() in SECRET:
                    yield "headers", f"{name} is secret, and everybody who sees the configuration would see it: header_file"
        if not self.endpoint:
            for key in sorted(self.model_fields_set - {"endpoint"}):
                if getattr(self, key) != type(self).model_fields[key].default:
                    yield key, "has no effect without tracing.endpoint"
            return
        try:
            hook_url(self.endpoint)
        except ValueError as error:
            yield "endpoint", str(error).replace("secret_file shows the hook who asks", "credentials are in header_file")
        else:
            if urlsplit(self.endpoint).path in ("", "/"):
                yield "endpoint", f"{self.endpoint} has no path: {self.endpoint.rstrip('/')}/v1/traces, for most collectors"
