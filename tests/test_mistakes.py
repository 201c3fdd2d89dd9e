"""Mistakes in a configuration: what an operator is told about each. A new mistake is one more row.

`L` stands for a valid [[listener]] table of two lines; expected is `line: key: sentence` (the file's name comes before it)."""

from pathlib import Path

import pytest

from relaymta.config import load, notes
from relaymta.errors import ConfigError
from relaymta.route.table import map_notes

L = '[[listener]]\naddress = "127.0.0.1:25"\n'
SOURCE = '[[source]]\nname = "a"\naddress = "192.0.2.1"\n'
DKIM = '[[dkim]]\ndomain = "a.example"\nselector = "s"\nkey = "/k"\n'
ROUTE = '[[route]]\nhosts = ["h"]\n'
LMTP = L.replace(":25", ":24") + 'protocol = "lmtp"\n'
HTTP = L.replace(":25", ":8025") + 'protocol = "http"\n'
TOO_LATE = "who waits for `delay` comes too late, if `retry_window` is not longer: nobody would get through"
GREYLIST = L + '[[filter]]\nname = "v"\ntype = "greylist"\n'
DNSBL = L + '[[filter]]\nname = "v"\ntype = "dnsbl"\nlists = [{ zone = "l.example", codes = ["127.0.0.2"] }]\n'
MAIL_RULE = L + '[[mail_rule]]\nname = "r"\n'
RULE = MAIL_RULE.removeprefix(L)
FILTER = L + '[[filter]]\nname = "v"\ntype = "clamd"\naddress = ["unix:/x"]\n'
PYTHON = FILTER.replace("clamd", "python").replace('address = ["unix:/x"]', 'file = "/p.py"')
HOOK = FILTER.replace("clamd", "http").replace("unix:/x", "http://127.0.0.1:8080/hook")
SPANS = '[tracing]\nendpoint = "http://h.example/v1/traces"\n'
HERE = '[[route]]\nprotocol = "mailbox"\nrecipient_domain = ["a.example"]\n'
DOUBLE = "in double brackets: there can be several"
ALLOWED = "is not allowed in a host name: letters, digits and hyphens are (RFC 5321 4.1.2)"
LITERAL = 'an address literal is written "[192.0.2.1]" or "[IPv6:2001:db8::1]"'

SYNTAX = [  # TOML 1.0
    ('hostname = "x\n', "1: hostname: the closing quote is missing"),
    ('hostname = "x', "1: hostname: the closing quote is missing"),
    ("hostname = 'x\n" + L, "1: hostname: the closing quote is missing"),
    ("hostname = x.example\n", '1: hostname: write the value in quotes: KEY = "VALUE"'),
    ("[[listener]]\naddress = 127.0.0.1:25\n", '2: listener.0.address: write the value in quotes: KEY = "VALUE"'),
    ("[queue]\nmax_age = 5d\n", '2: queue.max_age: write the value in quotes: KEY = "VALUE"'),
    ("spool = \u201c/x\u201d\n", "1: spool: quotes are written \" or '"),
    ("spool =\n", "1: spool: the value is missing"),
    ("= 1\n", "1: the key in front of = is missing"),
    ('hostname: "x"\n', "1: write KEY = VALUE, with = instead of :"),
    ("[[listener]]\nsubmission = True\n", "2: listener.0.submission: write true or false"),
    ("workers = 04\n", "1: workers: a number is written without a leading 0"),
    ("spool = \"C:\\d\"\n", "1: spool: a backslash: write the value in 'single quotes'"),
    ("workers = 1\nworkers = 2\n", "2: workers: this key is given twice"),
    ("[relay]\n[relay]\n", "2: relay: this table is given twice"),
    ("[relay\n", "1: the closing ] of the table is missing"),
    ("[[route]\n", "1: route: the closing ]] of the table is missing"),
    ("[relay]]\n", "1: relay: something follows the name of the table"),
    ('[relay]\ndomains = "a" "b"\n', '2: relay.domains: something follows the value: a list is written ["A", "B"]'),
    ('[relay]\ndomains = ["a"\nnetworks = []\n',
     "3: relay.networks: a comma or the closing ] of a list is missing here or before"),
    ("workers = 2,\n", "1: workers: nothing follows a value: remove the comma or semicolon"),
    ('spool = "/x";\n', "1: spool: nothing follows a value: remove the comma or semicolon"),
    ("; a comment\n", "1: a comment begins with #"),
    ("// a comment\n", "1: a comment begins with #"),
    ("workers = 1 // a comment\n", "1: workers: a comment begins with #"),
    ('[relay]\nnetworks = [127.0.0.0/8]\n', "2: relay.networks: write each value of a list in quotes"),
    ('[relay]\nnetworks = [\n  "127.0.0.0/8",\n  localhost,\n]\n', "4: relay.networks.1: write each value of a list in quotes"),
    ('[relay]\ndomains = ["a",, "b"]\n', "2: relay.domains: a comma without a value in front of it"),
    ('[relay]\ndomains = ["a"; "b"]\n', "2: relay.domains: the values of a list are separated by commas"),
    ('[[route]]\nhosts = ["h"]\n[route]\n', f"3: route: write [[route]] {DOUBLE.replace(':', ' each time:')}"),
    ('[route]\nhosts = ["h"]\n[[route]]\n', f"3: route: write [[route]] {DOUBLE.replace(':', ' each time:')}"),
]  # fmt: skip

KEYS = [
    ("[[listener]]\nadress = \"127.0.0.1:25\"\n", ["1: listener.0.address: is missing",
                                                '2: listener.0.adress: no such key (did you mean "address"?)']),
    (f'{L}hostname = "a.example"\n', "3: listener.0.hostname: no such key: hostname stands in front of the first table"),
    (f'{L}max_age = "5d"\n', "3: listener.0.max_age: no such key (it is a key of [queue])"),
    ('[route]\nhosts = ["h"]\n' + L, f"1: route: write [[route]] {DOUBLE}"),
    ('[listener]\naddress = "127.0.0.1:25"\n', f"1: listener: write [[listener]] {DOUBLE}"),
    (f'[relay.networks]\na = "10.0.0.0/8"\n{L}', '1: relay.networks: a list, not a table: write networks = ["A", "B"]'),
    (f'route = ["h"]\n{L}', "1: route.0: tables: write [[route]] for each"),
    ('listener = "127.0.0.1:25"\n', f"1: listener: write [[listener]] {DOUBLE}"),
    (f'{L}[route.0]\nhosts = ["h"]\n', f"3: route: write [[route]] {DOUBLE}"),
    (f'{L}[[route]]\n[[route.hosts]]\nname = "h"\n', "4: route.0.hosts.0: a text, not a table"),
    (f'{L}[[route]]\nhosts = ["h"]\n[[route]]\nhosts = ["g"]\n[[route.oauth]]\ntoken_url = "https://x"\n',
     "7: route.1.oauth: write [route.oauth] in single brackets: there is one"),
    (f"{L}[log]\nworkers = 2\n", "4: log.workers: no such key: workers stands in front of the first table"),
    (f'{L}[relay]\n# of ours\nnetworks = [\n "127.0.0.0/8", # ["x"\n "10.0.0.0/8", "10.1.0.0/33",\n\n "x/y", ]\n',
     ["7: relay.networks.2: '10.1.0.0/33' does not appear to be an IPv4 or IPv6 network",
      "9: relay.networks.3: 'x/y' does not appear to be an IPv4 or IPv6 network"]),
    (f"{L}[[relay]]\n", "3: relay: write [relay] in single brackets: there is one"),
    (f"relay = 1\n{L}", "1: relay: a table: write [relay]"),
    (f'workers = "4"\n{L}', "1: workers: a whole number, without quotes (it is '4')"),
    (f"{L}[delivery]\nfirst_retry = 0\n", "4: delivery.first_retry: must be more than 0"),
    (f"{L}[delivery]\nconnect_timeout = 0\n", "4: delivery.connect_timeout: must be more than 0"),
    (f"{L}[limits]\nmessage_size = 0\n", "4: limits.message_size: must be more than 0"),
    (f"{L}[queue]\nmax_age = 0\n", "4: queue.max_age: must be more than 0"),
    (f"workers = 1000\n{L}", "1: workers: Input should be less than or equal to 255 (it is 1000)"),
    (f"hostname = 5\n{L}", "1: hostname: a text: write it in quotes (it is 5)"),
    (f'{L}submission = "yes"\n', "3: listener.0.submission: true or false, without quotes (it is 'yes')"),
    (f'{L}[relay]\ndomains = "a.example"\n', "4: relay.domains: a list: write it in brackets (it is 'a.example')"),
    (f'{L}tls = "mai"\n', "3: listener.0.tls: Input should be 'off', 'may', 'require' or 'implicit' (it is 'mai') "
                          '(did you mean "may"?)'),
    (f'{L}[queue]\nmax_age = "5 lightyears"\n',
     "4: queue.max_age: a duration such as \"90s\", \"10m\", \"5d\" (it is '5 lightyears')"),
    (f'{L}[limits]\nmessage_size = "much"\n', "4: limits.message_size: a size such as \"50MB\" (it is 'much')"),
    (f"{L}[delivery]\nport = 99999\n", "4: delivery.port: Input should be less than or equal to 65535 (it is 99999)"),
]  # fmt: skip

ANY = 'expected host:port; all addresses are "0.0.0.0:25" (IPv4) and "[::]:25" (IPv6)'
ADDRESSES = [  # of listeners and smart hosts
    ("address", "127.0.0.1", "'127.0.0.1': expected host:port"),
    ("address", "0.0.0.0:99999", "'0.0.0.0:99999': expected host:port with a port from 1 to 65535"),
    ("address", "0.0.0.0:0", "'0.0.0.0:0': expected host:port with a port from 1 to 65535"),
    ("address", "0.0.0.0:smtp", "'0.0.0.0:smtp': expected host:port"),
    ("address",
     "smtp://127.0.0.1:25", "'smtp://127.0.0.1:25': write host:port without smtp:// (did you mean \"127.0.0.1:25\"?)"),
    ("address", "256.1.1.1:25", "'256.1.1.1:25': '256.1.1.1' is not an IP address"),
    ("address", "[2001::db8::]:25", "'[2001::db8::]:25': '2001::db8::' is not an IP address"),
    ("address", "::1:25", "'::1:25': write an IPv6 address in brackets"),
    ("address", "my host:25", "'my host:25': it has white space in it"),
    ("address", "*:25", f"'*:25': {ANY}"),
    ("address", ":25", f"':25': {ANY}"),
    ("address", "25", f"'25': {ANY}"),
    ("hosts", "smtp://h.example", "'smtp://h.example': write host:port without smtp:// (did you mean \"h.example\"?)"),
    ("hosts",
     "smtps://h.example:465/", "'smtps://h.example:465/': write host:port without smtps:// (did you mean \"h.example:465\"?)"),
    ("hosts", "h..example", "'h..example': 'h..example' is neither a host name nor an IP address"),
    ("hosts", "192.0.2.1/24", "'192.0.2.1/24': '192.0.2.1/24' is neither a host name nor an IP address"),
    ("hosts", "192.0.2", "'192.0.2': '192.0.2' is not an IP address"),
    ("hosts", "h.example:70000", "'h.example:70000': expected host:port with a port from 1 to 65535"),
]  # fmt: skip

NAMES = [  # of ourselves: RFC 5321 4.1.2 (Domain), 4.1.3 (address literals), 4.5.3.1.2; RFC 1123 2.1; RFC 1035 2.3.4
    ("", "it is empty"),
    ("a_b.example", f"'a_b.example': '_' {ALLOWED}"),
    ("mail example", "'mail example' has white space or control characters in it"),
    ("a\tb", "'a\\tb' has white space or control characters in it"),
    ("a\u00a0b", "'a\\xa0b' has white space or control characters in it"),
    ("a..example", "'a..example' has an empty label in it: two dots in a row, or one at the beginning"),
    (".example", "'.example' has an empty label in it: two dots in a row, or one at the beginning"),
    ("a.example..", "'a.example..' has an empty label in it: two dots in a row, or one at the beginning"),
    ("-a.example", "'-a.example': '-a' begins or ends with a hyphen, which no label may (RFC 1123 2.1)"),
    ("a-.example", "'a-.example': 'a-' begins or ends with a hyphen, which no label may (RFC 1123 2.1)"),
    ("mail.example:25", f"'mail.example:25': ':' {ALLOWED}"),
    ("192.0.2.1", "'192.0.2.1' is an IP address: give the name of this host, or \"[192.0.2.1]\""),
    ("2001:db8::1", "'2001:db8::1' is an IP address: give the name of this host, or \"[IPv6:2001:db8::1]\""),
    ("[2001:db8::1]", f"'[2001:db8::1]': {LITERAL}"),
    ("[192.0.2.1", f"'[192.0.2.1': {LITERAL}"),
    ("1.2.3", "'1.2.3' is neither a host name, since it ends with a number, nor an IP address"),
    ("b\u00fc cher.example", "'b\u00fc cher.example' has white space or control characters in it"),
    ("\u2764\ufe0f.example", "'\u2764\ufe0f.example' is not a valid internationalized domain name (RFC 5890)"),
]  # fmt: skip

TABLES = [
    (L + L, "4: listener.1.address: two listeners have the address '127.0.0.1:25'"),
    (L.replace("127.0.0.1", "[::1]") + L.replace("127.0.0.1", "[0::1]"),
     "4: listener.1.address: two listeners have the address '[0::1]:25'"),
    (L + L.replace("127.0.0.1", "0.0.0.0"), "4: listener.1.address: listener.0.address (127.0.0.1:25) has this port already"),
    (L.replace("127.0.0.1", "0.0.0.0") + L, "4: listener.1.address: listener.0.address (0.0.0.0:25) has this port already"),
    (f'{L}[metrics]\nlisten = "127.0.0.1:25"\n', "4: metrics.listen: listener.0.address (127.0.0.1:25) has this port already"),
    (L + SOURCE + SOURCE, "7: source.1.name: two sources are called 'a'"),
    (L + ROUTE + ROUTE, "5: route.1.name: two routes are called 'h': give one of them another name"),
    (f'{L}[[certificate]]\nchain = "/c"\n[[certificate]]\nchain = "/c"\n',
     "6: certificate.1.chain: two certificates are in '/c'"),
    (L + DKIM + DKIM, "9: dkim.1.selector: the same key is given twice: it would sign twice"),
    (f'{L}[[application]]\nname = "a"\n[[application]]\nname = "a"\n',
     "6: application.1.name: there are two tables for the application 'a'"),
    (L + SOURCE.replace('"a"', '"a b"'), "4: source.0.name: 'a b' has white space or control characters in it"),
    (L + SOURCE.replace('"a"', '""'), "4: source.0.name: it is empty"),
    (L + SOURCE.replace("192.0.2.1", "eth0"), "5: source.0.address: 'eth0' is not an IP address"),
    (f'{L}[relay]\nnetworks = ["10.0.0.1/8"]\n',
     "4: relay.networks.0: 10.0.0.1/8 has host bits set (did you mean \"10.0.0.0/8\"?)"),
    (f'{L}[relay]\nnetworks = ["0.0.0.0/0"]\n',
     "4: relay.networks: 0.0.0.0/0 may relay: that is an open relay, which spammers find "
     "within hours. Name your networks, or set relay.open_relay = true if you mean it"),
    (f'{L}{ROUTE}sources = ["b"]\n{SOURCE}', "5: route.0.sources: there is no [[source]] 'b'"),
    (f'{L}{ROUTE}username = "me"\npassword_env = "X"\n',
     '5: route.0.username: needs tls = "verify": credentials are sent over verified TLS only'),
    (
        f'{L}{ROUTE.replace("hosts", "sender")}username = "me"\n',
        [
            '5: route.0.username: needs tls = "verify": credentials are sent over verified TLS only',
            "5: route.0.username: needs password_file, password_env or oauth",
            "5: route.0.username: needs hosts: credentials are sent to configured hosts only",
        ],
    ),
    (
        f'{L}[verify]\ndmarc = "enforce"\n{ROUTE}sources = ["on"]\n[[source]]\nname = "one"\naddress = "192.0.2.1"\n',
        [
            "4: verify.dmarc: 'enforce' needs verify.results = true: nothing is checked without it",
            "7: route.0.sources: there is no [[source]] 'on' (did you mean \"one\"?)",
        ],
    ),
    (f'{L}[delivery]\nnameservers = ["ns.example"]\n',
     "4: delivery.nameservers.0: 'ns.example': a name server is given by its IP address"),
    (f'{L}[metrics]\nlisten = "x"\n', "4: metrics.listen: 'x': expected host:port"),
    ("", " listener: there is none: give a [[listener]] table, or --listen HOST:PORT"),
    (f'{L}tls = "require"\n', "3: listener.0.tls: 'require' needs a [[certificate]]"),
    (f'{L}[verify]\ndmarc = "enforce"\n',
     "4: verify.dmarc: 'enforce' needs verify.results = true: nothing is checked without it"),
    (f'{L}protocol = "lmpt"\n',
     "3: listener.0.protocol: Input should be 'smtp', 'http', 'lmtp', 'pop3', 'imap' or 'managesieve' (it is 'lmpt') "
     '(did you mean "lmtp"?)'),
    (HTTP, '1: listener.0.tls: is to be given with protocol = "http": "implicit" (https), or "off" on a loopback address'),
    (HTTP.replace("127.0.0.1", "0.0.0.0") + 'tls = "off"\n',
     '4: listener.0.tls: "off" on 0.0.0.0:8025: mail and passwords would be sent in clear; "implicit", or a loopback address'),
    (HTTP + 'tls = "implicit"\n', '4: listener.0.tls: \'implicit\' needs a [[certificate]]'),
    (HTTP + 'tls = "off"\nauth = "require"\n[accounts]\nfile = "/a"\n',
     "5: listener.0.auth: needs tls, or auth_in_clear on a loopback address: no client could log in"),
    (HTTP + 'tls = "off"\nfiltered = true\n',
     '5: listener.0.filtered: it has no meaning with protocol = "http": content filters give mail back by SMTP'),
    (LMTP, '3: listener.0.protocol: "lmtp" needs a [[route]] with protocol = "mailbox": no mail is kept here'),
    (LMTP + ROUTE, '3: listener.0.protocol: "lmtp" needs a [[route]] with protocol = "mailbox": no mail is kept here'),
    (f'{L}protocol = "lmtp"\n{HERE}',
     "2: listener.0.address: 127.0.0.1:25: LMTP must not be spoken on port 25, which is that of SMTP (RFC 2033 1)"),
    (f"{LMTP}submission = true\n{HERE}",
     '4: listener.0.submission: it has no meaning with protocol = "lmtp": a mail server delivers there'),
    (f'{LMTP}proxy = ["192.0.2.1/32"]\n{HERE}',
     '4: listener.0.proxy: it has no meaning with protocol = "lmtp": a mail server delivers there'),
    (f'{L}filtered = true\nnetworks = ["0.0.0.0/0"]\n',
     "4: listener.0.networks: 0.0.0.0/0 may relay past all filters here: name the content filter's hosts only"),
    (f'{L}filtered = true\nnetworks = []\n',
     "4: listener.0.networks: nobody could give mail back: name the content filter's hosts"),
    (f'{L}filtered = true\nsubmission = true\n',
     "4: listener.0.submission: it has no meaning with filtered = true: that was done where the mail came in first"),
    (f'{L}filtered = true\nproxy = ["192.0.2.1/32"]\n',
     "4: listener.0.proxy: it has no meaning with filtered = true: that was done where the mail came in first"),
    (f'{LMTP}filtered = true\n{HERE}',
     '4: listener.0.filtered: it has no meaning with protocol = "lmtp": content filters give mail back by SMTP'),
    (f'{L}networks = ["192.0.2.0/24"]\n',
     "3: listener.0.networks: needs filtered = true: other clients are told apart by relay.networks and [[network]]"),
    (f'{L}[[route]]\nxforward = true\n',
     "4: route.0.xforward: needs hosts: clients are told to configured hosts only"),
    (f'{LMTP}auth_in_clear = true\nauth = "may"\n{HERE}[accounts]\nfile = "/a"\n',
     '5: listener.0.auth: "may" has no meaning with protocol = "lmtp": "require" a login, or name the clients in relay.networks'),
    (f'{LMTP}{HERE}[staging]\nredirect = "a@b.example"\n',
     '3: listener.0.protocol: "lmtp" with staging.redirect: mail would be filed, and not redirected'),
    (f'{FILTER}verdicts = {{ found = "hold" }}\n',
     "7: filter.0.verdicts.found: clamd does not say 'found' (did you mean \"FOUND\"?); it says \"OK\", \"FOUND\""),
    (f'{FILTER}verdicts = {{ ERROR = "accept" }}\n',
     "7: filter.0.verdicts.ERROR: clamd does not say 'ERROR'; it says \"OK\", \"FOUND\""),
    (f'{FILTER}verdicts = {{ FOUND = "holt" }}\n',
     "7: filter.0.verdicts.FOUND: Input should be 'accept', 'tag', 'hold', 'discard', 'tempfail' or 'reject' (it is 'holt') "
     '(did you mean "hold"?)'),
    (f'{FILTER}verdicts = ["hold"]\n', '7: filter.0.verdicts: a table: write verdicts = { NAME = "VALUE" }'),
    (f'{FILTER}verdicts = "hold"\n', '7: filter.0.verdicts: a table: write verdicts = { NAME = "VALUE" } (it is \'hold\')'),
    (f'{FILTER}[[filter.verdicts]]\nFOUND = "hold"\n',
     '7: filter.0.verdicts: a table: write verdicts = { NAME = "VALUE" }'),
    (FILTER.replace("clamd", "clam"),
     '5: filter.0.type: there is no type \'clam\' (did you mean "clamd"?); there are "clamd", "rspamd", "spamd", "milter", '
     '"policy", "http", "dnsbl", "greylist", "python"'),
    (FILTER.replace("clamd", "smtp"),
     '5: filter.0.type: "smtp" is not there yet: there are "clamd", "rspamd", "spamd", "milter", "policy", "http", '
     '"dnsbl", "greylist", "python"'),
    (PYTHON.replace("file", "#file"),
     '3: filter.0.file: is empty: give that of the functions, such as "/etc/relaymta/policy.py"'),
    (PYTHON.replace("/p.py", "p.py"), "6: filter.0.file: p.py: give the whole path, which begins with /"),
    (PYTHON + 'address = ["unix:/x"]\n', "7: filter.0.address: python has none: give `file`"),
    (PYTHON + "concurrency = 2\n", "7: filter.0.concurrency: has no meaning for python: leave it out"),
    (PYTHON + 'isolation = "loop"\nmemory = "200MB"\n',
     '8: filter.0.memory: has no meaning with isolation = "loop": it is the worker\'s'),
    (PYTHON + 'memory = "1MB"\n', "7: filter.0.memory: 1048576: no process can begin with less than 128 MB"),
    (PYTHON + 'stage = "message"\n', '7: filter.0.stage: python is asked at stage "mail", "queued"'),
    (PYTHON + 'verdicts = { raise = "hold" }\n',
     '7: filter.0.verdicts.raise: python does not say \'raise\' (did you mean "raised"?); it says "accept", "tag", "hold", '
     '"discard", "tempfail", "reject", "raised"'),
    (FILTER + 'file = "/p.py"\n', "7: filter.0.file: is for python, not for clamd"),
    (FILTER + 'stage = "mail"\n', '7: filter.0.stage: clamd is asked at stage "message", "queued"'),
    (FILTER.replace("clamd", "policy") + 'stage = "mail"\n',
     '7: filter.0.stage: policy is asked at stage "rcpt", "data", "message", "queued"'),
    (FILTER + 'stage = "connect"\n',
     '7: filter.0.stage: "connect" is not there yet: there are "mail", "rcpt", "data", "message" and "queued"'),
    (FILTER + 'may = ["sender"]\n',
     "7: filter.0.may: clamd changes nothing but the header: it is for a milter, a policy service or hooks"),
    (HOOK.replace("http://", ""),
     '6: filter.0.address.0: \'127.0.0.1:8080/hook\' is no URL: write it as "http://127.0.0.1:8080/hook"'),
    (HOOK.replace("http:", "ftp:"),
     '6: filter.0.address.0: \'ftp://127.0.0.1:8080/hook\' is no URL: write it as "http://127.0.0.1:8080/hook"'),
    (HOOK.replace("http://127.0.0.1:8080/hook", "unix:/x"),
     '6: filter.0.address.0: \'unix:/x\' is no URL: write it as "http://127.0.0.1:8080/hook"'),
    (HOOK.replace("8080", "80800"), "6: filter.0.address.0: 'http://127.0.0.1:80800/hook' is no URL"),
    (HOOK.replace("8080", "0"), "6: filter.0.address.0: 'http://127.0.0.1:0/hook': a port from 1 to 65535"),
    (HOOK.replace("//127.0.0.1", "//127.0.0.300"),
     "6: filter.0.address.0: '127.0.0.300': '127.0.0.300' is not an IP address (it is 'http://127.0.0.300:8080/hook')"),
    (HOOK.replace("//127", "//me:pass@127"),
     "6: filter.0.address.0: a URL without user and password: secret_file shows the hook who asks (it is "
     "'http://me:pass@127.0.0.1:8080/hook')"),
    ('[tracing]\nendpoint = "http://127.0.0.1:4318"\n' + L,
     "2: tracing.endpoint: http://127.0.0.1:4318 has no path: http://127.0.0.1:4318/v1/traces, for most collectors"),
    ('[tracing]\nendpoint = "http://me:pass@h/v1/traces"\n' + L,
     "2: tracing.endpoint: a URL without user and password: credentials are in header_file"),
    ("[tracing]\nratio = 0.1\n" + L, "2: tracing.ratio: has no effect without tracing.endpoint"),
    (SPANS + 'headers = ["Bearer secret"]\n' + L, "3: tracing.headers: no header field: write Name: value, in ASCII"),
    (SPANS + 'headers = ["authorization: secret"]\n' + L,
     "3: tracing.headers: authorization is secret, and everybody who sees the configuration would see it: header_file"),
    (SPANS + 'header_file = "/x"\n' + L,
     "2: tracing.endpoint: the secret of header_file would go over plain http to another host; use https://, or a loopback "
     "address"),
    (HOOK.replace("/hook", "/hook#x"), "6: filter.0.address.0: 'http://127.0.0.1:8080/hook#x': what is behind # is not sent"),
    (HOOK.replace("/hook", "/a hook"), "6: filter.0.address.0: 'http://127.0.0.1:8080/a hook': write what is no letter, digit or "
     "mark of a URL as %XX, and the host in A-labels"),
    (HOOK.replace('["http://127.0.0.1:8080/hook"]', "[]"),
     '6: filter.0.address: is empty: give "http://HOST:PORT/PATH" or "https://HOST/PATH"'),
    (FILTER.replace("unix:/x", "http://127.0.0.1:3310"), "6: filter.0.address.0: 'http://127.0.0.1:3310': write host:port "
     'without http:// (did you mean "127.0.0.1:3310"?)'),
    (FILTER + "body = true\n", "7: filter.0.body: is for http, not for clamd"),
    (FILTER + 'secret_file = "/x"\n', "7: filter.0.secret_file: is for http, not for clamd"),
    (HOOK + 'must_work = ["X"]\n', "7: filter.0.must_work: http has no symbols"),
    (HOOK + 'controller = "127.0.0.1:1"\n', "7: filter.0.controller: http has none"),
    (HOOK + 'lists = [{ zone = "l.example", codes = ["127.0.0.2"] }]\n', "7: filter.0.lists: is for dnsbl, not for http"),
    (HOOK + 'delay = "7m"\n', "7: filter.0.delay: is for greylist, not for http"),
    (HOOK + 'stage = "rcpt"\n', '7: filter.0.stage: http is asked at stage "message", "queued"'),
    (HOOK + 'oversize = "head"\n',
     "7: filter.0.oversize: has no meaning without body = true: the hook is shown the header alone"),
    (HOOK + 'verdicts = { OK = "tag" }\n', "7: filter.0.verdicts.OK: http does not say 'OK'; it says \"accept\", \"tag\", "
     '"hold", "discard", "tempfail", "reject"'),
    (FILTER + 'delay = "7m"\n', "7: filter.0.delay: is for greylist, not for clamd"),
    (FILTER.replace("clamd", "greylist"), "6: filter.0.address: greylist has none: it is no program"),
    (GREYLIST + 'clients = "trusted"\n', "6: filter.0.clients: greylist looks at unauthenticated clients alone"),
    (GREYLIST + 'on_failure = "hold"\n', "6: filter.0.on_failure: has no meaning for greylist: leave it out"),
    (FILTER.replace("clamd", "policy") + 'max_size = "1MB"\n',
     "7: filter.0.max_size: has no meaning for policy, which is not shown the text: leave it out"),
    (GREYLIST + 'delay = "0s"\n', "6: filter.0.delay: Input should be greater than or equal to 1 (it is 0.0)"),
    (GREYLIST + 'lists = [{ zone = "l.example", codes = ["127.0.0.2"] }]\n',
     "6: filter.0.lists: is for dnsbl, not for greylist"),
    (GREYLIST + "[[filter.score]]\nat = 1.0\nverdict = \"tag\"\n", "6: filter.0.score: greylist has no score"),
    (GREYLIST.replace("greylist", "dnsbl"),
     '3: filter.0.lists: is empty: give { zone = "zen.spamhaus.org", codes = ["127.0.0.2-11"] }'),
    (DNSBL.replace("127.0.0.2", "127.0.0.2-"),
     '6: filter.0.lists.0.codes: \'127.0.0.2-\' is none of "127.0.0.2", "127.0.0.2-11" and "127.0.0.0/24"'),
    (DNSBL.replace("127.0.0.2", "192.0.2.1"), "6: filter.0.lists.0.codes: '192.0.2.1': answers of lists are within 127.0.0.0/8"),
    (DNSBL.replace("127.0.0.2", "127.0.0.1"),
     "6: filter.0.lists.0.codes: '127.0.0.1': with this a list says that it does not answer us; it cannot count"),
    (DNSBL.replace('"127.0.0.2"', ""),
     '6: filter.0.lists.0.codes: is empty: give the answers that count, such as "127.0.0.2-11"'),
    (DNSBL.replace("zone", "zones"), ["6: filter.0.lists.0.zone: is missing",
     '6: filter.0.lists.0.zones: no such key (did you mean "zone"?)']),
    (DNSBL.replace("l.example", "l example"), "6: filter.0.lists.0.zone: 'l example' is not a valid domain name"),
    (GREYLIST + 'delay = "1h"\nretry_window = "1h"\n',
     f"7: filter.0.retry_window: {TOO_LATE}"),
    (GREYLIST + 'delay = "1d"\n', f"6: filter.0.delay: {TOO_LATE}"),
    (GREYLIST + 'stage = "message"\n', "6: filter.0.stage: greylist has no choice of that: leave it out"),
    (DNSBL + 'stage = "message"\n', "7: filter.0.stage: dnsbl has no choice of that: leave it out"),
    (DNSBL.replace(' }]', ', score = nan }]'), "6: filter.0.lists.0.score: Input should be a finite number (it is nan)"),
    (DNSBL + "concurrency = 3\n", "7: filter.0.concurrency: has no meaning for dnsbl: leave it out"),
    (FILTER.replace("clamd", "milter") + 'recipient_domain = ["d.example"]\n',
     '7: filter.0.recipient_domain: at MAIL no recipient is known: give stage = "message", too'),
    (FILTER.replace("clamd", "milter") + 'verdicts = { FOUND = "hold" }\n',
     '7: filter.0.verdicts.FOUND: milter does not say \'FOUND\'; it says "accept", "discard", "quarantine", "tempfail", '
     '"reject"'),
    (FILTER.replace("unix:", ""), "6: filter.0.address.0: '/x': a socket is written \"unix:/x\""),
    (FILTER.replace("unix:/", "unix:"),
     "6: filter.0.address.0: 'unix:x': the whole path of a socket is needed, such as \"unix:/run/clamav/clamd.ctl\""),
    (FILTER.replace("/x", "/x\\u0000y"),
     "6: filter.0.address.0: 'unix:/x\\x00y': the path of a socket has no control characters in it"),
    (FILTER.replace("unix:/x", "3310"),
     "6: filter.0.address.0: '3310': expected host:port; all addresses are \"0.0.0.0:3310\" (IPv4) and \"[::]:3310\" (IPv6)"),
    (FILTER.replace('["unix:/x"]', "[]"), '6: filter.0.address: is empty: give "unix:/PATH" or "HOST:PORT"'),
    (FILTER + FILTER.removeprefix(L), "8: filter.1.name: two filters are called 'v': give one of them another name"),
    (f'{FILTER}stage = "queued"\non_failure = "tempfail"\n',
     '8: filter.0.on_failure: "tempfail": the client has its 250 by then: "later" (the default), "accept" or "hold"'),
    (f'{FILTER}stage = "queued"\non_failure_trusted = "disconnect"\n',
     '8: filter.0.on_failure_trusted: "disconnect": the client has its 250 by then: "later" (the default), "accept" or "hold"'),
    (FILTER.replace("clamd", "policy") + 'on_failure_trusted = "later"\n',
     '7: filter.0.on_failure_trusted: "later": policy at stage "rcpt" does not look at messages: "tempfail" or "accept"'),
    (GREYLIST + 'stage = "queued"\n', "6: filter.0.stage: greylist has no choice of that: leave it out"),
    (f'{FILTER}refused = "bunce"\n',
     "7: filter.0.refused: Input should be 'hold', 'discard' or 'bounce' (it is 'bunce') (did you mean \"bounce\"?)"),
    (f'{FILTER}budget = "30s"\n', "7: filter.0.budget: no such key (it is a key of [filters])"),
    (f'{MAIL_RULE}', "4: mail_rule.0.name: 'r' has no condition: it would be about all mail"),
    (f'{MAIL_RULE}attachment = ["type:progam"]\n',
     '5: mail_rule.0.attachment: \'type:progam\': there is "program", "archive", "document", "image" (did you mean "program"?)'),
    (f'{MAIL_RULE}attachment = ["archiv:*.exe"]\n',
     "5: mail_rule.0.attachment: 'archiv:*.exe': before a colon there is \"type\", \"archive\", \"structure\" "
     '(did you mean "archive"?)'),
    (f'{MAIL_RULE}attachment = ["*"]\n', "5: mail_rule.0.attachment: '*': give a name, such as \"*.exe\""),
    (f'{MAIL_RULE}attachment = ["a/*.exe"]\n', "5: mail_rule.0.attachment: 'a/*.exe': names are compared without folders"),
    (f'{MAIL_RULE}header = ["Subject (a"]\n', "5: mail_rule.0.header: 'Subject (a' is not \"Name: expression\""),
    (f"{MAIL_RULE}header = ['Subject: (.)\\1']\n",
     "5: mail_rule.0.header: '(.)\\\\1': invalid escape sequence: \\1 at character 4 "
     "(RE2 has no back-references and no look-around)"),
    (f'{MAIL_RULE}header = ["Subject: "]\n', "5: mail_rule.0.header: 'Subject: ' is not \"Name: expression\""),
    (f'{MAIL_RULE}body = [""]\n', "5: mail_rule.0.body: an empty expression finds something in every text"),
    (f'{MAIL_RULE}attachment = {[f"*{n}.x{n}" for n in range(60_000)]}\n',
     "5: mail_rule.0.attachment: 60000 names are too many for one rule: divide them among several"),
    (f'{MAIL_RULE}body = ["x(a"]\n', "5: mail_rule.0.body: 'x(a': missing ): x(a at character 1"),
    (f'{MAIL_RULE}min_size = 1\nreply = "550 no"\n',
     "6: mail_rule.0.reply: '550 no' is not a reply such as \"552 5.7.0 {match} is not taken here\""),
    (f'{MAIL_RULE}min_size = 1\nreply = "550 5.7.1 {{mtch}}"\n',
     "6: mail_rule.0.reply: '550 5.7.1 {mtch}': {match} and {rule} can be filled in (did you mean \"match\"?)"),
    (f'{MAIL_RULE}min_size = 1\nverdict = "hold"\nreply = "550 5.7.1 x"\n',
     '7: mail_rule.0.reply: has no meaning with verdict = "hold"'),
    (f'{MAIL_RULE}min_size = 1\nreply = "450 4.7.1 x"\n',
     '6: mail_rule.0.reply: 450 is none for verdict = "reject": that begins with 5'),
    (f'{MAIL_RULE}min_size = 1\n[[mail_rule]]\nname = "r"\nmin_size = 1\n',
     "7: mail_rule.1.name: two rules are called 'r': give one of them another name"),
    (
        f"{L}[filters]\nenforce = false\n",
        "4: filters.enforce: no such key (it is a key of [[filter]] and [[mail_rule]] and [[abuse]])",
    ),
    (f"{L}[filters]\nbudget = 0\n", "4: filters.budget: must be more than 0"),
    (f'{L}[filters]\ntag = ["X-{{filter}}: y"]\n',
     "4: filters.tag: 'X-{filter}: y': nothing is filled in in the name of a field"),
    (f'{L}[filters]\ntag = ["X-Spam: {{reason}} {{reason}}"]\n',
     "4: filters.tag: 'X-Spam: {reason} {reason}': {reason} is there twice"),
    (f'{L}[filters]\ntag = ["X-Spam: {{reason!r}}"]\n',
     "4: filters.tag: {reason!r} in 'X-Spam: {reason!r}': {filter}, {reason}, {score} can be filled in "
     '(did you mean "reason"?)'),
    (f'{L}[filters]\ntag = ["Subject: spam"]\n',
     "4: filters.tag: 'Subject: spam': Subject: is a field that other programs write"),
    (f'{L}[filters]\nsubject = "[SPAM]"\n',
     "4: filters.subject: '[SPAM]' has to have \"{subject}\" in it once, where the words of the message go"),
    (f'{L}[filters]\nsubject = "=?utf-8?q?=5BB=C3=BCro=5D?= {{subject}}"\n',
     "4: filters.subject: '=?utf-8?q?=5BB=C3=BCro=5D?= {subject}': write it as it is shown: it is encoded where it has to be"),
    (f'{L}[filters]\nreply = "450 4.7.1 no"\n',
     "4: filters.reply: '450 4.7.1 no' is not a reply such as \"554 5.7.1 Refused by {filter}: {reason}\""),
    (f'{L}[filters]\nreply = "550 5.7.1 {{{{filter}}}}"\n',
     "4: filters.reply: { in '550 5.7.1 {{filter}}': {filter}, {reason} can be filled in"),
    (f'{L}[[rule]]\nmatch = "("\naction = "bounce"\n', "4: rule.0.match: missing ), unterminated subpattern at position 0"),
]  # fmt: skip


def problems_of(path: Path, text: str | bytes) -> list[str]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as refused:
        load(path, {})
    return [problem.removeprefix(f"{path}:") for problem in refused.value.problems]


@pytest.mark.parametrize(("text", "expected"), [*SYNTAX, *KEYS, *TABLES])
def test_a_mistake_is_named_with_its_line_and_key(tmp_path, text, expected):
    assert problems_of(tmp_path / "r.toml", text) == ([expected] if isinstance(expected, str) else expected)


@pytest.mark.parametrize(("key", "value", "expected"), ADDRESSES)
def test_a_wrong_address_is_named(tmp_path, key, value, expected):
    text = f'[[listener]]\naddress = "{value}"\n' if key == "address" else f'{L}\n[[route]]\nhosts = ["{value}"]\n'
    place = "2: listener.0.address" if key == "address" else "5: route.0.hosts.0"
    assert problems_of(tmp_path / "r.toml", text) == [f"{place}: {expected}"]


@pytest.mark.parametrize(("name", "expected"), NAMES)
def test_a_name_that_ehlo_does_not_allow_is_refused(tmp_path, name, expected):
    quoted = f'"{name}"'.replace("\t", "\\t")
    assert problems_of(tmp_path / "r.toml", f"hostname = {quoted}\n{L}") == [f"1: hostname: {expected}"]
    if name:  # "": that of the relay
        assert problems_of(tmp_path / "r.toml", f"{L}{SOURCE}hostname = {quoted}\n") == [f"6: source.0.hostname: {expected}"]


@pytest.mark.parametrize("octets", [64, 250])
def test_names_are_not_longer_than_the_dns_can_hold(tmp_path, octets):
    name = "a" * octets + ".example" if octets < 100 else "a." * (octets // 2) + "example"
    (problem,) = problems_of(tmp_path / "r.toml", f'hostname = "{name}"\n{L}')
    assert " characters long; a " in problem and "at most" in problem and len(problem) < 250


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("mail.example", "mail.example"), ("mail.example.", "mail.example"), ("Mail-1.example", "Mail-1.example"),
        ("b\u00fccher.example", "xn--bcher-kva.example"), ("[192.0.2.1]", "[192.0.2.1]"), ("localhost", "localhost"),
        ("[IPv6:2001:db8::1]",
         "[IPv6:2001:db8::1]"), ("a" * 63 + ".example", "a" * 63 + ".example"), ("3com.example", "3com.example"),
    ],
)  # fmt: skip
def test_names_that_ehlo_allows(given, used):
    options = {"listener": [{"address": "127.0.0.1:25"}], "hostname": given}
    options["source"] = [{"name": "a", "address": "192.0.2.1", "hostname": given}, {"name": "b", "address": "192.0.2.2"}]
    config = load(None, options)
    assert (config.hostname, config.source[0].hostname, config.source[1].hostname) == (used, used, "")


@pytest.mark.parametrize(
    ("given", "used"),
    [("my_host", "my-host"), ("a..b", "a.b"), ("_a_.example", "a.example"), ("", "localhost"), ("123", "localhost"),
     ("192.0.2.1", "localhost"), ("web1.example", "web1.example")],
)  # fmt: skip
def test_a_host_with_an_impossible_name_starts_all_the_same(monkeypatch, given, used):
    monkeypatch.setattr("socket.getfqdn", lambda: given)
    monkeypatch.setattr("socket.gethostname", lambda: given)
    config = load(None, {"listener": [{"address": "127.0.0.1:25"}]})
    assert config.hostname == used
    assert [note.partition(":")[0] for note in notes(config)] == ["hostname"] * (given != used)


GOOD = 'hostname = "a.example"\nspool = "/s"\n' + L
NOTES = [
    (GOOD.replace("a.example",
     "relay"), "1: hostname: 'relay' has no dot: other servers cannot look it up, and many reject it in EHLO; "
     "give the full name of this host"),
    (f'{GOOD}{SOURCE}hostname = "out"\n',
     "8: source.0.hostname: 'out' has no dot: other servers cannot look it up, and many reject it "
     "in EHLO; give the full name of this host"),
    (GOOD.replace("/s", "s"), "2: spool: 's' is relative to the directory that the relay is started in: write the whole path"),
    (GOOD + DKIM.replace("/k", "k.pem"),
     "8: dkim.0.key: 'k.pem' is relative to the directory that the relay is started in: write the whole path"),
    (f'{GOOD}[log]\nfile = "./log"\n', "6: log.file: './log' is relative to the directory that the relay is started in: "
     "write the whole path"),
    (f'{GOOD}{ROUTE}[[route]]\nname = "b"\nsender = ["a@b.example"]\n',
     "7: route.1: 'b' is never used: route.0 ('h') has no condition and comes first"),
    (f'{GOOD}[[route]]\nname = "b"\nsender = ["a@b.example"]\n{ROUTE}', None),
    (f'{GOOD}{ROUTE}min_attempts = 3\n[[route]]\nname = "b"\n', None),
    (f'route_map = "/map"\n{GOOD}{ROUTE}[[route]]\nname = "b"\n', None),
    (f'{GOOD}[log]\nfile = "-"\n', None),
    (f'{GOOD}{ROUTE}listener = ["127.0.0.1:26"]\n',
     "7: route.0.listener: there is no [[listener]] '127.0.0.1:26' (did you mean \"127.0.0.1:25\"?)"),
    (f'{GOOD}{ROUTE}listener = ["127.0.0.1:25"]\n', None),
    (f'{GOOD}[[route]]\nhosts = ["h", "g", "h:25"]\n', "6: route.0.hosts: h:25 is given twice"),
    (f'{GOOD}[[route]]\nhosts = ["h", "g"]\nweights = [1, 2]\n',
     '7: route.0.weights: they have no effect without mode = "balance"'),
    (f'{GOOD}[[route]]\nhosts = ["h", "g"]\nweights = [1, 2]\nmode = "balance"\n', None),
    (f'{GOOD}[[route]]\nsender = ["a@b.example"]\nhosts = ["h"]\n[[route]]\nsender = ["a@b.example"]\nhosts = ["g"]\n',
     "8: route.1: 'g' is never used: route.0 ('h') has the same conditions and comes first"),
    (f'{GOOD}[[route]]\nsender = ["a@b.example"]\nhosts = ["h"]\n[[route]]\nsender = ["b@b.example"]\nhosts = ["g"]\n', None),
    (f"{GOOD}[[network]]\nnetworks = []\n", "6: network.0.networks: it is never used: there are no clients in it"),
    (f'{GOOD}[[network]]\nnetworks = ["10.0.0.0/8"]\n[[network]]\nnetworks = ["10.1.0.0/16"]\n',
     "7: network.1: it is never used: earlier [[network]] tables have all of its clients"),
    (f'{GOOD}[[network]]\nnetworks = ["10.1.0.0/16"]\n[[network]]\nnetworks = ["10.0.0.0/8", "::1"]\n', None),
    (GOOD.replace("a.example", "[192.0.2.1]"), None),
    (f'{GOOD}[[route]]\nhosts = ["192.0.2.1:25", "[2001:db8::1]"]\nip = "6"\n',
     "7: route.0.ip: it has no effect: the hosts are given as addresses"),
    (f'{GOOD}[[route]]\nhosts = ["192.0.2.1", "g"]\nip = "6"\n', None),
    (f"{GOOD}[[site]]\nhosts = []\nconnections = 1\n", "6: site.0.hosts: it matches no site: there are no hosts in it"),
    (f'{GOOD}[[rule]]\nmatch = "x"\naction = "bounce"\nfor = "1h"\n', '8: rule.0.for: it has no effect with action = "bounce"'),
    (f'{GOOD}[[rule]]\nmatch = "x"\naction = "slow"\nfor = 0\n', "8: rule.0.for: slow for no time has no effect"),
    (f'{GOOD}[[rule]]\nmatch = "x"\naction = "suspend"\nfor = 0\n', None),  # it makes a permanent failure temporary
    (GOOD + DKIM + 'oversigned = ["from", "Received"]\n',
     "9: dkim.0.oversigned: received: a host on the way may add one, which no signature survives (RFC 6376 5.4.1)"),
    (GOOD.replace(L, LMTP) + HERE, None),
    (GOOD.replace(L, LMTP.replace("127.0.0.1", "0.0.0.0")) + HERE + '[relay]\nnetworks = ["192.0.2.0/24"]\n', None),
    (GOOD.replace(L, LMTP.replace("127.0.0.1", "192.0.2.1")) + HERE,
     "4: listener.0.address: other hosts can connect, but none may deliver: name them in relay.networks, or listen on "
     "127.0.0.1"),
    (GOOD.replace(L, HTTP) + 'tls = "off"\n', None),
    (GOOD.replace(L, HTTP.replace("127.0.0.1", "0.0.0.0")) + 'tls = "implicit"\n[[certificate]]\nchain = "/c"\n',
     "4: listener.0.address: other hosts can connect, but none may send: let them log in (auth = \"require\"), name them in "
     "relay.networks, or listen on 127.0.0.1"),
    (GOOD.replace(L, HTTP.replace("127.0.0.1", "0.0.0.0")) + 'tls = "implicit"\n[[certificate]]\nchain = "/c"\n[relay]\n'
     'networks = ["192.0.2.0/24"]\n', None),
    (GOOD + 'auth_in_clear = true\n', '5: listener.0.auth_in_clear: it has no effect with auth = "off"'),
    (GOOD + FILTER.removeprefix(L) + 'listener = ["127.0.0.1:25"]\n', None),
    (GOOD + FILTER.removeprefix(L) + 'listener = ["127.0.0.1:26"]\n',
     '9: filter.0.listener: there is no [[listener]] \'127.0.0.1:26\' (did you mean "127.0.0.1:25"?)'),
    (GOOD + FILTER.removeprefix(L).replace('"]', '", "unix:/y", "unix:/x"]'), "8: filter.0.address: unix:/x is given twice"),
    (GOOD + '[[filter]]\nname = "m"\ntype = "milter"\naddress = ["unix:/run/opendmarc.sock"]\n'
     '[[filter]]\nname = "k"\ntype = "milter"\naddress = ["unix:/run/opendkim.sock"]\n',
     "5: filter.0: m comes before k, and finds no DKIM results of that: put it behind"),
    (GOOD + HOOK.removeprefix(L) + 'body = true\nmax_size = "1MB"\nmay = ["sender"]\n[[filter.score]]\nat = 1\nverdict = "tag"\n',
     None),
    (GOOD + HOOK.removeprefix(L).replace("127.0.0.1", "localhost"), None),
    (GOOD + HOOK.removeprefix(L).replace("127.0.0.1", "[::1]"), None),
    (GOOD + HOOK.removeprefix(L).replace("127.0.0.1", "hook.example") + 'secret_file = "/x"\n',
     "8: filter.0.address: http://hook.example:8080/hook: who is on the path can read mail and answer in place of the hook; "
     "use https://"),
    (GOOD + HOOK.removeprefix(L).replace("http://127.0.0.1:8080", "https://hook.example"),
     "5: filter.0: v cannot tell requests of this relay from others: give secret_file"),
    (GOOD + HOOK.removeprefix(L) + 'secret_file = "x"\n',
     "9: filter.0.secret_file: 'x' is relative to the directory that the relay is started in: write the whole path"),
    (GOOD + FILTER.removeprefix(L) + 'verdicts = { FOUND = "tag" }\n[filters]\ntag = []\n',
     "9: filter.0.verdicts.FOUND: \"tag\" has no effect: filters.tag and filters.subject are empty"),
    (GOOD + FILTER.removeprefix(L) + 'verdicts = { FOUND = "tag" }\n[filters]\ntag = []\nsubject = "[x] {subject}"\n', None),
    (GOOD.replace(L, LMTP.replace("lmtp", "pop3")) + "auth_in_clear = true\n" + HERE, None),
    (f'{GOOD}{RULE}sender = ["a.example"]\n',
     '7: mail_rule.0.sender: "a.example" can never match: it is not an address; domains have conditions of their own'),
    (f'{GOOD}{RULE}recipient = ["<a@b.example>"]\n', '7: mail_rule.0.recipient: "<a@b.example>" can never match: write the '
     'address without < and >'),
    (f'{GOOD}{RULE}sender_domain = ["a.example."]\n',
     '7: mail_rule.0.sender_domain: "a.example." can never match: domains are compared without the dot at the end; write '
     '"a.example"'),
    (f'{GOOD}{RULE}recipient_domain = ["a@b.example"]\n',
     '7: mail_rule.0.recipient_domain: "a@b.example" can never match: it has an @; write the domain alone: "b.example"'),
    (f'{GOOD}{RULE}sender = ["", "a@b.example"]\nrecipient = ["postmaster"]\nsender_domain = [".example"]\n', None),
    (f'{GOOD}{RULE}score_min = 5\n', "7: mail_rule.0.score_min: no filter gives a score before the message is in the queue, so "
     "this never holds: rspamd, spamd, http and dnsbl do"),
    (GOOD + FILTER.removeprefix(L).replace("clamd", "rspamd") + 'stage = "queued"\n' + RULE + "score_min = 5\n",
     "12: mail_rule.0.score_min: no filter gives a score before the message is in the queue, so this never holds: rspamd, spamd, "
     "http and dnsbl do"),
    (GOOD + FILTER.removeprefix(L).replace("clamd", "rspamd") + RULE + "score_min = 5\n", None),
    (f'{GOOD}{RULE}min_size = 1\nverdict = "tag"\n[filters]\ntag = []\n',
     '8: mail_rule.0.verdict: "tag" has no effect: filters.tag and filters.subject are empty'),
    (f'{GOOD}{RULE}dmarc = ["fail"]\nclients = "trusted"\n[verify]\nresults = true\n',
     "7: mail_rule.0.dmarc: it never holds: mail of clients that may relay is not verified"),
    (f'{GOOD}{RULE}dmarc = ["fail"]\n[verify]\nresults = false\n',
     "7: mail_rule.0.dmarc: it never holds: verify.results is false"),
    (f'{GOOD}{RULE}dmarc = ["fail"]\n[verify]\nresults = true\n', None),
    (f'{GOOD}[local]\nsocket = "off"\n[admin]\nsocket = "off"\n', None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), NOTES)
def test_a_probable_mistake_is_a_note_with_its_line(tmp_path, text, expected):
    path = tmp_path / "r.toml"
    path.write_text(text)
    assert notes(load(path, {})) == ([f"{path}:{expected}"] if expected else [])


# Files as editors write them

BOM = b"\xef\xbb\xbf"
FILES = [
    (BOM + L.encode(), ""),
    (BOM + L.replace("\n", "\r\n").encode(), ""),
    (L.encode("utf-16"), " this is UTF-16: save it as UTF-8"),
    (b"\xfe\xff" + L.encode("utf-16-be"), " this is UTF-16: save it as UTF-8"),
    (L.encode("utf-16-le"), " this looks like UTF-16: save it as UTF-8"),
    (L.encode("utf-16-be"), " this looks like UTF-16: save it as UTF-8"),
    (L.encode("utf-32"), " this is UTF-32: save it as UTF-8"),
    (L.encode() + b"# sch\xf6n\n", "3: not UTF-8: save it as UTF-8"),
    (L.encode() + b"# \0\n", "3: a NUL octet"),
    (BOM + b"hostname = 1\n" + L.encode(), "1: hostname: a text: write it in quotes (it is 1)"),
]


@pytest.mark.parametrize(("data", "expected"), FILES)
def test_a_configuration_as_editors_write_it(tmp_path, data, expected):
    path = tmp_path / "r.toml"
    path.write_bytes(data)
    if expected:
        assert problems_of(path, data) == [expected]
    else:
        assert load(path, {}).listener[0].address == "127.0.0.1:25"


def test_values_that_are_nested_too_deeply_are_refused(tmp_path):
    assert problems_of(tmp_path / "r.toml", b"spool = " + b"[" * 20_000) == [" lists or tables are nested too deeply"]


@pytest.mark.parametrize(
    ("line", "trouble"),
    [
        (
            "*.c.example a",
            '1: *.c.example can never match: "*" is not special here; write ".c.example" for c.example and all below it',
        ),
        ("@d.example a", '1: @d.example can never match: write the domain alone: "d.example"'),
        ("b.example:25 a", "1: b.example:25 can never match: recipients are compared, which have no port"),
        ("x@y@z a", "1: x@y@z can never match: it has more than one @"),
        ("b.example. a", '1: b.example. can never match: domains are compared without the dot at the end; write "b.example"'),
        ("b.example a\nB.EXAMPLE c", "2: B.EXAMPLE is there twice; the last line counts"),
        ('b.example a\n.b.example a\nx@b.example a\n/^y@/ a\n"x@y"@z.example c\npostmaster a', None),
    ],
)
def test_lines_of_the_route_map_that_match_nothing_are_notes(tmp_path, line, trouble):
    (tmp_path / "map").write_text(line + "\n")
    routes = [{"name": "a", "hosts": ["h"]}, {"name": "c", "hosts": ["g"]}]
    config = load(None, {"listener": [{"address": "127.0.0.1:1"}], "route": routes, "route_map": str(tmp_path / "map")})
    assert map_notes(config) == ([f"{tmp_path}/map:{trouble}"] if trouble else [])


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"password_file": "/p"}, "route.0.password_file: needs username"),
        ({"password_env": "P"}, "route.0.password_env: needs username"),
        ({"username": "u", "tls": "verify", "password_env": "P", "password_file": "/p"},
         "route.0.password_env: password_file is given, too: give one of them"),
        ({"hosts": ["x:"]}, "route.0.hosts.0: 'x:': expected host:port"),
    ],
)  # fmt: skip
def test_what_a_route_does_not_use_is_refused(keys, expected):
    with pytest.raises(ConfigError) as refused:
        load(None, {"listener": [{"address": "127.0.0.1:1"}], "route": [{"hosts": ["h"]} | keys]})
    assert [problem.removeprefix("command line: ") for problem in refused.value.problems] == [expected]
