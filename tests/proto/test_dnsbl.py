"""Lists in the DNS: what is asked, and what the answers mean."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.dnsbl import Codes, reversed_address

ADDRESSES = st.ip_addresses()


@pytest.mark.parametrize("address, name", [
    ("192.0.2.99", "99.2.0.192"), ("::ffff:192.0.2.99", "99.2.0.192"),
    ("2001:db8:1:2:3:4:567:89ab", "b.a.9.8.7.6.5.0.4.0.0.0.3.0.0.0.2.0.0.0.1.0.0.0.8.b.d.0.1.0.0.2"),
    ("::1", "1." + "0." * 30 + "0"),
])  # fmt: skip
def test_how_an_address_is_asked_for(address, name):
    assert reversed_address(address) == name


@given(ADDRESSES)
def test_an_address_turned_round_twice_is_itself(address):
    name = reversed_address(str(address))
    digits = name.split(".")[::-1]
    mapped = getattr(address, "ipv4_mapped", None) or address
    if len(digits) == 4:
        assert ipaddress.ip_address(".".join(digits)) == mapped
    else:
        assert ipaddress.ip_address(":".join("".join(digits[at : at + 4]) for at in range(0, 32, 4))) == address


@pytest.mark.parametrize("text", ["", "x", "192.0.2", "192.0.2.256", "[192.0.2.1]", "unknown", "1:2"])
def test_what_is_no_address(text):
    with pytest.raises(ValueError):
        reversed_address(text)


@pytest.mark.parametrize("text, what", [
    ("127.0.0", "is none of"), ("127.0.0.2-", "is none of"), ("127.0.0.9-2", "is none of"), ("127.0.0.2-256", "is none of"),
    ("127.0.0-3.2", "is none of"), ("127.0.0.0/33", "is none of"), ("127.0.0.1/24", "is none of"), ("", "is none of"),
    ("::1", "is none of"), ("127.0.0.٢", "is none of"), ("127.0.0.2-٣", "is none of"), ("127.0.0.2 ", "is none of"),
    ("10.0.0.2", "within 127.0.0.0/8"), ("0.0.0.0/0", "within 127.0.0.0/8"), ("127.0.0.1", "does not answer us"),
    ("127.255.255.254", "does not answer us"), ("127.255.255.1-254", "does not answer us"),
    ("127.255.255.0/24", "does not answer us"),
])  # fmt: skip
def test_what_codes_are_not(text, what):
    with pytest.raises(ValueError, match=what):
        Codes([text])


@pytest.mark.parametrize("answers, kind, codes", [
    (["127.0.0.2"], "listed", ["127.0.0.2"]), (["127.0.0.2", "127.0.0.11", "127.0.0.12"], "listed", ["127.0.0.2", "127.0.0.11"]),
    (["127.0.0.12"], "other", []), (["127.0.1.7"], "listed", ["127.0.1.7"]), ([], "other", []),
    (["127.255.255.254"], "refused", ["127.255.255.254"]), (["127.0.0.1"], "refused", ["127.0.0.1"]),
    (["203.0.113.9"], "refused", ["203.0.113.9"]), (["127.0.0.2", "127.255.255.252"], "refused", ["127.255.255.252"]),
    (["nonsense"], "refused", ["nonsense"]), (["::1"], "refused", ["::1"]),
])  # fmt: skip
def test_what_answers_mean(answers, kind, codes):
    """Case 10: codes that say that the list does not answer do not list anybody."""
    found = Codes(["127.0.0.2-11", "127.0.1.0/24"]).match(answers)
    assert (found.kind, list(found.codes)) == (kind, codes)


@given(st.integers(0, 255), st.integers(0, 255), st.lists(st.ip_addresses(v=4, network="127.0.0.0/23"), max_size=5))
def test_a_range_is_what_is_in_it(first, last, answers):
    if first > last or first == last == 1:
        return
    inside = {f"127.0.0.{n}" for n in range(first, last + 1)}
    given_answers = [str(one) for one in answers]
    found = Codes([f"127.0.0.{first}-{last}"]).match(given_answers)
    if "127.0.0.1" in given_answers:
        assert found.kind == "refused"
    else:
        assert list(found.codes) == [one for one in given_answers if one in inside]
