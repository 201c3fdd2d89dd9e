"""Message data of requests by HTTP: read back by the standard library it is what the request says, and nothing else."""

import binascii
import email
import email.policy
import json
import mmap
import os
import random
import re
import tracemalloc
from email.header import decode_header, make_header
from email.headerregistry import Address
from email.utils import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaymta.accept.http import compose as composing
from relaymta.accept.http import fields
from relaymta.accept.http.compose import compose
from relaymta.accept.http.models import Limits, Wrong, check_text, parse
from relaymta.proto.mailbox import authors
from tests.support.http_messages import STRINGS, Held, base64_of, check, full, hostile, made, read

BASE = {"from": "Ann <ann@a.example>", "to": "bob@b.example", "subject": "Hello", "text": "Hi"}
FIELDS = ["From", "To", "Subject", "MIME-Version", "Content-Type", "Content-Transfer-Encoding"]

shown = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=60)
names = st.one_of(
    shown, st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60), st.sampled_from(["=?x?q?y?=", '"', "\\"])
)
texts = st.one_of(
    st.text(max_size=300),
    st.text(st.sampled_from("ab =.\t\r\nä-_"), max_size=300),
    st.sampled_from(["x" * 999, "ä" * 999, "x \n" * 300]),
).map(lambda text: text.replace("\0", "").encode("utf-8", "ignore").decode())
locals_ = st.from_regex(r"\A[a-zA-Z0-9_+-]{1,10}(\.[a-z]{1,5})?\Z") | st.from_regex(r"\A[äöüα-ω]{1,5}\Z") | st.just('"a b@\\""')
domains = st.sampled_from(["a.example", "B.example", "bücher.example", "[192.0.2.1]", "[IPv6:2001:db8::1]"])
people = st.builds(lambda local, domain, name: {"email": f"{local}@{domain}", "name": name}, locals_, domains, names)


def lines_of(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n")


def text_of(part) -> str:
    return part.get_payload(decode=True).decode()


def filename_of(part) -> str:
    return part["Content-Disposition"].params["filename"]  # (get_filename() has no white space around it)


def as_addresses(header) -> list[tuple[str, str]]:
    return [(one.username, one.domain) for one in header.addresses]


def said(name: str) -> str:
    """A display name, with one space where there are several."""
    return " ".join(filter(None, name.split(" ")))


def expected(one: dict) -> tuple[str, str]:
    local, _, domain = one["email"].rpartition("@")
    if local.isascii():
        domain = domain.replace("bücher", "xn--bcher-kva")
    return Address(addr_spec=f"{local}@x").username, domain


def test_a_plain_text_is_sent_as_it_is():
    found, data = made(BASE)
    assert (found.sender, found.recipients, found.utf8) == ("ann@a.example", ["bob@b.example"], False)
    assert data == (
        b"From: Ann <ann@a.example>\r\nTo: bob@b.example\r\nSubject: Hello\r\nMIME-Version: 1.0\r\n"
        b'Content-Type: text/plain; charset="utf-8"\r\nContent-Transfer-Encoding: 7bit\r\n\r\nHi\r\n'
    )


@given(
    people, st.lists(people, max_size=8), st.lists(people, max_size=4), st.lists(people, max_size=3), st.lists(people, max_size=3)
)
def test_mailboxes_are_read_back(author, to, cc, bcc, reply_to):
    if not to + cc + bcc:
        return
    found, data = made(BASE | {"from": author, "to": to, "cc": cc, "bcc": bcc, "reply_to": reply_to, "envelope_from": ""})
    message = read(data) if found.utf8 is False else None
    everybody = [author, *to, *cc, *bcc, *reply_to]
    assert found.utf8 == any(not one["email"].rpartition("@")[0].isascii() for one in everybody)
    assert found.sender == "" and len(found.recipients) <= len(to + cc + bcc)
    (read_author,) = authors(data.partition(b"\r\n\r\n")[0] + b"\r\n")
    assert read_author.local == author["email"].rpartition("@")[0]
    if message is not None:
        assert "Bcc" not in message
        for name, sent in (("From", [author]), ("To", to), ("Cc", cc), ("Reply-To", reply_to)):
            assert (as_addresses(message[name]) if name in message else []) == [expected(one) for one in sent], name


@given(st.lists(names | st.text(st.sampled_from('a ä=?_\\"'), max_size=250), min_size=1, max_size=4))
def test_display_names_are_read_back(called):
    """(The `display_name` of email.headerregistry has spaces between encoded words in some versions of Python.)"""
    _, data = made(BASE | {"to": [{"email": "a@b", "name": name} for name in called]})
    value = email.message_from_bytes(data, policy=email.policy.compat32)["To"].replace("\r\n", "")
    found = re.findall(r'(?:("(?:[^"\\]|\\.)*") |([^",]*) )?<?a@b>?(?:, |\Z)', value)
    read_names = [
        unquote(quoted) if quoted else str(make_header(decode_header(atoms))) if atoms else "" for quoted, atoms in found
    ]
    assert read_names == [said(name) for name in called]
    assert len(read(data)["To"].addresses) == len(called)


@given(shown | st.text(st.sampled_from("a =?_"), max_size=400), st.lists(shown | st.just("x " * 500), max_size=4))
def test_subject_and_values_are_read_back(subject, values):
    if len(subject) > 2000:
        return
    _, data = made(
        BASE | {"subject": subject, "headers": {"X-Some": values, "X-Other-With-A-Name-That-Is-Quite-Long": "ä" + subject}}
    )
    message = read(data)
    assert str(message["Subject"]) == subject
    assert [str(one) for one in message.get_all("X-Some", [])] == values
    assert str(message["X-Other-With-A-Name-That-Is-Quite-Long"]) == "ä" + subject


TEXTS = [
    "=?utf-8?q?x?=",
    "a =?utf-8?b?YQ==?= b",
    ("word" * 5 + "   ") * 60 + ".",
    " a",
    "a ",
    "word " * 90 + ".",
    "x" * 1000,
    "w" * 100,
    "",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_subject_is_read_back(text):
    _, data = made(BASE | {"subject": text})
    assert str(read(data)["Subject"]) == text
    lines = data.split(b"\r\n")
    assert not any(line.endswith((b" ", b":")) for line in lines if line != b"Subject: ")
    if "   " not in text:
        assert max(map(len, lines)) <= 118


@given(texts)
def test_a_text_is_read_back(text):
    _, data = made(BASE | {"text": text})
    body = text_of(read(data))
    assert body in (lines_of(text), lines_of(text) + "\r\n")


UNITS = [
    "a", "ä", "😀", "=", "a b\t", "ab=\n", "ä\r\n", ".\n", "From \n", " " * 70 + "\n", "x" * 997 + "\n", "\n",
]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS, ids=repr)
@pytest.mark.parametrize("before", [0, 1, 74, 75, 76, 77])
def test_a_large_text_is_composed_in_slices_and_read_back(monkeypatch, unit, before):
    """No call has more than a slice."""
    sizes = []
    for name in ("b2a_qp", "b2a_base64"):
        call = getattr(binascii, name)
        monkeypatch.setattr(
            composing.binascii, name, lambda data, call=call, **named: sizes.append(len(data)) or call(data, **named)
        )
    text = "x" * before + unit * (200_000 // len(unit))
    _, data = made(BASE | {"text": text, "html": "h\n"})
    monkeypatch.undo()
    assert all(size <= composing.PIECE for size in sizes)
    part = read(data).get_body(("plain",))
    assert text_of(part) == lines_of(text)
    if part["content-transfer-encoding"] != "7bit":
        assert max(map(len, data.split(b"\r\n"))) <= 78


@pytest.mark.parametrize("character", ["ä", "€", "😀", "="])
def test_no_character_is_cut_by_the_q_encoding(character):
    for before in range(140):
        words = fields._encoded("a" * before + character + "ä" + "a" * 80, 10)
        assert all(word.startswith("=?utf-8?q?") for word in words)
        assert [one.decode() for word in words for one, _ in decode_header(word)]


@given(st.text(st.sampled_from("aä😀= _?\u0301"), max_size=400), st.integers(0, 76))
def test_encoded_words_have_whole_characters_and_fit(text, before):
    words = fields._encoded(text, before)
    assert str(make_header(decode_header("\r\n ".join(words)))) == text or not text
    for number, word in enumerate(words):
        assert len(word) <= (75 if number else max(76 - before, 24))
        ((octets, charset),) = decode_header(word) if word else ((b"", "utf-8"),)
        assert charset == "utf-8" and octets.decode() is not None


@given(texts, texts, st.lists(st.tuples(names.filter(bool), st.binary(max_size=200), st.booleans(), st.booleans()), max_size=4))
def test_parts_are_read_back(text, html, files):
    attachments, parts = [], {}
    for number, (name, octets, image, beside) in enumerate(files):
        one = {"filename": name, "content_type": "image/png" if image else "application/x-some"}
        if image:
            one["content_id"] = f"i{number}"
        if beside:
            one["part"] = f"p{number}"
            parts[f"p{number}"] = Held(octets, 7)
        else:
            one["content"] = base64_of(octets)
        attachments.append(one)
    _, data = made(BASE | {"text": text, "html": html, "attachments": attachments}, parts)
    message = read(data)
    plain, rich = message.get_body(("plain",)), message.get_body(("html",))
    assert (text_of(plain), text_of(rich)) == (lines_of(text), lines_of(html))
    leaves = [part for part in message.walk() if not part.is_multipart() and part.get_content_maintype() != "text"]
    found = {
        (filename_of(part), part.get_payload(decode=True), part["Content-ID"], part.get_content_disposition()) for part in leaves
    }
    assert len(leaves) == len(files)
    assert found == {
        (name, octets, f"<i{number}>" if image else None, "inline" if image else "attachment")
        for number, (name, octets, image, _) in enumerate(files)
    }


STRUCTURES = [
    ({"text": "a"}, "text/plain"),
    ({"html": "a"}, "text/html"),
    ({"text": "a", "html": "b"}, ["multipart/alternative", "text/plain", "text/html"]),
    ({"html": "b", "files": "i"}, ["multipart/related", "text/html", "image/png"]),
    ({"text": "a", "files": "i"}, ["multipart/mixed", "text/plain", "image/png"]),
    ({"files": "a"}, ["multipart/mixed", "application/pdf"]),
    (
        {"text": "a", "html": "b", "files": "aia"},
        [
            "multipart/mixed",
            ["multipart/alternative", "text/plain", ["multipart/related", "text/html", "image/png"]],
            "application/pdf",
            "application/pdf",
        ],
    ),
]


@pytest.mark.parametrize(("given_", "structure"), STRUCTURES)
def test_the_structure(given_, structure):
    files = {
        "i": {"filename": "i.png", "content_type": "image/png", "content_id": "i", "content": "YQ=="},
        "a": {"filename": "a.pdf", "content_type": "application/pdf", "content": "YQ=="},
    }
    request = {"from": "a@b", "to": "c@d"} | given_
    _, data = made(request | {"attachments": [files[one] for one in request.pop("files", "")]})

    def of(part):
        kind = part.get_content_type()
        return [kind, *map(of, part.iter_parts())] if part.is_multipart() else kind

    assert of(read(data)) == structure


@pytest.mark.parametrize("name", STRINGS)
@settings(max_examples=max(settings.default.max_examples // 4, 25))
@given(
    value=hostile,
    at=st.integers(-1, 12),
    beside=st.sampled_from(list(STRINGS)),
    other=hostile | st.none(),
    as_object=st.booleans(),
)
def test_no_value_adds_a_field_a_part_or_a_recipient(name, value, at, beside, other, as_object):
    """One or two strings of a request are hostile, or have something hostile in them: the fields, parts and recipients are those
    that it names, or it is refused."""
    value = value if at < 0 else STRINGS[name][:at] + value + STRINGS[name][at:]
    of = STRINGS | ({} if other is None else {beside: other}) | {name: value}
    request = full(of, as_object)
    try:
        found, octets = made(request, {"p": Held(b"abc")})
    except Wrong as error:
        assert error.field.isprintable() and error.detail.isprintable() and error.detail
        return
    once = ["From", "Sender", "Reply-To", "To", "Cc", "Subject", "MIME-Version", "Content-Type"]
    expected = sorted([*once, *(one for one in request["headers"] if one != "Sender")])
    header = octets.partition(b"\r\n\r\n")[0]
    fields_there = [line.partition(b":")[0].decode() for line in header.split(b"\r\n") if line[:1] != b" "]
    assert sorted(fields_there) == expected
    assert len(found.recipients) <= 4
    assert all(one.count("@") == 1 or one[0] == '"' for one in found.recipients)
    assert b"hidden@h.example" not in octets or "hidden@h.example" in json.dumps({**request, "bcc": ""})
    # Programs that take other octets for a line end see no other fields either.
    for line in re.split("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", header.decode()):
        assert line == "" or line[:1] == " " or line.partition(":")[0] in expected
    if not found.utf8:
        message = read(octets)
        assert sorted(message.keys()) == expected
        kinds = [part.get_content_type() for part in message.walk() if part.is_multipart()]
        assert kinds == ["multipart/mixed", "multipart/alternative", "multipart/related"]
        assert len(list(message.walk())) == 7
        assert [len(message[name].addresses) for name in ("From", "To", "Cc", "Reply-To")] == [1, 2, 1, 1]


def test_the_request_that_has_each_kind_of_string_is_valid():
    found, octets = made(full(STRINGS, True), {"p": Held(b"abc")})
    assert found.recipients == ["bob@b.example", "c@d", "d@e", "hidden@h.example"]
    assert made(full(STRINGS, False), {"p": Held(b"abc")})[0].recipients == found.recipients
    assert b"Sender: s@s\r\n" in octets


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "a\rb", "a\0b", "a\r\n b"])
def test_no_field_is_made_of_a_value_with_a_line_end(value):
    """Also where nobody has checked it before."""
    for make in (
        lambda: fields.unstructured("X", value),
        lambda: fields.structured("X", value),
        lambda: fields.addresses("To", [("a@b", value)]),
        lambda: fields.addresses("To", [(f"{value}@b", "")]),
    ):
        with pytest.raises(ValueError, match=r"line end|cannot be sent"):
            make()
    assert fields.disposition("inline", value).count(b"\n") == fields.disposition("inline", value).count(b"\r\n ") + 1


def test_recipients_are_there_once_and_bcc_is_hidden():
    found, data = made(BASE | {"to": ["b@x.example", "A@x.example"], "cc": "a@x.example", "bcc": ["c@x.example", "B@X.example"]})
    assert found.recipients == ["b@x.example", "A@x.example", "c@x.example"]
    assert b"c@x.example" not in data
    found, data = made(BASE | {"to": [], "bcc": "c@x.example"})
    assert found.recipients == ["c@x.example"] and b"\r\nTo: undisclosed-recipients:;\r\n" in data and b"c@x" not in data


def test_many_recipients_stay_within_a_header():
    found, data = made(BASE | {"to": [f"a-user-with-a-name-{number}@some.example" for number in range(1000)]})
    assert len(found.recipients) == 1000 and len(read(data)["To"].addresses) == 1000
    with pytest.raises(Wrong) as caught:
        made(BASE | {"to": [{"email": f"a{number}@b", "name": "ä" * 250} for number in range(1000)]})
    assert caught.value.field == "to"
    with pytest.raises(Wrong) as caught:
        made(BASE | {"headers": {f"X-{number}": "ä" * 2000 for number in range(100)}})
    assert caught.value.field == "headers"


def test_a_text_that_has_the_boundary_gets_another(monkeypatch):
    tokens = iter(["aa", "bb", "bb"])
    monkeypatch.setattr(composing.secrets, "token_hex", lambda octets: next(tokens))
    _, data = made(BASE | {"text": "a\n--=_aa--\nb", "html": "c"})
    assert b'boundary="=_bb"' in data
    assert len(read(data).get_payload()) == 2


BAD_BASE64 = [
    "YQ", "YQ=", "YQ===", "Y", "=", "====", "YQ==YQ==", "YR==", "YWF=", "YQ==\n", "YW\nJj", " YQ==", "YQ-_", "YQ\u00e4=",
    "Y=Q=", "\\/",
    "AAAA" * 16000 + "=", "AAAA" * 15960 + "A===", "A" * 63840 + "=AAA", "AAAA" * 15960 + "*AAA",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_BASE64, ids=range(len(BAD_BASE64)))
def test_base64_is_checked_strictly(text):
    with pytest.raises(Wrong) as caught:
        made(BASE | {"attachments": [{"filename": "a", "content": "YQ=="}, {"filename": "a", "content": text}]})
    assert caught.value.field == "attachments[1].content"


@pytest.mark.parametrize("inner", [r"\\/AAA", r"\\\/AA", r"\u005c/AAA", r"A\u002xAA", r"\nAAA", r"AAA\\"])
@pytest.mark.parametrize("before", [0, 63828, 63829, 63830, 63831, 63832, 63833, 63834, 63835])
def test_an_escaped_backslash_is_no_base64(inner, before):
    """Wherever the pieces end in which it is read."""
    text = json.dumps(BASE | {"attachments": [{"filename": "a", "content": "CONTENT"}]})
    with pytest.raises(Wrong):
        compose(parse(text.replace("CONTENT", "A" * before + inner + "A" * (-before % 4)).encode()))


@pytest.mark.parametrize("octets", [0, 1, 2, 3, 56, 57, 58, 47879, 47880, 47881, 47883, 200000])
@pytest.mark.parametrize("escape", [None, "/+", "/+=", "A/", "/"])
def test_base64_of_any_length_with_and_without_escapes(octets, escape):
    """JSON has several spellings of a character; PHP escapes / and .NET escapes +."""
    content = random.Random(octets).randbytes(octets)
    text = json.dumps(BASE | {"attachments": [{"filename": "a", "content": "CONTENT"}, {"filename": "a", "part": "p"}]})
    inner = base64_of(content)
    for character in escape or "":
        inner = inner.replace(character, "\\/" if character == "/" and escape != "/+" else f"\\u{ord(character):04x}")
    message = parse(text.replace("CONTENT", inner).encode())
    found = compose(message, {"p": Held(content)})
    data = b"".join(found.pieces)
    assert len(data) == found.size
    check(data, False)
    assert [part.get_payload(decode=True) for part in read(data).iter_attachments()] == [content, content]
    assert b"".join(compose(message, {"p": Held(content, 1000)}).pieces).count(b"\r\n") == data.count(b"\r\n")


def test_a_part_that_is_not_there_or_ends_too_early():
    request = BASE | {"attachments": [{"filename": "a", "part": "p"}]}
    with pytest.raises(Wrong, match=r"attachments\[0\].part"):
        made(request, {"q": Held(b"")})
    short = Held(b"abc")
    short.size = 4
    found = compose(parse(json.dumps(request).encode()), {"p": short})
    with pytest.raises(Wrong, match=r"attachments\[0\].part: it has ended"):
        list(found.pieces)


def test_an_attachment_is_never_in_memory_as_a_whole(tmp_path):
    """30 MB, as JSON in a file, and as a part in a file."""
    octets = 30 << 20
    path = tmp_path / "request"
    with open(path, "wb") as file:
        file.write(
            json.dumps(BASE | {"attachments": [{"filename": "a", "content": "CONTENT"}]}).encode().partition(b"CONTENT")[0]
        )
        for _ in range(octets // 3 // 1024):
            file.write(b"AbC/" * 1024)
        file.write(b'"},{"filename":"b","part":"p"}]}')
    number = os.open(path, os.O_RDONLY)

    class File:
        size = octets

        def read(self, at: int, most: int) -> bytes:
            return os.pread(number, most, at)

    buffer = mmap.mmap(number, 0, prot=mmap.PROT_READ)
    tracemalloc.start()
    try:
        found = compose(parse(buffer), {"p": File()})
        length = sum(map(len, found.pieces))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        os.close(number)
    assert length == found.size > 2 * octets * 4 // 3
    assert peak < 2 << 20


def test_texts_for_a_header():
    assert check_text("a😀\u200d\u202e", "subject", 4) == "a😀\u200d\u202e"
    with pytest.raises(Wrong, match="5 characters"):
        check_text("aaaaa", "subject", 4)
    assert Limits().recipients == 1000
