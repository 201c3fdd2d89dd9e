"""Secrets that should not be in mail, found in its decoded text: private keys, keys of clouds, numbers of payment cards.

For rules that refuse or hold what somebody sends by mistake; who means to hide a secret can. Mail of good users is the rule, so
a form alone is not enough: a key has key material, a token an alphabet in which it looks random (words for placeholders and keys
of documentation do not), a card number an issuer, its length, its check digit and the groups in which cards are printed.

Decided:
- Encrypted private keys count, and are called so: their passphrase can be guessed offline.
- Ids that are no secret do not count: an AWS access key id without its secret (NEAR), Twilio's SK..., Stripe's test keys, and
  Google's API keys as `key=` of a URL, which are those of maps in newsletters.
- Card numbers are those of ISSUERS. Maestro is not one: a seventh of all numbers would have its prefix. 13 digits count only in
  groups: a plain one is an EAN, of which those of Germany and Japan begin as Visa does. Public numbers for tests count.
- A number in four groups of four does not count beside a fifth group of four (a table, a dump in hexadecimal digits), or behind
  the beginning of an IBAN.
- What is in a URL, a name with dots or dashes, an address or a Message-ID is no card number, nor are digits behind a point.
- Digits of full width, Arabic, Devanagari and mathematical ones are digits; other spaces and dashes are those of ASCII.

Time is linear in the text, whatever it is: what is read at one place is bounded, and what is looked for near another has its
places found once. 256 K characters take 11 ms where they are prose, 13 ms where they are base64, and at most 70 ms. Of 1 MB of
random numbers of 1 to 20 digits one in 440 is taken for a card number, of those of 16 digits one in 42: a tenth of what has an
issuer's prefix. Of 316 MB of source and documentation 2 are, in tables of Unicode, and what else is found there are keys.
"""

import re
import zlib
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import Final, NamedTuple

__all__ = ["ISSUERS", "KINDS", "MOST", "NEAR", "Secret", "secrets"]

KINDS: Final = ("private key", "cloud key", "card number")
MOST: Final = 20  # that are told of a text
NEAR: Final = 300  # characters between an AWS access key id and its secret; between Mailgun's name and its key
KEY_LEAST: Final = 64  # characters of base64 that make a block a private key: one of Ed25519 has as many
KEY_READ: Final = 2048  # characters behind the first line of a block that are looked at
JWK_READ: Final = 4096  # characters between two members of a JWK
PUTTY_READ: Final = 4096  # characters between the first line of a key of PuTTY and its private lines
PUTTY_LEAST: Final = 40  # characters of base64 there

ISSUERS: Final = (  # name, prefix, lengths
    ("Visa", "4", (13, 16, 19)),
    ("Mastercard", "5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720", (16,)),
    ("American Express", "3[47]", (15,)),
    ("Diners Club", "30[0-59]|3[689]", (14,)),
    ("Discover", "6011|64[4-9]|65", (16,)),
    ("JCB", "352[89]|35[3-8]", (16,)),
    ("UnionPay", "62", (16, 17, 18, 19)),
)


class Secret(NamedTuple):
    """`kind`: one of KINDS; `what`: what it is, for the log and the operator, in printable ASCII: "RSA private key", "card number
    4111...1111", "GitHub token ghp_wJ8r..."; never enough of it to use it."""

    kind: str
    what: str


def secrets(text: str, kinds: Collection[str] = KINDS) -> list[Secret]:
    """The secrets of these kinds in a text, any string, in the order in which they occur: the first MOST, of those that are
    called the same the first. Linear time; memory for a copy of the text, and for the places of what is looked for."""
    found: list[tuple[int, Secret]] = []
    for kind in KINDS:
        if kind in kinds:
            for finder in _FINDERS[kind]:
                first: dict[str, int] = {}
                for place, what in finder(text):
                    first.setdefault(what, place)
                    if len(first) == MOST:
                        break
                found += [(place, Secret(kind, what)) for what, place in first.items()]
    found.sort()
    return list(islice(dict.fromkeys(secret for _, secret in found), MOST))


# What looks random

_PLACEHOLDER = re.compile(
    r"example|placeholder|change_?me|redacted|your[_-]?(?:key|token|secret|api)|insert[_-]|dummy|x{5}|(.)\1{9}"
    r"|12345678|87654321|abcdefgh|qwerty",
    re.I,
)


def _mixed(body: str, least: int = 10) -> bool:
    """Whether it may be random in base64 or base62: letters of both cases (20 random characters have them but for one in 15,000),
    `least` different characters, and not a word for a placeholder."""
    return body != body.upper() and body != body.lower() and len(set(body)) >= least and not _PLACEHOLDER.search(body)


def _varied(body: str) -> bool:
    """Whether it may be random in a form that is narrow by itself, such as hexadecimal digits."""
    return len(set(body)) >= 7 and not body.isdigit() and not _PLACEHOLDER.search(body)


def _github(body: str) -> bool:
    """The last six characters are the CRC-32 of the others in base62 (github.blog, "Behind GitHub's new authentication token
    formats")."""
    rest, digits = zlib.crc32(body[:-6].encode()), ""
    for _ in range(6):
        rest, digit = divmod(rest, 62)
        digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits == body[-6:] and _mixed(body)


def _openai(body: str) -> bool:
    return "T3BlbkFJ" in body and _mixed(body)


def _storage(body: str) -> bool:
    """Not the key of the emulator, which is the same everywhere."""
    return _mixed(body) and not body.startswith("Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq")


# Tokens with a mark in front

_CLEAR: Final = r"(?![0-9A-Za-z_])"


class _Form(NamedTuple):
    """Tokens that begin with a mark. `body`: an expression for what follows, with one group that `good` judges; `unless`: what it
    is not behind, of fixed length; `near`: a word in lower case that is within NEAR characters of it."""

    title: str
    marks: tuple[str, ...]
    body: str
    good: Callable[[str], bool] = _mixed
    unless: str = ""
    near: str = ""
    shown: bool = True  # the mark and what follows it


_CLOUD_FORMS: Final = (
    _Form("Google API key", ("AIza",), rf"([\w-]{{35}}){_CLEAR}", unless="[?&;]key="),
    _Form("Google OAuth client secret", ("GOCSPX-",), rf"([\w-]{{28}}){_CLEAR}"),
    _Form("Azure storage key", ("AccountKey=",), r"([0-9A-Za-z+/]{86}==)", _storage),
    _Form("Azure shared access key", ("SharedAccessKey=",), r"([0-9A-Za-z+/]{43}=)"),
    _Form("GitHub token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), rf"([0-9A-Za-z]{{36}}){_CLEAR}", _github),
    _Form("GitHub token", ("ghs_",), r"(?:[0-9A-Za-z]{1,20}_)?(eyJ[\w-]{10,500}+\.[\w-]{20,500}+\.[\w-]{20,500}+)"),
    _Form("GitHub token", ("github_pat_",), rf"([0-9A-Za-z]{{22}}_[0-9A-Za-z]{{59}}){_CLEAR}"),
    _Form("GitLab token", ("glpat-", "gldt-", "glrt-"), r"([\w-]{20,300}+)"),
    _Form(
        "Slack token", ("xoxb-", "xoxp-", "xoxa-", "xoxr-", "xoxs-"),
        r"(?:[0-9]{1,14}-){1,4}([0-9A-Za-z]{16,200}+)", _varied,
    ),
    _Form("Slack token", ("xapp-",), r"[0-9]-[0-9A-Z]{8,14}-[0-9]{8,16}-([0-9a-f]{64})", _varied),
    _Form("Slack webhook", ("hooks.slack.com/services/",), r"T[0-9A-Z]{6,14}/B[0-9A-Z]{6,14}/([0-9A-Za-z]{24})" + _CLEAR),
    _Form("Stripe key", ("sk_live_", "rk_live_"), r"([0-9A-Za-z]{24,250}+)"),
    _Form("SendGrid key", ("SG.",), rf"([\w-]{{22}}\.[\w-]{{43}}){_CLEAR}"),
    _Form("Mailgun key", ("key-",), rf"([0-9a-f]{{32}}){_CLEAR}", _varied, near="mailgun"),
    _Form("npm token", ("npm_",), rf"([0-9A-Za-z]{{36}}){_CLEAR}"),
    _Form("PyPI token", ("pypi-AgEIcHlwaS5vcmc",), r"([\w-]{50,1000}+)"),
    _Form("DigitalOcean token", ("dop_v1_", "doo_v1_", "dor_v1_"), rf"([0-9a-f]{{64}}){_CLEAR}", _varied),
    _Form("Anthropic key", ("sk-ant-api03-", "sk-ant-admin01-", "sk-ant-oat01-"), r"([\w-]{80,130}+)"),
    _Form("OpenAI key", ("sk-",), r"([\w-]{40,250}+)", _openai),
    _Form("Hugging Face token", ("hf_",), rf"([A-Za-z]{{34}}){_CLEAR}"),
    _Form("Vault token", ("hvs.", "hvb."), r"([\w-]{24,300}+)"),
)  # fmt: skip
_KEY_FORMS: Final = (
    _Form("age private key", ("AGE-SECRET-KEY-1",), rf"([02-9AC-HJ-NP-Z]{{58}}){_CLEAR}", _varied, shown=False),
    _Form("WireGuard private key", ("PrivateKey",), r"[ \t]{0,4}=[ \t]{0,4}([0-9A-Za-z+/]{43}=)", shown=False),
)


def _expression(form: _Form, mark: str) -> re.Pattern[str]:
    """It begins with the mark, for which `re` looks fast; what must not be in front of it comes next. (`\\n` in front may be what
    JSON has for the end of a line.)"""
    text = re.escape(mark)
    unless = f"(?<!{form.unless}{text})" if form.unless else ""
    return re.compile(rf"{text}(?:(?<![0-9A-Za-z]{text})|(?<=\\[nrt]{text})){unless}{form.body}", re.A)


def _marked(form: _Form, mark: str) -> Callable[[str], Iterator[tuple[int, str]]]:
    expression = _expression(form, mark)

    def finder(text: str) -> Iterator[tuple[int, str]]:
        if mark in text:
            for match in expression.finditer(text):
                near = text[max(match.start() - NEAR, 0) : match.end() + NEAR].lower() if form.near else ""
                if form.near in near and form.good(match[1]):
                    yield match.start(), f"{form.title} {mark}{match[1][:4]}..." if form.shown else form.title

    return finder


def _places(expression: re.Pattern[str], text: str, good: Callable[[str], bool] = bool) -> list[int]:
    """Where what it finds begins, that which is good."""
    return [match.start() for match in expression.finditer(text) if good(match[0])]


def _within(places: list[int], start: int, end: int) -> bool:
    """Whether one of the places, which are sorted, is in this range."""
    at = bisect_left(places, start)
    return at < len(places) and places[at] < end


# AWS: a pair

_AWS_ID = re.compile(r"A[KS]IA(?:(?<![0-9A-Za-z]A[KS]IA)|(?<=\\[nrt]A[KS]IA))[A-Z2-7]{16}(?![0-9A-Za-z_])")
_AWS_SECRET = re.compile(r"(?:(?<![0-9A-Za-z+/])|(?<=\\[nrt]))[0-9A-Za-z+/]{40}(?![0-9A-Za-z+/=])")
_AWS_SECRET_LENGTH: Final = 40


def _aws_secret(body: str) -> bool:
    """A path is none, nor a long name of a class; one of 900 secrets has no digit, and is lost."""
    return _mixed(body, 15) and body.count("/") <= 5 and any(digit in body for digit in "0123456789")


def _aws(text: str) -> Iterator[tuple[int, str]]:
    if "AKIA" not in text and "ASIA" not in text:
        return
    found: list[int] | None = None
    for match in _AWS_ID.finditer(text):
        if not _varied(match[0]):
            continue
        if found is None:
            found = _places(_AWS_SECRET, text, _aws_secret)
        if _within(found, match.start() - NEAR - _AWS_SECRET_LENGTH, match.end() + NEAR + 1):
            yield match.start(), f"AWS access key {match[0][:4]}...{match[0][-4:]}"


# Blocks of base64

_BEGIN = re.compile(r"-----BEGIN ([A-Z0-9 ]{0,32})PRIVATE KEY(?: BLOCK)?-----")
_LABELS: Final = {"RSA": "RSA ", "EC": "EC ", "DSA": "DSA ", "OPENSSH": "OpenSSH ", "PGP": "PGP ", "ENCRYPTED": "encrypted "}
_LINE_END = re.compile(r"\r\n|\r|\n|(?:\\{1,4}[rn])+|<[^<>]{0,300}>")
_SPACE = re.compile(r"&(?:gt|nbsp|quot|#39);")
_FIELD = re.compile(r"[A-Za-z][A-Za-z-]{2,30}: ")
_WORD = re.compile(r"[0-9A-Za-z+/]+={0,2}")
_WORD_LEAST: Final = 16  # characters of base64 in a line that is not the last one: fewer may be a word of prose
_ENOUGH: Final = 256  # characters of base64 that are judged
_OPENSSH, _OPENSSH_CLEAR = "b3BlbnNzaC1rZXktdjE", "b3BlbnNzaC1rZXktdjEAAAAABG5vbmU"  # the cipher is "none"


def _material(text: str, at: int, until: str = "-----") -> tuple[str, bool]:
    """The base64 that follows a place, as far as it is judged, and whether a field says that it is encrypted. Lines end as they
    do, or as in JSON and HTML, or are joined by spaces; they may be quoted, as mail and as strings are. It ends at `until`, so
    that what begins many times is not read many times."""
    end = text.find(until, at, at + KEY_READ)
    piece = text[at : at + KEY_READ if end < 0 else end].replace("\\/", "/")
    found, encrypted = "", False
    for line in _LINE_END.split(_SPACE.sub(" ", piece)):
        line = line.strip(" \t>|\"'`,;\xa0")
        if not found and _FIELD.match(line):
            encrypted = encrypted or "ENCRYPTED" in line
            continue
        if not line.strip("+ \t"):
            continue
        for word in line.split():
            if not _WORD.fullmatch(word):
                return found, encrypted
            found += word
            if len(word) < _WORD_LEAST or len(found) >= _ENOUGH:
                return found, encrypted
    return found, encrypted


def _random(material: str, least: int) -> bool:
    """Enough of it, with what base64 of keys has: letters of both cases, digits, not few characters again and again."""
    both = material.upper() != material != material.lower()
    return len(material) >= least and both and not material.isalpha() and len(set(material)) >= 20


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    for match in _BEGIN.finditer(text):
        material, encrypted = _material(text, match.end())
        if _random(material, KEY_LEAST):
            closed = material.startswith(_OPENSSH) and not material.startswith(_OPENSSH_CLEAR)
            label = _LABELS.get(match[1].strip(), "")
            yield match.start(), ("encrypted " if (encrypted or closed) else "") + f"{label}private key"


_PUTTY = re.compile(r"PuTTY-User-Key-File-[0-9]")
_PUTTY_PRIVATE = re.compile(r"Private-Lines: {0,4}[0-9]{1,4}")


def _putty(text: str) -> Iterator[tuple[int, str]]:
    """A file without its private lines has the public key only."""
    files = _places(_PUTTY, text)
    if files:
        clear = _places(re.compile("Encryption: {0,4}none"), text)
        for match in _PUTTY_PRIVATE.finditer(text):
            start = match.start() - PUTTY_READ
            if _within(files, start, match.start()) and _random(_material(text, match.end(), "Private-")[0], PUTTY_LEAST):
                is_clear = _within(clear, start, match.start())
                yield match.start(), ("" if is_clear else "encrypted ") + "PuTTY private key"


_JWK_TYPE = re.compile(r'\\?"kty\\?"')
_JWK_PRIVATE = re.compile(r'"d\\?"\s{0,8}:\s{0,8}\\?"([\w-]{43,1400}+)', re.A)


def _jwk(text: str) -> Iterator[tuple[int, str]]:
    """RFC 7517, RFC 7518 6.2.2 and 6.3.2: the private member of EC, OKP and RSA is `d`."""
    types = _places(_JWK_TYPE, text)
    if types:
        for match in _JWK_PRIVATE.finditer(text):
            if _within(types, match.start() - JWK_READ, match.end() + JWK_READ) and _mixed(match[1], 15):
                yield match.start(), "private key (JWK)"


# Card numbers

_NUMBER = re.compile(  # its first character is one of few, for which `re` looks fast
    r"[:Ww2-6](?:"
    r"(?<=[A-Za-z]:)//[^\s<>\"']*+"  # a URL: no number begins within it
    r"|(?<![0-9A-Za-z][Ww])[Ww]{2}\.[^\s<>\"']*+"
    r"|(?<=[2-6])(?:(?<![0-9A-Za-z_].)(?<![0-9A-Za-z_][-.@].)(?<![A-Za-z]/.)|(?<=\\[nrt].))"
    r"(?:[0-9]{13,18}"
    r"|[0-9]{3}([ -])(?:[0-9]{4}\1[0-9]{4}\1[0-9]{4}|[0-9]{6}\1[0-9]{4,5}|[0-9]{3}\1[0-9]{3}\1[0-9]{3})"
    r"|[0-9]{5}[ -][0-9]{13})"
    r"(?![0-9A-Za-z_])(?![-.@][0-9A-Za-z_]))"
)
_IN_FOURS: Final = 19  # characters of four groups of four
_THREE_MORE = re.compile(r" [0-9]{3}(?![0-9A-Za-z_])")
_FOUR: Final = r"(?=[A-Za-z]{0,3}[0-9])[0-9A-Za-z]{4}"  # four digits, of a hexadecimal number, or the beginning of an IBAN
_FOUR_MORE = re.compile(rf"[ -]{_FOUR}(?![0-9A-Za-z])")
_FOUR_BEFORE = re.compile(rf"(?<![0-9A-Za-z])(?:{_FOUR}|[A-Z]{{2}}[0-9]{{2}}[ -][A-Z]{{4}})[ -]\Z")
_BEFORE_READ: Final = 12  # characters
_DOUBLED: Final = str.maketrans("0123456789", "0246813579")
_ISSUED = re.compile(
    "|".join(f"(?=(?:{'|'.join(f'[0-9]{{{length}}}' for length in lengths)})\\Z)(?:{prefix})" for _, prefix, lengths in ISSUERS)
)
_UNUSUAL: Final = {
    ord(char): usual
    for usual, chars in ((" ", "\xa0\u2007\u2009\u202f\u3000"), ("-", "\xad\u2010\u2011\u2012\u2013\u2212\uff0d"))
    for char in chars
} | {
    zero + digit: str(digit)
    for zero in (0xFF10, 0x660, 0x6F0, 0x966, *range(0x1D7CE, 0x1D800, 10))
    for digit in range(10)
}  # fmt: skip
_HAS_UNUSUAL = re.compile(f"[{''.join(map(chr, _UNUSUAL))}]")


def _is_card(digits: str) -> bool:
    """An issuer's prefix, its length, and the check digit (ISO/IEC 7812-1 annex B, Luhn)."""
    return (
        _ISSUED.match(digits) is not None
        and len(set(digits)) > 1
        and sum(map(int, digits[-1::-2] + digits[-2::-2].translate(_DOUBLED))) % 10 == 0
    )


def _in_a_row(text: str, match: re.Match[str]) -> bool:
    """Whether what is in four groups of four is a part of more such groups, or of an IBAN."""
    start, end, joint = match.start(), match.end(), match[1]
    before = text[max(start - _BEFORE_READ, 0) : start]
    after = _FOUR_MORE.match(text, end)
    return (before.endswith(joint) and _FOUR_BEFORE.search(before) is not None) or (after is not None and after[0][0] == joint)


def _cards(text: str) -> Iterator[tuple[int, str]]:
    if not text.isascii() and _HAS_UNUSUAL.search(text):
        text = text.translate(_UNUSUAL)
    for match in _NUMBER.finditer(text):
        number, joint = match[0], match[1]
        if not number[0].isdigit():
            continue
        digits = number.replace(" ", "").replace("-", "")
        if joint and len(number) == _IN_FOURS and len(digits) == 16:
            if _in_a_row(text, match):
                continue
            more = _THREE_MORE.match(text, match.end())
            if more is not None and joint == " " and _is_card(digits + more[0][1:]):
                digits += more[0][1:]  # else they are the code of the card
        if _is_card(digits):
            yield match.start(), f"card number {digits[:4]}...{digits[-4:]}"


_FINDERS: Final[dict[str, tuple[Callable[[str], Iterator[tuple[int, str]]], ...]]] = {
    "private key": (_blocks, _putty, _jwk, *[_marked(form, mark) for form in _KEY_FORMS for mark in form.marks]),
    "cloud key": (_aws, *[_marked(form, mark) for form in _CLOUD_FORMS for mark in form.marks]),
    "card number": (_cards,),
}
