"""Reports of complaints (RFC 5965)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.arf import NotAReport, Report, parse

# RFC 5965, appendix B.2, with another recipient in To:.
REPORT = b"""\
From: <abusedesk@example.com>
Date: Thu, 8 Mar 2005 17:40:36 EDT
Subject: FW: Earn money
To: <abuse@example.net>
MIME-Version: 1.0
Content-Type: multipart/report; report-type=feedback-report;
     boundary="part1_13d.2e68ed54_boundary"

--part1_13d.2e68ed54_boundary
Content-Type: text/plain; charset="US-ASCII"
Content-Transfer-Encoding: 7bit

This is an email abuse report for an email message
received from IP 192.0.2.1 on Thu, 8 Mar 2005 14:00:00 EDT.

--part1_13d.2e68ed54_boundary
Content-Type: message/feedback-report

Feedback-Type: ABUSE
User-Agent: SomeGenerator/1.0
Version: 1
Original-Mail-From: <somespammer@example.net>
Original-Rcpt-To: <user@example.com>
Original-Rcpt-To: rfc822; <other@example.com>
Received-Date: Thu, 8 Mar 2005 14:00:00 EDT
Source-IP: 192.0.2.1
Feedback-Type: fraud

--part1_13d.2e68ed54_boundary
Content-Type: message/rfc822
Content-Disposition: inline

From: <somespammer@example.net>
To: Ann <ann@example.com>
Subject: Earn money
Message-ID: <8787KJKJ3K4J3K4J3K4J3.mail@example.net>

Spam Spam Spam
--part1_13d.2e68ed54_boundary--
"""
HIDDEN = REPORT.replace(b"Original-Rcpt-To: <user@example.com>\n", b"").replace(
    b"Original-Rcpt-To: rfc822; <other@example.com>\n", b""
)


@pytest.mark.parametrize("data", [REPORT, REPORT.replace(b"\n", b"\r\n")], ids=["LF", "CRLF"])
def test_a_report_says_who_has_complained_about_what(data):
    assert parse(data) == Report(
        "abuse", ["user@example.com", "other@example.com"], "somespammer@example.net", "192.0.2.1", "SomeGenerator/1.0",
        "<8787KJKJ3K4J3K4J3K4J3.mail@example.net>", "<somespammer@example.net>",
    )  # fmt: skip


def test_a_recipient_who_is_hidden_is_looked_for_in_the_message():
    assert parse(HIDDEN).recipients == ["ann@example.com"]
    assert parse(HIDDEN.replace(b"Ann <ann@example.com>", b"ann@example.com, bob@example.com")).recipients == []
    assert parse(HIDDEN.replace(b"Ann <ann@example.com>", b"undisclosed-recipients:;")).recipients == []
    assert parse(HIDDEN.replace(b"Ann <ann@example.com>", b"<redacted>")).recipients == []
    header_alone = HIDDEN.replace(b"message/rfc822", b"text/rfc822-headers")
    assert parse(header_alone).recipients == ["ann@example.com"] and parse(header_alone).message_id.startswith("<8787")


def test_the_kind_and_what_is_missing():
    assert parse(REPORT.replace(b": ABUSE", b": not-spam")).kind == "not-spam"
    few = parse(HIDDEN.replace(b"Content-Type: message/rfc822", b"Content-Type: text/plain").replace(b"Source-IP", b"X"))
    assert few.recipients == [] and few.message_id == few.author == few.source == ""


@pytest.mark.parametrize(("data", "why"), [
    (b"", "no part of the type"), (b"Subject: x\r\n\r\nFeedback-Type: abuse\r\n", "no part of the type"),
    (REPORT.replace(b"message/feedback-report\n", b"text/plain\n"), "no part of the type"),
    (REPORT.replace(b"Feedback-Type", b"X-Type"), "no Feedback-Type"),
])  # fmt: skip
def test_what_is_no_report_says_why(data, why):
    with pytest.raises(NotAReport, match=why):
        parse(data)


@given(
    st.lists(
        st.sampled_from([*REPORT.splitlines(True), b"--", b"\r", b"\0", b"\xff", b"To: <", b"Original-Rcpt-To: a@b\n"]),
        max_size=60,
    )
)
def test_any_octets_are_a_report_or_none(lines):
    try:
        found = parse(b"".join(lines))
    except NotAReport:
        return
    assert found.kind and all("@" in one for one in found.recipients)
