"""The configuration: one typed schema, TOML files, command line options that override them, and all problems reported at once.

The type, bounds, default and description of a key, and whether a reload applies it, are in one line of the module of its area
and nowhere else: `config describe`, the reference file, the answer of `reload` and the error messages are made from them.

values.py types and the base of tables (names.py: our names); clients.py, accounts.py, signing.py, routes.py, delivery.py,
filters.py, webhooks.py, machine.py the tables; whole.py all of them, checks.py what they require of each other; loading.py the
files (merging.py what they say together, origin.py where each key is, sentences.py what is wrong with it); reloading.py what
changes at a reload; describing.py the reference.
"""

from relaymta.config.abuse import Abuse
from relaymta.config.accounts import Account, AccountsTable, OAuth, Secret, TokensTable
from relaymta.config.admin import Admin
from relaymta.config.checks import notes
from relaymta.config.clients import Application, Certificate, Intake, Listener, PeerNetwork, Relay
from relaymta.config.delivery import Delivery, QueueTable
from relaymta.config.describing import as_toml, describe, given, given_values, reference
from relaymta.config.filters import Filter, FiltersTable
from relaymta.config.loading import load, load_accounts
from relaymta.config.machine import Control, LimitsTable, Local, Log, Metrics
from relaymta.config.mail_rules import MailRule
from relaymta.config.mailboxes import Mailboxes
from relaymta.config.networks import everywhere
from relaymta.config.reloading import Change, merge
from relaymta.config.routes import Route, Rule, SiteTable, Source, Staging, header_condition
from relaymta.config.signing import Dkim, Verify
from relaymta.config.tracing import Tracing
from relaymta.config.values import check_each, near, parse_duration, parse_hostport, parse_quota
from relaymta.config.webhooks import Webhook, WebhooksTable
from relaymta.config.whole import Config

__all__ = [
    "Abuse", "Account", "AccountsTable", "Admin", "Application", "Certificate", "Change", "Config", "Control", "Delivery", "Dkim",
    "Filter", "FiltersTable", "Intake", "LimitsTable", "Listener", "Local", "Log", "MailRule", "Mailboxes", "Metrics", "OAuth",
    "PeerNetwork", "QueueTable", "Relay", "Route", "Rule", "Secret", "SiteTable", "Source", "Staging", "TokensTable",
    "Tracing", "Verify", "Webhook", "WebhooksTable",
    "as_toml", "check_each", "describe", "everywhere", "given", "given_values", "header_condition", "load",
    "load_accounts", "merge", "near", "notes", "parse_duration", "parse_hostport", "parse_quota", "reference",
]  # fmt: skip
