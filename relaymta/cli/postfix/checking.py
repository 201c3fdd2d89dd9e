"""header_checks and refused recipients, as rules about mail."""

import re
from collections.abc import Iterator

from pydantic import ValidationError

from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.findings import Findings
from relaymta.cli.postfix.lines import Origin
from relaymta.cli.postfix.main_cf import Scope
from relaymta.cli.postfix.patterns import Rule
from relaymta.cli.postfix.resolving import maps_of
from relaymta.cli.postfix.routing import Refusal
from relaymta.cli.postfix.toml_text import Row, Section
from relaymta.config import MailRule

__all__ = ["header_rules", "refusal_rules"]

_VERDICTS = {"REJECT": "reject", "DISCARD": "discard", "HOLD": "hold", "WARN": "accept"}
_FIELD = re.compile(r"\^([A-Za-z0-9-]+):(?:\s|\\s[*+]?|\[ \\t\][*+]?| [*+])*(.*)\Z", re.S)
_CODE = re.compile(r"([45]\.\d{1,3}\.\d{1,3})\s+(.*)\Z", re.S)
LONGEST = 200  # characters of a reply that are carried


def refusal_rules(refusals: list[Refusal], findings: Findings) -> Iterator[Section]:
    """Recipients that Postfix refuses by error: and relocated_maps."""
    for number, refusal in enumerate(refusals, 1):
        rows = [Row("name", "refused recipients" if number == 1 else f"refused recipients {number}", refusal.origin)]
        addresses = [one.value for one in refusal.recipients if one.kind == "address"]
        domains = [one.pattern for one in refusal.recipients if one.kind != "address"]
        verdict, reply = _reply(refusal.text)
        for key, values in (("recipient", addresses), ("recipient_domain", domains)):
            if values:
                name = rows[0] if key == "recipient" or not addresses else rows[0]._replace(value=f"refused domains {number}")
                yield Section("[[mail_rule]]", [name, Row(key, values), *verdict, Row("reply", reply), Row("enforce", True)])
        instead = "a rule refuses the whole message, for its other recipients, too; Postfix refuses these recipients alone"
        findings.note(refusal.origin.place, f"error: {refusal.text}", instead)


def _reply(text: str) -> tuple[list[Row], str]:
    """The rows of the verdict, and the reply."""
    match = _CODE.match(text)
    code, words = (match[1], match[2]) if match is not None else ("5.1.1", text)
    words = re.sub(r"[^ -z|~]+", " ", words).strip()[:LONGEST] or "Address is undeliverable"
    return ([Row("verdict", "tempfail")], f"450 {code} {words}") if code[0] == "4" else ([], f"550 {code} {words}")


def header_rules(scope: Scope, files: Files, findings: Findings) -> Iterator[Section]:
    """header_checks, as far as a rule has the same condition and verdict."""
    maps = maps_of(scope, files, "header_checks")
    for one in maps.unreadable:
        findings.gap(one.place, f"header_checks = {one.spec}", f"{one.why}: write [[mail_rule]] tables (docs/rules.md)")
    ended = False  # by a rule that is not carried: what is behind it may not be reached
    for number, rule in enumerate(maps.rules, 1):
        made = None if ended else _header_rule(rule, number)
        if made is None:
            instead = "write a [[mail_rule]] with header = [...] (docs/rules.md); fields are changed by a milter or a hook"
            findings.gap(rule.place, f"{rule.text} {rule.value}", instead)
            ended = ended or rule.value.upper().startswith(("DUNNO", "OK"))
        else:
            yield made


def _header_rule(rule: Rule, number: int) -> Section | None:
    match = _FIELD.match(rule.expression)
    word, _, text = rule.value.partition(" ")
    verdict = _VERDICTS.get(word.upper())
    if match is None or verdict is None or not rule.exact or "$" in rule.value or not match[2]:
        return None
    expression = re.sub(r"(?<!\\)/", "/", match[2])
    condition = f"{match[1]}: (?i)^(?:{expression})"
    try:
        MailRule(name="x", header=[condition])
    except ValidationError:  # RE2 does not take it
        return None
    rows = [Row("name", f"header check {number}", Origin(rule.place)), Row("header", [condition])]
    rows.append(Row("verdict", verdict))
    if verdict == "reject":
        rows.append(Row("reply", _reply(text.strip() or "5.7.1 message content rejected")[1]))
    return Section("[[mail_rule]]", [*rows, Row("enforce", True)])
