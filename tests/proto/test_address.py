"""Domains in the form of the DNS."""

import pytest

from relaymta.proto.address import DomainError, normalize_domain


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Example.TEST.", "example.test"), ("xn--DMAIN-jua.test", "xn--dmain-jua.test"),  # RFC 5890 2.3.2.1: case does not matter
        ("dömain.test", "xn--dmain-jua.test"), ("DÖMAIN.Test", "xn--dmain-jua.test"), ("do\u0308main.test", "xn--dmain-jua.test"),
        ("dömain.test.", "xn--dmain-jua.test"), ("dömain。test", "xn--dmain-jua.test"), ("dömain.test。", "xn--dmain-jua.test"),
        ("straße.test", "xn--strae-oqa.test"), ("пример.испытание", "xn--e1afmkfd.xn--80akhbyknj4f"),  # IDNA 2008; RFC 3696
        ("xn--dmain-jua.dömain.test", "xn--dmain-jua.xn--dmain-jua.test"), ("_spf.dömain.test", "_spf.xn--dmain-jua.test"),
        ("a_b.dömain.test", "a_b.xn--dmain-jua.test"), ("ｅｘample.dömain.test", "example.xn--dmain-jua.test"),
    ],
)  # fmt: skip
def test_the_forms_of_a_domain_are_one(written, expected):
    assert normalize_domain(written) == expected


@pytest.mark.parametrize(
    "written",
    ["", ".", "a..test", "dömain..test", ".dömain.test", "a＠b.test", "a\u00a0b.test", "dö main.test", "dömain;.test", "☃.test",
     "ö" * 64 + ".test", "ö." * 60 + "test" + ".ö" * 80, "a" * 64],
)  # fmt: skip
def test_what_is_no_domain_has_no_form(written):
    with pytest.raises(DomainError):
        normalize_domain(written)
