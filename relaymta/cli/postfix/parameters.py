"""What becomes of each parameter that is given: it is carried, has no meaning here, or is named with what to do instead."""

import re

from relaymta.cli.postfix.findings import Findings, Kind
from relaymta.cli.postfix.limits import CARRIED as SINGLE
from relaymta.cli.postfix.lines import Place
from relaymta.cli.postfix.main_cf import Scope, Setting, named_in
from relaymta.cli.postfix.master_cf import Service
from relaymta.cli.postfix.restrictions import LISTS, Restriction, Restrictions

__all__ = ["account_for"]

_LISTS = [f"smtpd_{name}_restrictions" for name in (*LISTS, "etrn")]
LONGEST = 120  # characters of a value that are shown
# Carried by the other modules, which name what they cannot carry of it.
CARRIED = {
    *SINGLE, "alias_maps", "canonical_maps", "content_filter", "default_destination_concurrency_limit", "default_transport",
    "disable_dns_lookups", "empty_address_default_transport_maps_lookup_key", "empty_address_relayhost_maps_lookup_key",
    "fallback_relay", "header_checks", "inet_interfaces", "inet_protocols", "lmtp_tcp_port", "local_recipient_maps",
    "local_transport",
    "mailbox_transport", "milter_default_action", "mydestination", "mydomain", "myhostname", "mynetworks",
    "mynetworks_style", "myorigin",
    "parent_domain_matches_subdomains", "postscreen_dnsbl_action", "postscreen_dnsbl_sites", "postscreen_dnsbl_threshold",
    "queue_directory", "receive_override_options", "recipient_canonical_maps", "recipient_delimiter", "relay_domains",
    "relay_recipient_maps", "relay_transport", "relayhost", "relocated_maps", "sender_dependent_default_transport_maps",
    "sender_dependent_relayhost_maps", "smtp_address_preference", "smtp_bind_address", "smtp_bind_address6",
    "smtp_discard_ehlo_keywords", "smtp_dns_support_level", "smtp_enforce_tls", "smtp_fallback_relay", "smtp_helo_name",
    "smtp_host_lookup", "smtp_sasl_auth_enable", "smtp_sasl_mechanism_filter", "smtp_sasl_password_maps",
    "smtp_send_xforward_command", "smtp_sender_dependent_authentication", "smtp_tcp_port", "smtp_tls_CAfile",
    "smtp_tls_cert_file", "smtp_tls_chain_files", "smtp_tls_enforce_peername", "smtp_tls_key_file", "smtp_tls_policy_maps",
    "smtp_tls_security_level", "smtp_tls_wrappermode", "smtp_use_tls", "smtpd_authorized_xclient_hosts",
    "smtpd_authorized_xforward_hosts", "smtpd_enforce_tls", "smtpd_milters", "smtpd_proxy_filter", "smtpd_restriction_classes",
    "smtpd_sasl_auth_enable", "smtpd_sasl_path", "smtpd_sasl_type", "smtpd_tls_cert_file", "smtpd_tls_chain_files",
    "smtpd_tls_eccert_file", "smtpd_tls_eckey_file", "smtpd_tls_key_file", "smtpd_tls_security_level",
    "smtpd_tls_wrappermode", "smtpd_upstream_proxy_protocol", "smtpd_use_tls", "tls_server_sni_maps", "transport_maps",
    "virtual_alias_domains", "virtual_alias_maps", "virtual_mailbox_domains", "virtual_mailbox_maps", "virtual_maps",
    "virtual_transport",
}  # fmt: skip
# What is read of the `-o` of a program. The others of CARRIED are read of main.cf alone.
_ROUTES = (
    "default_transport|local_transport|mailbox_transport|relay_transport|virtual_transport|transport_maps|relayhost|relocated_maps"
    "|sender_dependent_.*|mydestination|virtual_(alias|mailbox)_domains|relay_domains|parent_domain_matches_subdomains"
)
READ_OF = {
    "smtpd": re.compile(
        "content_filter|inet_.*|mynetworks|receive_override_options|smtpd_(milters|proxy_filter|upstream_proxy_protocol|use_tls)"
        "|smtpd_restriction_classes|smtpd_authorized_.*|smtpd_sasl_(auth_enable|path|type)|smtpd_enforce_tls"
        "|smtpd_tls_(security_level|wrappermode|chain_files|(ec)?(cert|key)_file)"
    ),
    "smtp": re.compile("(smtp|lmtp)_.*|inet_protocols|disable_dns_lookups|fallback_relay|default_destination_.*"),
    "trivial-rewrite": re.compile(_ROUTES),
}  # fmt: skip
READ_OF |= {"postscreen": READ_OF["smtpd"], "lmtp": READ_OF["smtp"]}
# Of a listener that a content filter gives mail back to: limits that there are none of, and checks that are not done again.
_NOT_THERE = re.compile("smtpd_.*_limit|smtpd_error_sleep_time|message_size_limit|(local|relay|virtual)_.*_maps|.*_checks")
# Nothing to carry: it is about Postfix's own files and processes, or has no meaning here.
NOTHING = {
    "address_verify_map", "alias_database", "allow_percent_hack", "append_at_myorigin", "biff", "broken_sasl_auth_clients",
    "cleanup_service_name", "command_directory", "compatibility_level", "config_directory", "daemon_directory", "data_directory",
    "debug_peer_level", "debug_peer_list", "debugger_command", "default_database_type", "disable_vrfy_command",
    "double_bounce_sender", "empty_address_recipient", "enable_long_queue_ids", "forward_path", "html_directory", "in_flow_delay",
    "inet_listen_backlog", "lmdb_map_size",  "mail_name", "mail_owner", "mail_spool_directory",
    "maillog_file_prefixes", "mailq_path", "manpage_directory", "max_idle", "max_use", "meta_directory",
    "milter_macro_daemon_name", "milter_macro_v", "milter_mail_macros", "milter_protocol", "multi_instance_directories",
    "multi_instance_enable", "multi_instance_group", "multi_instance_name", "multi_instance_wrapper", "newaliases_path",
    "openssl_path", "plaintext_reject_code", "postscreen_cache_map", "prepend_delivered_header",
    "proxy_interfaces", "proxy_read_maps", "queue_minfree", "queue_run_delay", "readme_directory", "sample_directory",
    "sendmail_path", "setgid_group", "shlib_directory", "show_user_unknown_table_name", "smtp_always_send_ehlo",
    "smtp_cname_overrides_servername", "smtp_connection_cache_on_demand", "smtp_quit_timeout", "smtp_sasl_security_options",
    "smtp_sasl_tls_security_options", "smtp_tls_loglevel", "smtp_tls_note_starttls_offer", "smtp_tls_session_cache_database",
    "smtp_tls_session_cache_timeout", "smtpd_banner", "smtpd_delay_reject", "smtpd_forbid_bare_newline",
    "smtpd_forbid_bare_newline_exclusions", "smtpd_forbid_unauth_pipelining", "smtpd_helo_required",
    "smtpd_log_access_permit_actions", "smtpd_reject_unlisted_recipient",
    "smtpd_sasl_authenticated_header", "smtpd_sasl_exceptions_networks", "smtpd_sasl_security_options",
    "smtpd_sasl_tls_security_options", "smtpd_soft_error_limit", "smtpd_tls_CAfile", "smtpd_tls_CApath",
    "smtpd_tls_always_issue_session_ids", "smtpd_tls_ask_ccert", "smtpd_tls_dh1024_param_file", "smtpd_tls_dh512_param_file",
    "smtpd_tls_eecdh_grade", "smtpd_tls_loglevel", "smtpd_tls_received_header", "smtpd_tls_session_cache_database",
    "smtpd_tls_session_cache_timeout", "smtputf8_enable", "stress", "swap_bangpath", "syslog_facility", "syslog_name",
    "tls_append_default_CA", "tls_preempt_cipherlist", "tls_random_source", "tls_ssl_options", "undisclosed_recipients_header",
    "unknown_address_reject_code", "unknown_client_reject_code", "unknown_hostname_reject_code",
    "unknown_local_recipient_reject_code", "unverified_recipient_reject_code", "unverified_recipient_reject_reason",
    "virtual_gid_maps", "virtual_mailbox_base", "virtual_minimum_uid", "virtual_uid_maps",
}  # fmt: skip
# Values that are so here anyway.
SAME = {
    "append_dot_mydomain": ("no",), "smtpd_tls_auth_only": ("yes",), "mailbox_size_limit": ("0",),
    "virtual_mailbox_limit": ("0",),
    "smtp_tls_CApath": ("/etc/ssl/certs", "/etc/ssl/certs/", "/etc/pki/tls/certs"), "always_add_missing_headers": ("no",),
    "smtpd_reject_unlisted_sender": ("no",), "default_destination_recipient_limit": ("50",),
    "strict_rfc821_envelopes": ("no",),
}  # fmt: skip
# What else is given: the beginning of a name, its kind, and what to do instead. The first that matches is used.
_HEADERS = "headers are not rewritten; rewrite_sender of a [[route]] replaces the sender of the envelope"
_TLS = "TLS is 1.2 or 1.3, with the ciphers of OpenSSL"
_MAILBOXES = "mail is filed in mailboxes of the relay; import what there is by `relaymta mailbox import`"
_COPIES = (
    "nothing adds copies by itself: a policy service (BCC), a milter or a hook may, which may change recipients (docs/filters.md)"
)
_UNLISTED = "senders are not looked up: `senders` of an account and [[mail_rule]] say who may send as whom"
_TIMEOUT = "give the [[filter]] a timeout"
INSTEAD: list[tuple[str, Kind, str]] = [
    ("always_bcc|sender_bcc_maps|recipient_bcc_maps", "way", _COPIES),
    ("smtp_generic_maps|sender_canonical_maps|masquerade_domains", "way", _HEADERS),
    ("sender_canonical|masquerade_|canonical_classes|recipient_canonical_classes", "gap", _HEADERS),
    ("append_dot_mydomain", "gap", "addresses are left as they are where their domain has no dot: clients give whole names"),
    ("local_header_rewrite_clients|always_add_missing_headers", "note", "submission = true of a listener adds Date and others"),
    ("(body|mime_header|nested_header|milter_header)_checks", "gap", "write [[mail_rule]] tables (docs/rules.md)"),
    ("smtp_.*_checks", "gap", "mail is sent as it came in: a milter or a hook removes fields (docs/filters.md)"),
    ("smtpd_sender_login_maps", "gap", "give each account its `senders` in the accounts file (docs/submission.md)"),
    ("smtpd_sasl_local_domain", "gap", "users log in by the name that the back end knows them by"),
    ("non_smtpd_milters", "note", "mail comes by SMTP alone; bounces are not filtered"),
    ("milter_.*_timeout", "gap", _TIMEOUT),
    ("milter_", "note", "milters get the macros that they ask for (docs/filters.md)"),
    ("maillog_file", "note", 'log.file names the log; log.format = "postfix" has the lines that Postfix writes'),
    ("smtpd_reject_unlisted_sender", "gap", _UNLISTED),
    ("bounce_queue_lifetime", "gap", "bounces wait as long as other mail: queue.max_age"),
    ("delay_warning_time", "gap", "senders are not warned while mail waits: watch the age of the queue (docs/queue.md)"),
    ("(minimal|maximal)_backoff_time", "gap", "attempts are 1, 2, 5, 10, 20, 40, 60 minutes apart; see delivery.first_retry"),
    (".*notify_classes|.*_notice_recipient", "gap", "nobody gets mail about errors: see the log, and alert rules in grafana/"),
    ("defer_transports", "way", "suspend the site or hold its mail: `relaymta site suspend`, `relaymta policy hold`"),
    ("default_process_limit", "gap", "limits.connections and delivery.connections limit connections"),
    ("(smtp|lmtp)_.*_timeout", "gap", "delivery.patience is the factor of all timeouts"),
    ("smtp_mx_", "gap", "two hosts are asked in one attempt, at ten addresses at most (docs/delivery.md)"),
    ("(smtp|smtpd|lmtp)_tls_(mandatory_)?(protocols|ciphers|exclude_ciphers)|(smtp|smtpd)_tls_mandatory_|tls_.*(cipherlist|curves)",
     "note", _TLS),
    ("smtp_tls_CApath", "gap", "name the file of the CA in ca_file of the [[route]]"),
    ("lmtp_tls_", "note", "TLS to LMTP hosts is offered as to others"),
    ("smtpd_tls_(req_ccert|ccert|fingerprint)|relay_clientcerts", "gap", "clients are known by login and network alone"),
    ("smtpd_tls_auth_only", "note", "AUTH is offered over TLS alone"),
    ("smtpd_discard_ehlo_keyword", "note", "what EHLO offers is not for clients to choose from"),
    ("mailbox_transport_maps|fallback_transport", "way", "mail of local users stays here: name the host that has it"),
    ("postscreen_upstream_proxy_protocol", "gap", "name your load balancers in `proxy` of the listener"),
    ("smtp_host_lookup", "gap", "hosts are looked up in the DNS, and in /etc/hosts where the system says so"),
    ("luser_relay", "gap", "make it the catch-all of the domain: `relaymta mailbox alias @DOMAIN ADDRESS`"),
    ("mailbox_size_limit|virtual_mailbox_limit", "gap", "mailboxes.quota is the quota of a user"),
    ("home_mailbox|mailbox_|fallback_transport|local_command_shell|allow_mail_to_|default_privs", "gap", _MAILBOXES),
    ("postscreen_access_list", "gap", "refuse clients by a [[filter]] or a firewall"),
    ("postscreen_", "note", "early talkers are refused; lists in the DNS are a [[filter]] of type dnsbl (docs/filters.md)"),
    ("smtpd_etrn|fast_flush_domains", "gap", "there is no ETRN: mail goes when the host is up, or by `relaymta queue flush`"),
    ("rbl_reply_maps|default_rbl_reply|maps_rbl_", "note", "filters.reply is the reply to what a filter refuses"),
    ("address_verify|unverified_", "gap", "recipients are not asked for at the next host: relay.recipients names the valid ones"),
    ("permit_mx_backup_networks", "way", "name the domains in relay.domains"),
    ("best_mx_transport", "way", "mail to an MX that is this host ends with 5.4.6: give the domain a [[route]]"),
    ("smtpd_command_filter|smtp_reply_filter|.*delivery_status_filter", "gap", "[[rule]] tables say what replies of hosts mean"),
    (".*_time_limit|smtpd_policy_service_", "note", "a [[filter]] has timeout and on_failure"),
    (".*_destination_recipient_limit", "gap", "a host gets at most 50 recipients in one transaction"),
    (".*_concurrency_", "gap", "connections of a [[route]] or a [[site]]"),
    ("smtpd_client_.*_limit|smtpd_per_|smtpd_min_data_rate", "gap", "limits are in [limits] and [intake]"),
    ("bounce_template_file|bounce_size_limit|internal_mail_filter_classes", "gap", "bounces have one form (docs/delivery.md)"),
    ("header_size_limit|header_address_token_limit", "note", "headers have the limits of docs/security.md"),
    ("(smtpd|smtp|cyrus)_sasl_", "gap", "logins: docs/submission.md, and docs/delivery.md for those at smart hosts"),
    ("strict_rfc821_envelopes|resolve_", "note", "addresses are read as in docs/submission.md"),
]  # fmt: skip
# Restrictions that hold here anyway, or are carried.
ALWAYS = {
    "check_policy_service", "defer", "defer_unauth_destination", "permit", "permit_auth_destination",
    "permit_mynetworks", "permit_sasl_authenticated", "reject", "reject_multi_recipient_bounce", "reject_rbl_client",
    "reject_rhsbl_helo", "reject_rhsbl_recipient", "reject_rhsbl_reverse_client", "reject_rhsbl_sender",
    "reject_unauth_destination", "reject_unauth_pipelining", "reject_unlisted_recipient",
}  # fmt: skip
_SENDERS = "refuse senders by a [[mail_rule]] with sender or sender_domain (docs/rules.md)"
RESTRICTED: list[tuple[str, Kind, str]] = [
    ("reject_.*sender_login_mismatch", "gap", "give each account its `senders` in the accounts file (docs/submission.md)"),
    ("reject_unlisted_sender", "gap", _UNLISTED),
    ("reject_unverified_", "gap", "recipients are not asked for at the next host: relay.recipients names the valid ones"),
    ("permit_mx_backup", "way", "name the domains in relay.domains"),
    ("permit_inet_interfaces", "note", "the machine's own addresses may relay if they are in relay.networks"),
    ("permit_tls_", "gap", "clients are told by login and network, not by certificate: give those who relay by one a login"),
    ("check_client_access", "gap", "refuse clients by a [[filter]] or a firewall; relay.networks names those who may relay"),
    ("check_(helo|sender|sasl)_access|check_.*_(mx|ns|a)_access|check_reverse_client", "gap", _SENDERS),
    ("check_recipient_access", "gap", "refuse recipients by a [[mail_rule]], or leave them out of relay.recipients"),
    ("check_", "gap", "write a [[mail_rule]] or a [[filter]]"),
    ("permit_(dnswl|rhswl)_client", "gap", "give such a list a negative score in [[filter.lists]]"),
    ("reject_rhsbl_client", "gap", "names of clients are not looked up; HELO, sender and author are (domain = true)"),
    ("reject_non_fqdn_recipient", "note", "clients that may not relay reach relay.domains and what is kept here alone"),
    ("reject_non_fqdn_sender", "gap",
     "of clients that may not relay, a sender without a domain is refused; a domain without a dot is not"),
    ("reject_invalid_helo_hostname", "gap",
     "of clients that may not relay, a name with blanks or unprintable characters is refused, and no other"),
    ("reject_(non_fqdn|invalid|unknown)_", "gap", "names are not looked up: a spam filter weighs them (docs/filter-recipes.md)"),
]  # fmt: skip


def account_for(scope: Scope, services: list[Service], back: set[Place], used: set[str], findings: Findings) -> None:
    """Name every parameter that is given, and is neither carried nor without meaning here. `back`: the lines of services that
    content filters give mail back to; `used`: transports that routes use."""
    accounting = _Accounting(scope, services, back, used, findings)
    accounting.main()
    for service in services:
        accounting.service(service)
    accounting.restrictions()


class _Accounting:
    def __init__(self, scope: Scope, services: list[Service], back: set[Place], used: set[str], findings: Findings) -> None:
        self._scope, self._services, self._back, self._used, self._findings = scope, services, back, used, findings
        every = (setting for service in services for setting in service.overrides.values())
        self._referred = {name for setting in (*scope.given(), *every) for name in named_in(setting.raw)}
        self._classes = set(scope.words("smtpd_restriction_classes"))

    def main(self) -> None:
        """The parameters of main.cf."""
        for setting in self._scope.given():
            name = setting.name
            if name not in CARRIED and name not in self._classes and name not in _LISTS and not self._is_only_referred(name):
                self._account(self._scope, setting, "")

    def _is_only_referred(self, name: str) -> bool:
        """Whether it is a name of the operator's, for other values."""
        return name in self._referred and _row(INSTEAD, name) is None

    def service(self, service: Service) -> None:
        """The `-o` of a service."""
        scope, read = self._scope.within(service.overrides), READ_OF.get(service.command)
        for setting in service.overrides.values():
            name = setting.name
            carried = name in _LISTS if service.command in ("smtpd", "postscreen") else False
            if carried or (read is not None and name in CARRIED and read.fullmatch(name)):
                continue
            if service.place in self._back and (_NOT_THERE.fullmatch(name) or name in CARRIED):
                continue
            if not self._is_only_referred(name):
                self._account(scope, setting, f"{service.name}: ")

    def _account(self, scope: Scope, setting: Setting, prefix: str) -> None:
        name, text = setting.name, scope.text(setting.name)
        default = self._scope.text(name) == text if prefix else scope.is_default(name)
        if name in NOTHING or default or text in SAME.get(name, ()) or (not text and not prefix):
            return
        if _transport_of(name):
            if _transport_of(name) not in self._used:
                self._findings.note(setting.place, f"{prefix}{name} = {text}", "no route has this transport")
            return
        of_service: tuple[Kind, str] | None = (
            ("gap", "no service has its own here: the value of main.cf holds for all mail") if name in CARRIED else None
        )
        kind, instead = of_service or _row(INSTEAD, name) or ("gap", "it is not known here")
        self._findings.add(kind, setting.place, f"{prefix}{name} = {_shown(name, text)}", instead)

    def restrictions(self) -> None:
        """The restrictions of all services, each once; and classes that tables alone name."""
        smtpd = [service for service in self._services if service.command in ("smtpd", "postscreen")]
        scopes = [self._scope.within(service.overrides) for service in smtpd] or [self._scope]
        found: dict[tuple[Place, str, str], Restriction] = {}
        words = set[str]()
        for one in scopes:
            for name in _LISTS:
                words.update(one.words(name))
                for member in Restrictions.read(one, name).members:
                    found.setdefault((member.origin.place, member.name, member.argument), member)
        for member in found.values():
            _restriction(member, self._findings)
        words.update(word for name in self._classes for word in self._scope.words(name))
        for name in sorted(self._classes - words):
            instead = "a class that tables of clients, senders or recipients name: these are not carried"
            self._findings.gap(self._scope.place(name), f"{name} = {_shown(name, self._scope.text(name))}", instead)


def _transport_of(name: str) -> str:
    """The transport whose limit a parameter is, "" for none."""
    match = re.fullmatch("(.+)_destination_(?:concurrency_limit|rate_delay)", name)
    return match[1] if match is not None and match[1] != "default" else ""


def _shown(name: str, text: str) -> str:
    """A value as it is shown: of what may be a password, nothing."""
    if re.search("passw|secret|sasl.*_maps|credential", name, re.I) or re.search("passw|secret", text, re.I):
        return "..."
    return text if len(text) < LONGEST else f"{text[:LONGEST]}..."


def _row(rows: list[tuple[str, Kind, str]], name: str) -> tuple[Kind, str] | None:
    return next(((kind, instead) for pattern, kind, instead in rows if re.match(f"(?:{pattern})", name)), None)


def _restriction(member: Restriction, findings: Findings) -> None:
    if member.name in ALWAYS or member.warned or member.name.isdecimal():
        return
    kind, instead = _row(RESTRICTED, member.name) or ("gap", "it is not known here")
    findings.add(kind, member.origin.place, f"{member.origin.name}: {member.name} {member.argument}", instead)
