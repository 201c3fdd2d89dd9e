"""Names that lists in the DNS are asked, and what their answers mean (RFC 5782)."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.dnsbl import Codes, Result, reversed_address

NAMES = [
    # (address, name, source)
    ("192.0.2.99", "99.2.0.192", "RFC 5782 2.1"),
    ("127.0.0.2", "2.0.0.127", "RFC 5782 5"),
    ("2001:db8:1:2:3:4:567:89ab", "b.a.9.8.7.6.5.0.4.0.0.0.3.0.0.0.2.0.0.0.1.0.0.0.8.b.d.0.1.0.0.2", "RFC 5782 2.4"),
    ("::1", "1" + ".0" * 31, "RFC 5782 2.4: 32 digits"),
    ("2001:DB8::A", "a" + ".0" * 23 + ".8.b.d.0.1.0.0.2", "RFC 5782 2.4"),
    ("::ffff:192.0.2.99", "99.2.0.192", "RFC 4291 2.5.5.2"),
    ("fe80::1%eth0", "1" + ".0" * 28 + ".8.e.f", "RFC 4007 11: the zone is this host's"),
]


@pytest.mark.parametrize(("address", "name", "source"), NAMES)
def test_an_address_is_asked_for_backwards(address, name, source):
    assert reversed_address(address) == name, source


@pytest.mark.parametrize("text", ["", "unknown", "192.0.2", "192.0.2.256", "192.0.2.1/32", "192.0.2.01", "::g", "mail.example"])
def test_what_is_no_address_has_no_name(text):
    with pytest.raises(ValueError, match="does not appear to be"):
        reversed_address(text)


@given(st.ip_addresses())
def test_each_address_has_the_name_that_its_pointer_has(address):
    mapped = getattr(address, "ipv4_mapped", None)
    pointer = (mapped or address).reverse_pointer
    assert reversed_address(str(address)) == pointer.rpartition(".")[0].rpartition(".")[0]


ERRORS = [
    ("", "is none of"), ("127.0.0", "is none of"), ("127.0.0.2-", "is none of"), ("127.0.0-3.2", "is none of"),
    ("*", "is none of"),
    ("127.0.0.2-127.0.0.4", "is none of"), ("127.0.0.2-4/24", "is none of"), (" 127.0.0.2", "is none of"), ("::1", "is none of"),
    ("127.0.0.2\n", "is none of"), ("127.0.0.02", "is none of"), ("127.0.0.0/255.255.255.0", "is none of"), ("2", "is none of"),
    ("127.0.0.\u0662", "is none of"), ("127.0.0.2, 127.0.0.3", "is none of"), ("127.0.0.0/0.0.0.255", "is none of"),
    ("127.0.0.256", "255 at most"), ("127.0.0.2-256", "255 at most"), ("127.0.0.0/33", "prefix 32"), ("999.0.0.2", "255 at most"),
    ("127.0.0.11-2", "ends before it begins"), ("127.0.0.5/24", r"the network is 127\.0\.0\.0/24"),
    ("192.0.2.1", "within 127"), ("127.0.0.0/7", "the network is 126"), ("126.0.0.0/7", "within 127"),
    ("0.0.0.0/0", "within 127"),
    ("127.0.0.1", "cannot count"), ("127.0.0.1/32", "cannot count"), ("127.0.0.1-1", "cannot count"),
    ("127.255.255.254", "cannot count"), ("127.255.255.0/24", "cannot count"), ("127.255.255.250-255", "cannot count"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), ERRORS)
def test_codes_that_are_none_are_named(text, said):
    with pytest.raises(ValueError, match=said) as caught:
        Codes(["127.0.0.2", text])
    assert repr(text) in str(caught.value)


MEANINGS = [
    # (codes, answers, result)
    (["127.0.0.2"], ["127.0.0.2"], ("listed", ["127.0.0.2"])),
    (["127.0.0.2"], ["127.0.0.3"], ("other", [])),
    (["127.0.0.2"], [], ("other", [])),
    ([], ["127.0.0.2"], ("other", [])),
    (["127.0.0.2-11"], ["127.0.0.11", "127.0.0.12", "127.0.0.2", "127.0.0.11"], ("listed", ["127.0.0.2", "127.0.0.11"])),
    (["127.0.1.0/24", "127.0.0.4"], ["127.0.1.255", "127.0.0.4", "127.0.2.0"], ("listed", ["127.0.0.4", "127.0.1.255"])),
    (["127.0.0.0/8"], ["127.255.255.254"], ("refused", ["127.255.255.254"])),
    (["127.0.0.0/8"], ["127.255.255.0"], ("refused", ["127.255.255.0"])),
    (["127.0.0.0/8"], ["127.255.254.255"], ("listed", ["127.255.254.255"])),
    (["127.0.0.0/8"], ["127.0.0.1"], ("refused", ["127.0.0.1"])),
    (["127.0.0.0-2"], ["127.0.0.0"], ("listed", ["127.0.0.0"])),
    (["127.0.0.2"], ["127.0.0.2", "127.255.255.255"], ("refused", ["127.255.255.255"])),
    (["127.0.0.2"], ["203.0.113.9"], ("refused", ["203.0.113.9"])),
    (["127.0.0.2"], ["128.0.0.2", "127.0.0.2"], ("refused", ["128.0.0.2"])),
    (["127.0.0.2"], ["126.255.255.255"], ("refused", ["126.255.255.255"])),
    (["127.0.0.2"], ["::1"], ("refused", ["::1"])),
    (["127.0.0.2"], ["localhost"], ("refused", ["localhost"])),
]


@pytest.mark.parametrize(("codes", "answers", "result"), MEANINGS)
def test_only_codes_that_are_named_count(codes, answers, result):
    kind, found = Codes(codes).match(answers)
    assert (kind, list(found)) == result


def some_codes() -> st.SearchStrategy[tuple[str, set[str]]]:
    """A text, and the addresses that it stands for; all of them near each other, and near the refusals."""
    prefix = st.sampled_from(["127.0.0.", "127.0.1.", "127.255.254.", "127.255.255."])
    ends = st.lists(st.integers(0, 255), min_size=2, max_size=2).map(sorted)

    def network(octets: str, octet: int, length: int) -> tuple[str, set[str]]:
        found = ipaddress.IPv4Network(f"{octets}{octet}/{length}", strict=False)
        return str(found), set(map(str, found))

    return st.one_of(
        st.builds(lambda octets, octet: (f"{octets}{octet}", {f"{octets}{octet}"}), prefix, st.integers(0, 255)),
        st.builds(
            lambda octets, end: (f"{octets}{end[0]}-{end[1]}", {f"{octets}{n}" for n in range(end[0], end[1] + 1)}), prefix, ends
        ),
        st.builds(network, prefix, st.integers(0, 255), st.integers(22, 32)),
    )


REFUSALS = {"127.0.0.1"} | {f"127.255.255.{n}" for n in range(256)}
ANSWERS = st.builds(
    lambda octets, octet: f"{octets}{octet}",
    st.sampled_from(["127.0.0.", "127.0.1.", "127.0.3.", "127.255.254.", "127.255.255.", "203.0.113."]),
    st.sampled_from([0, 1, 2, 3, 4, 127, 128, 254, 255]),
)


@given(st.lists(some_codes(), max_size=4), st.lists(ANSWERS, max_size=5))
def test_codes_are_the_set_of_their_addresses(codes, answers):
    texts = [text for text, _ in codes]
    counting = set().union(*(addresses for _, addresses in codes))
    if any(addresses <= REFUSALS for _, addresses in codes):
        with pytest.raises(ValueError, match="cannot count"):
            Codes(texts)
        return
    refused = [answer for answer in answers if answer in REFUSALS or not answer.startswith("127.")]
    listed = sorted(counting.intersection(answers), key=ipaddress.IPv4Address)
    expected = Result("refused", refused) if refused else Result("listed", listed) if listed else Result("other", ())
    assert Codes(texts).match(answers) == expected


@given(st.text(max_size=20) | st.from_regex(r"[0-9./-]{1,20}"))
def test_any_text_is_codes_or_a_value_error(text):
    try:
        codes = Codes([text])
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        assert codes.match(["127.0.0.1"]).kind == "refused"
