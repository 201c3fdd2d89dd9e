"""The table of the API: a row for each operation. The handlers, the description (openapi.py), the page's rights and the tests go
by it. A new operation is a row here, and its models."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

from relaymta.admin.tokens import SCOPES
from relaymta.api import models as m
from relaymta.api import verbs as v

__all__ = ["PREFIX", "ROUTES", "Route"]

PREFIX = "/api/v1"


class Route(NamedTuple):
    """An operation. `path`: below PREFIX, `{name}` in it is an argument; `run(peer, arguments)`: the answer; `lines`: the answer
    as lines of JSON, for a client that accepts them; `octets`: the answer is message data; `outside`: as `run`, which leaves the
    quarantine as it is."""

    name: str
    method: str
    path: str
    scope: str
    arguments: type
    answer: type
    run: Callable[[Any, Any], Any]
    lines: Callable[[Any, Any], Any] | None = None
    octets: bool = False
    outside: Callable[[Any, Any], Any] | None = None

    @property
    def changes(self) -> bool:
        """Whether it may change something."""
        return self.method != "GET"

    def within(self, scopes: Collection[str]) -> Callable[[Any, Any], Any]:
        """What to run for who has these scopes, `scope` among them."""
        return self.run if self.outside is None or "quarantine:write" in scopes else self.outside


def _queue(name: str, model: type = m.Change) -> Route:
    return Route(
        f"queue_{name}", "POST", f"/queue/{name}", "queue:write", model, m.Changed, v.verb(name), outside=v.verb(name, True)
    )  # fmt: skip


ROUTES: dict[str, Route] = {
    row.name: row
    for row in (
        Route("status", "GET", "/status", "metrics:read", m.Nothing, m.Status, v.status),
        Route("readiness", "GET", "/readiness", "metrics:read", m.Nothing, m.Readiness, v.readiness),
        Route("readings", "GET", "/readings", "metrics:read", m.Nothing, m.Readings, v.readings),
        Route("filters", "GET", "/filters", "metrics:read", m.Nothing, m.Rows, v.filters),
        Route("rules", "GET", "/rules", "metrics:read", m.Nothing, m.Rows, v.rules),
        Route("reload", "POST", "/reload", "config:write", m.Nothing, m.Reloaded, v.reload),
        Route("queues", "GET", "/queues", "queue:read", m.Nothing, m.Queues, v.queues),
        Route("ages", "GET", "/queues/ages", "queue:read", m.Nothing, m.Ages, v.ages),
        Route("messages", "GET", "/messages", "queue:read", m.List, m.Messages, v.messages, lines=v.lines),
        Route("find", "GET", "/messages/find", "queue:read", m.Find, m.Found, v.find),
        Route("message", "GET", "/messages/{id}", "queue:read", m.OfMessage, m.Message, v.message),
        Route("explain", "GET", "/messages/{id}/explain", "queue:read", m.OfMessage, m.Explanation, v.explain),
        Route("history", "GET", "/messages/{id}/history", "queue:read", m.OfMessage, m.History, v.history),
        Route("header", "GET", "/messages/{id}/header", "message:read", m.OfMessage, m.Header, v.header),
        Route("raw", "GET", "/messages/{id}/raw", "message:read", m.OfMessage, bytes, v.raw, octets=True),
        _queue("flush"),
        _queue("hold"),
        _queue("release"),
        _queue("delete"),
        _queue("bounce", m.Bounce),
        Route(
            "queue_reroute", "POST", "/queue/reroute", "queue:write", m.Reroute, m.Changed, v.reroute,
            outside=partial(v.reroute, outside=True),
        ),
        Route("quarantine", "GET", "/quarantine", "quarantine:read", m.Quarantine, m.Messages, v.quarantine, lines=v.lines),
        Route(
            "quarantine_release", "POST", "/quarantine/release", "quarantine:write", m.QuarantineRelease, m.Changed,
            v.quarantine_verb("release"),
        ),
        Route(
            "quarantine_delete", "POST", "/quarantine/delete", "quarantine:write", m.QuarantineChange, m.Changed,
            v.quarantine_verb("delete"),
        ),
        Route("sites", "GET", "/sites", "site:read", m.Nothing, m.Sites, v.sites),
        Route("site", "GET", "/sites/{name}", "site:read", m.OfSite, m.Sites, v.site),
        Route("site_suspend", "POST", "/sites/suspend", "site:write", m.Suspend, m.Suspended, v.suspend),
        Route("site_resume", "POST", "/sites/resume", "site:write", m.Resume, m.Cleared, v.resume),
        Route("decisions", "GET", "/decisions", "site:read", m.Nothing, m.Decisions, v.decisions),
        Route("decision_clear", "POST", "/decisions/clear", "site:write", m.Clear, m.Cleared, v.clear),
        Route("policies", "GET", "/policies", "policy:read", m.Nothing, m.Policies, v.policies),
        Route(
            "policy_set", "POST", "/policies", "policy:write", m.PolicySet, m.Changed, v.policy_set,
            outside=partial(v.policy_set, outside=True),
        ),
        Route("policy_end", "POST", "/policies/remove", "policy:write", m.PolicyEnd, m.Cleared, v.policy_end),
        Route(
            "suppressions", "GET", "/suppressions", "suppression:read", m.SuppressionsQuery, m.Suppressions, v.suppressions,
            lines=v.suppression_lines,
        ),
        Route(
            "suppression_counts", "GET", "/suppressions/stats", "suppression:read", m.Nothing, m.SuppressionCounts,
            v.suppression_counts,
        ),
        Route(
            "suppressions_of", "GET", "/suppressions/{address}", "suppression:read", m.SuppressionsOf, m.Suppressions,
            v.suppressions_of,
        ),
        Route(
            "suppression_add", "POST", "/suppressions", "suppression:write", m.SuppressionAdd, m.SuppressionAdded,
            v.suppression_add,
        ),
        Route(
            "suppression_remove", "POST", "/suppressions/remove", "suppression:write", m.SuppressionRemove, m.Cleared,
            v.suppression_remove,
        ),
        Route("abuse", "GET", "/abuse", "abuse:read", m.Nothing, m.Abuses, v.abuse),
        Route("abuse_why", "GET", "/abuse/why", "abuse:read", m.Account, m.Rows, v.abuse_why),
        Route("abuse_clear", "POST", "/abuse/clear", "abuse:write", m.AbuseClear, m.Cleared, v.abuse_clear),
    )
}  # fmt: skip

assert {row.scope for row in ROUTES.values()} == set(SCOPES)
