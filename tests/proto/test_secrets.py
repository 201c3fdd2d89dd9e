"""Secrets in the text of mail. None of those here is real: they are made from a seed, or are those that everyone tests with."""

import base64
import hashlib
import random
import re
import time
import tracemalloc
import uuid
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaymta.proto.secrets import ISSUERS, KINDS, MOST, NEAR, Secret, secrets
from tests.conftest import PROVE

LENGTH = 262_144  # characters that a rule shows
UPPER, LOWER, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz", "0123456789"
BASE62 = DIGITS + UPPER + LOWER
WORDS = BASE62 + "-_"
HEX = "0123456789abcdef"
BASE32 = UPPER + "234567"


def drawn(alphabet: str, count: int, seed: object = 0) -> str:
    return "".join(random.Random(f"{alphabet}{count}{seed}").choices(alphabet, k=count))


def mixed(alphabet: str, count: int, seed: object = 0) -> str:
    """The same with a letter of each case and a digit at the end."""
    return drawn(alphabet, count - 3, seed) + "aB7"


def base62(number: int) -> str:
    return (base62(number // 62) if number >= 62 else "") + BASE62[number % 62]


def github(mark: str = "ghp_", seed: object = 0) -> str:
    body = mixed(BASE62, 30, seed)
    return mark + body + base62(zlib.crc32(body.encode())).rjust(6, "0")


def encoded(octets: int, seed: int = 0) -> str:
    return base64.b64encode(random.Random(seed).randbytes(octets)).decode()


def lines(text: str, width: int = 64) -> str:
    return "\n".join(text[at : at + width] for at in range(0, len(text), width))


def pem(label: str = "", octets: int = 600, end: bool = True, fields: str = "", seed: int = 0) -> str:
    last = f"\n-----END {label}PRIVATE KEY-----\n" if end else ""
    return f"-----BEGIN {label}PRIVATE KEY-----\n{fields}{lines(encoded(octets, seed))}{last}"


def luhn(digits: str) -> bool:
    doubled = [int(one) * (1 + at % 2) for at, one in enumerate(reversed(digits))]
    return sum(one - 9 if one > 9 else one for one in doubled) % 10 == 0


def card(prefix: str = "4", length: int = 16, seed: object = 0) -> str:
    body = prefix + drawn(DIGITS, length - 1 - len(prefix), seed)
    return next(body + last for last in DIGITS if luhn(body + last))


def grouped(digits: str, sizes: tuple[int, ...], joint: str = " ") -> str:
    found = [digits[sum(sizes[:at]) : sum(sizes[: at + 1])] for at in range(len(sizes))]
    return joint.join(found)


AWS_ID, AWS_SECRET = "AKIA" + drawn(BASE32, 16, 1), mixed(BASE62 + "+/", 40, 1)
TESTS = (
    "4111111111111111", "4012888888881881", "5555555555554444", "5105105105105100", "2223003122003222", "378282246310005",
    "371449635398431", "6011111111111117", "30569309025904", "38520000023237", "3530111333300000", "6200000000000005",
)  # fmt: skip
PUTTY = (
    "PuTTY-User-Key-File-3: ssh-ed25519\r\nEncryption: {}\r\nComment: me\r\nPublic-Lines: 2\r\n"
    f"{lines(encoded(60))}\r\nPrivate-Lines: 1\r\n{encoded(36)}\r\nPrivate-MAC: {drawn(HEX, 64)}\r\n"
)
JWK = f'{{"kty": "EC", "crv": "P-256", "x": "{mixed(WORDS, 43)}", "y": "{mixed(WORDS, 43, 1)}", "d": "{mixed(WORDS, 43, 2)}"}}'

KEYS = {
    "PKCS 8": (pem(), "private key"),
    "of Ed25519": (pem(octets=48), "private key"),
    "RSA": (pem("RSA "), "RSA private key"),
    "EC": (pem("EC ", octets=121), "EC private key"),
    "of OpenSSH": (
        pem("OPENSSH ").replace(
            "-----\n", "-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZWQy\n", 1
        ),
        "OpenSSH private key",
    ),
    "of OpenSSH, encrypted": (
        pem("OPENSSH ").replace("-----\n", "-----\nb3BlbnNzaC1rZXktdjEAAAAACmFlczI1Ni1jdHIAAAAGYmNyeXB0AAAAGAAAABCfq3PC\n", 1),
        "encrypted OpenSSH private key",
    ),
    "encrypted": (pem("ENCRYPTED "), "encrypted private key"),
    "encrypted, as it was": (
        pem("RSA ", fields="Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,A1B2\n\n"),
        "encrypted RSA private key",
    ),
    "PGP": (
        f"-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: GnuPG v2\nComment: mine\n\n{lines(encoded(900), 70)}\n=aB3d\n",
        "PGP private key",
    ),
    "without its end": (pem("RSA ", end=False), "RSA private key"),
    "quoted": ("\n".join(f"> > {line}" for line in pem("RSA ").splitlines()), "RSA private key"),
    "CRLF": (pem("RSA ").replace("\n", "\r\n"), "RSA private key"),
    "CR": (pem("RSA ").replace("\n", "\r"), "RSA private key"),
    "of a service account": ('{"private_key": "' + pem().replace("\n", "\\n") + '"}', "private key"),
    "of one in JSON in JSON": ('{\\"private_key\\": \\"' + pem().replace("\n", "\\\\n").replace("/", "\\/"), "private key"),
    "in a program": ("'" + pem("RSA ").replace("\n", "\\n' +\n    '"), "RSA private key"),
    "in one line": (pem("RSA ").replace("\n", " "), "RSA private key"),
    "HTML": ("<p>" + pem("RSA ").replace("\n", "<br>\n&gt;&nbsp;"), "RSA private key"),
    "PuTTY": (PUTTY.format("none"), "PuTTY private key"),
    "PuTTY, encrypted": (PUTTY.format("aes256-cbc"), "encrypted PuTTY private key"),
    "JWK": (JWK, "private key (JWK)"),
    "JWK in a string": (JWK.replace('"', '\\"'), "private key (JWK)"),
    "age": (f"AGE-SECRET-KEY-1{drawn('QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L', 58)}", "age private key"),
    "WireGuard": (f"[Interface]\nPrivateKey = {encoded(32)}\nAddress = 192.0.2.1/32", "WireGuard private key"),
}
TOKENS = {
    "Google API key": "AIza" + mixed(WORDS, 35),
    "Google OAuth client secret": "GOCSPX-" + mixed(WORDS, 28),
    "Azure storage key": "AccountKey=" + encoded(64),
    "Azure shared access key": "SharedAccessKey=" + encoded(32),
    "GitHub token": github(),
    "GitHub token (of an app)": "ghs_12345_eyJ" + mixed(WORDS, 40) + "." + mixed(WORDS, 120) + "." + mixed(WORDS, 342),
    "GitHub token (fine-grained)": "github_pat_" + mixed(BASE62, 22) + "_" + mixed(BASE62, 59),
    "GitLab token": "glpat-" + mixed(WORDS, 20),
    "GitLab token (routable)": "glpat-" + mixed(WORDS, 44) + ".01.1a2b3c4d5",
    "Slack token": f"xoxb-123456789012-1234567890123-{mixed(BASE62, 24)}",
    "Slack token (user)": f"xoxp-123456789012-123456789012-1234567890123-{drawn(HEX, 32)}",
    "Slack token (app)": f"xapp-1-A0B1C2D3E4F-1234567890123-{drawn(HEX, 64)}",
    "Slack webhook": f"https://hooks.slack.com/services/T0A1B2C3D/B0A1B2C3D4E/{mixed(BASE62, 24)}",
    "Stripe key": "sk_live_" + mixed(BASE62, 24),
    "SendGrid key": f"SG.{mixed(WORDS, 22)}.{mixed(WORDS, 43)}",
    "Mailgun key": f"mailgun: key-{drawn(HEX, 32)}",
    "npm token": "npm_" + mixed(BASE62, 36),
    "PyPI token": "pypi-AgEIcHlwaS5vcmc" + mixed(WORDS, 150),
    "DigitalOcean token": "dop_v1_" + drawn(HEX, 64),
    "Anthropic key": f"sk-ant-api03-{mixed(WORDS, 93)}AA",
    "OpenAI key": f"sk-{mixed(BASE62, 20)}T3BlbkFJ{mixed(BASE62, 20)}",
    "OpenAI key (of a project)": f"sk-proj-{mixed(WORDS, 74)}T3BlbkFJ{mixed(WORDS, 74)}",
    "Hugging Face token": "hf_" + drawn(UPPER + LOWER, 32) + "aB",
    "Vault token": "hvs." + mixed(WORDS, 95),
}
PLANTED = {
    **{name: text for name, (text, _) in KEYS.items()},
    **TOKENS,
    "AWS": f"{AWS_ID}\n{AWS_SECRET}\n",
    **{f"card {one}": one for one in TESTS},
}


def is_safe(found: Secret, secret: str) -> bool:
    """Whether the end of what is random in it is not told."""
    return not any(run[-9:] in found.what for run in re.findall("[0-9A-Za-z+/]{20,}|[0-9]{14,}", secret))


def whats(text: str, kinds=KINDS) -> list[str]:
    return [one.what for one in secrets(text, kinds)]


@pytest.mark.parametrize("name", KEYS)
def test_private_keys(name):
    text, what = KEYS[name]
    assert secrets(f"Hello,\n{text}\nBye") == [Secret("private key", what)]
    assert not secrets(text, ["cloud key", "card number"])


@pytest.mark.parametrize("name", TOKENS)
def test_tokens(name):
    found = secrets(f"the key is '{TOKENS[name]}'.")
    assert [one.kind for one in found] == ["cloud key"] and found[0].what.startswith(name.partition(" (")[0] + " ")
    assert is_safe(found[0], TOKENS[name]) and found[0].what.isascii() and found[0].what.isprintable()


@pytest.mark.parametrize("mark", ["ghp_", "gho_", "ghu_", "ghs_", "ghr_"])
def test_githubs_checksum(mark):
    assert whats(github(mark)) and not whats(mark + mixed(BASE62, 36))
    shown = mark + "zQWBuTSOoRi4A9spHcVY5ncnsDkxkJ" + "0mLq17"  # GitHub has published it, revoked
    assert whats(shown) == [f"GitHub token {mark}zQWB..."] and not whats(shown[:-1] + "8")


def test_an_aws_key_is_a_pair():
    what = [f"AWS access key AKIA...{AWS_ID[-4:]}"]
    for text in (f"{AWS_ID},{AWS_SECRET}", f'secret="{AWS_SECRET}" id={AWS_ID}', f"{AWS_ID}{' ' * NEAR}{AWS_SECRET}"):
        assert whats(text) == what
    assert whats(f"{AWS_SECRET}{' ' * NEAR}{AWS_ID}") == what
    for text in (
        AWS_ID,
        AWS_SECRET,
        f"{AWS_ID} {' ' * NEAR}{AWS_SECRET}",
        f"{AWS_SECRET} {' ' * NEAR}{AWS_ID}",
        f"{AWS_ID} {hashlib.sha1(b'').hexdigest()}",
        f"{AWS_ID} /usr/share/Doc/package1/examples/program",
        "aws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        f"AKIA{'A' * 16} {AWS_SECRET}",
        f"x{AWS_ID} {AWS_SECRET}",
        f"{AWS_ID} {AWS_SECRET}a",
    ):
        assert not whats(text), text


@pytest.mark.parametrize(
    "text",
    [
        'A file that begins with "-----BEGIN PRIVATE KEY-----" is a secret, and ends with "-----END PRIVATE KEY-----".',
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA...\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN RSA PRIVATE KEY-----\n{lines('x' * 640)}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN RSA PRIVATE KEY-----\n{lines('MIIE' * 200)}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN RSA PRIVATE KEY-----\n{lines(drawn(LOWER, 640))}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n{encoded(600)}",
        pem().replace("PRIVATE", "PUBLIC"),
        f"-----BEGIN CERTIFICATE-----\n{lines(encoded(900))}\n-----END CERTIFICATE-----",
        PUTTY.format("none").partition("Private-Lines")[0],
        f"Private-Lines: 1\n{encoded(36)}",
        JWK.partition(', "d"')[0] + "}",
        f'{{"d": "{mixed(WORDS, 43)}"}}',
        "AGE-SECRET-KEY-1" + "Q" * 58,
    ],
)
def test_what_is_no_private_key(text):
    assert not secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        "AIza" + "x" * 35, "AIza" + "aB1" * 12, "ghp_" + "a" * 36, "glpat-xxxxxxxxxxxxxxxxxxxx", "sk_live_your_key_here",
        "glpat-is-the-prefix-of-a-token-of-gitlab", "sk_test_" + mixed(BASE62, 24), "SK" + drawn(HEX, 32),
        f"cache key-{drawn(HEX, 32)}", f"task-{mixed(BASE62, 20)}T3BlbkFJ{mixed(BASE62, 20)}", "sk-" + mixed(BASE62, 48),
        f"https://maps.example/static?size=1&key=AIza{mixed(WORDS, 35)}", "npm_config_registry_of_the_company_x_y_z",
        "xoxb-not-a-real-token-at-all-not-at-all", "AccountKey=" + "A" * 86 + "==", "hvs.ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        "AccountKey=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
        "SG." + "x" * 22 + "." + "x" * 43, f"PrivateKey = {'A' * 43}=", f"a{github()}", f"{github()}a",
    ],
)  # fmt: skip
def test_what_is_no_token(text):
    assert not secrets(text)


@pytest.mark.parametrize("digits", TESTS)
def test_cards(digits):
    sizes = {16: (4, 4, 4, 4), 15: (4, 6, 5), 14: (4, 6, 4)}[len(digits)]
    what = [f"card number {digits[:4]}...{digits[-4:]}"]
    for written in (digits, grouped(digits, sizes), grouped(digits, sizes, "-"), grouped(digits, sizes, "\u2011")):
        for text in (written, f"Visa: {written}, 12/27", f"12,{written},1227,123", f"é{written}号", f"\\n{written}\\r"):
            if "\\r" not in text:  # a letter follows
                assert whats(text) == what, text
    assert whats(digits.translate({48 + at: 0xFF10 + at for at in range(10)})) == what
    wrong = digits[:-1] + str((int(digits[-1]) + 1) % 10)
    assert not whats(wrong) and not whats(grouped(wrong, sizes))


@pytest.mark.parametrize(("name", "prefix", "lengths"), ISSUERS, ids=[name for name, _, _ in ISSUERS])
def test_issuers(name, prefix, lengths):
    example = {
        "Visa": "4",
        "Mastercard": "2720",
        "American Express": "37",
        "Diners Club": "309",
        "Discover": "649",
        "JCB": "3589",
    }
    for length in range(14, 20):
        digits = card(example.get(name, "62"), length)
        assert bool(whats(digits)) == (length in lengths) and re.match(prefix, digits)
    assert not whats(card("2721")) and not whats(card("2220")) and not whats(card("3590")) and not whats(card("6759"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (grouped(card("4", 13), (4, 3, 3, 3)), 1), (card("4", 13), 0),
        (grouped(card("4", 19), (4, 4, 4, 4, 3)), 1), (grouped(card("62", 19), (6, 13)), 1),
        ("4111 1111 1111 1111 123", 1), ("12 4111 1111 1111 1111", 1), ("2026-11-29 4111 1111 1111 1111", 1),
        ("4111 1111 1111 1111\n5555 5555 5555 4444", 2), ("4111111111111111 5555555555554444", 2),
        ("4111 1111 1111 1111 1111", 0), ("1111 4111 1111 1111 1111", 0), ("52ad 4111 1111 1111 1111", 0),
        ("4111 1111 1111 1111 6b20", 0), ("AT61 4111 1111 1111 1111", 0), ("PK36 SCBL 4111 1111 1111 1111", 0),
        ("VISA 4111 1111 1111 1111 OK", 1), ("4111  1111 1111 1111", 0), ("4111-1111 1111-1111", 0), ("411111 1111111111", 0),
        ("41111111 11111111", 0), ("4444444444444444", 0), ("a4111111111111111", 0), ("4111111111111111a", 0),
        ("14111111111111111", 0), ("0.4111111111111111", 0), ("4111111111111111.25", 0), ("4111111111111111.", 1),
        ("4111111111111111.pdf", 0), ("INV-4111111111111111", 0), ("4111111111111111-1", 0), ("_4111111111111111", 0),
        ("<4111111111111111@mail.example>", 0), ("a@4111111111111111.example", 0), ("orders/4111111111111111", 0),
        ("https://shop.example/?id=4111111111111111", 0), ("www.shop.example/pay/?4111111111111111", 0),
        ("https://shop.example/ 4111111111111111", 1), ("<a href='http://x.example/'>4111111111111111</a>", 1),
        ("550e8400-e29b-4111-8111-411111111111", 0), ("DE44500105175407324931", 0), ("4111111111111111|12|27|123", 1),
    ],
)  # fmt: skip
def test_what_is_around_a_number(text, found):
    assert len(secrets(text)) == found


def test_order_number_and_kinds():
    text = f"{TESTS[0]}\n{KEYS['RSA'][0]}\n{github()}\n{TESTS[0]}\n{TESTS[2]}"
    assert [one.kind for one in secrets(text)] == ["card number", "private key", "cloud key", "card number"]
    assert {one.kind for one in secrets(text, {"cloud key"})} == {"cloud key"} and secrets(text, []) == []
    many = [github(seed=seed) for seed in range(50)]
    assert whats(" ".join(many)) == [f"GitHub token {one[:8]}..." for one in many[:MOST]]
    assert len(whats(" ".join(card(seed=seed) for seed in range(50)))) == MOST
    first = [github(("ghr_", "ghp_")[seed % 2], seed) for seed in range(50)]
    assert whats(" ".join(first)) == [f"GitHub token {one[:8]}..." for one in first[:MOST]]


# False positives


def shares(one, count: int = 20_000 if PROVE else 5000) -> float:
    """How many of so many texts have something in them."""
    drawing = random.Random(1)
    return sum(bool(secrets(one(drawing))) for _ in range(count)) / count


def number(drawing: random.Random, length: int) -> str:
    return f"{drawing.randrange(10**length):0{length}d}"


def fours(drawing: random.Random, count: int) -> str:
    return " ".join(number(drawing, 4) for _ in range(count))


@pytest.mark.parametrize(
    ("most", "one"),
    [
        (0.030, lambda drawing: number(drawing, 16)),  # 0.0233 is a tenth of the numbers that an issuer may have
        (0.030, lambda drawing: fours(drawing, 4)),
        (0.006, lambda drawing: number(drawing, drawing.randrange(1, 21))),
        (0.005, lambda drawing: number(drawing, 14)),
        (0.004, lambda drawing: number(drawing, 15)),
        (0, lambda drawing: number(drawing, 13)),
        (0, lambda drawing: number(drawing, 20)),
        (0, lambda drawing: f"35{number(drawing, 13)}"),  # IMEI
        (0, lambda drawing: f"94{number(drawing, 20)} 1Z{number(drawing, 16)} 9400 {fours(drawing, 4)} 00"),  # parcels
        (0, lambda drawing: fours(drawing, drawing.choice([5, 6, 8, 12]))),
        (0, lambda drawing: f"DE{number(drawing, 2)} {fours(drawing, 4)} {number(drawing, 2)}"),
        (0, lambda drawing: f"AT{number(drawing, 2)} {fours(drawing, 4)}"),
        (0, lambda drawing: f"FR{number(drawing, 2)} {fours(drawing, 5)} {number(drawing, 3)}"),
        (0, lambda drawing: f"+{number(drawing, 2)} {number(drawing, 3)} {number(drawing, 7)}, +{number(drawing, 12)}"),
        (0, lambda drawing: repr(drawing.random())),
        (0, lambda drawing: str(uuid.UUID(int=drawing.getrandbits(128)))),
        (0, lambda drawing: drawing.randbytes(20).hex()),
        (0, lambda drawing: drawing.randbytes(32).hex()),
        (0, lambda drawing: f"{drawing.randrange(10**12, 2 * 10**12)} 2026{number(drawing, 10)}"),  # time
        (0, lambda drawing: base64.b64encode(drawing.randbytes(57)).decode()),
    ],
)
def test_how_often_what_is_none_is_taken_for_one(most, one):
    assert shares(one) <= most


def test_a_megabyte_of_numbers():
    drawing = random.Random(2)
    numbers = [number(drawing, drawing.randrange(1, 21)) for _ in range(95_000)]
    found = sum(len(secrets("\n".join(numbers[at : at + 500]))) for at in range(0, len(numbers), 500))
    assert len("".join(numbers)) + len(numbers) > 1_000_000 and found / len(numbers) < 1 / 400


def test_texts_of_this_tree(request):
    found = []
    for path in [*request.config.rootpath.glob("relaymta/**/*.py"), *request.config.rootpath.glob("docs/**/*.md")]:
        text = path.read_text()
        for at in range(0, len(text), LENGTH):
            found += [(path, one) for one in secrets(text[at : at + LENGTH])]
    assert not found


# Any text

NO_WORDS = st.text(st.sampled_from(" \t\r\n-+=/@\\\\.,;:!?()[]{}<>|*#'\"&%$~^`€§«»\u3000\u200b\U0001f511"), max_size=40)
ANY = st.text(st.characters(), max_size=200)


@given(st.text(st.one_of(st.characters(), st.characters(categories=["Cs"]), st.sampled_from("-0123456789 4>\\"))))
def test_any_text(text):
    assert len(secrets(text)) <= MOST


@pytest.mark.parametrize("name", PLANTED)
@settings(max_examples=settings.default.max_examples // 5)  # of each
@given(data=st.data())
def test_a_secret_is_found_wherever_it_is(name, data):
    secret = PLANTED[name]
    alone = secrets(secret)
    assert len(alone) == 1
    before, after = data.draw(NO_WORDS), data.draw(NO_WORDS)
    assert secrets(before + secret + after) == alone
    before, after = data.draw(ANY), data.draw(ANY)
    found = secrets(f"{before}\n{secret}\n{after}")
    assert set(alone) <= set(found)
    assert all(is_safe(one, secret) for one in found)


# A naive oracle

SHAPES = [(14,), (15,), (16,), (17,), (18,), (19,), (4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 3, 3, 3), (6, 13)]
WORD = re.compile("[0-9A-Za-z_]")


def issued(digits: str) -> bool:
    first, length = int(digits[:4]), len(digits)
    return (
        (digits[0] == "4" and length in (13, 16, 19))
        or (length == 16 and (5100 <= first <= 5599 or 2221 <= first <= 2720 or 3528 <= first <= 3589))
        or (length == 16 and (first == 6011 or 6440 <= first <= 6599))
        or (length == 15 and digits[:2] in ("34", "37"))
        or (length == 14 and (digits[:2] in ("36", "38", "39") or 3000 <= first <= 3059 or 3090 <= first <= 3099))
        or (16 <= length <= 19 and digits[:2] == "62")
    )


def is_card(digits: str) -> bool:
    return issued(digits) and luhn(digits) and len(set(digits)) > 1


def stands_alone(text: str, start: int, end: int) -> bool:
    before, after = text[:start], text[end:]
    if before and WORD.match(before[-1]) and before[-2:] not in ("\\n", "\\r", "\\t"):
        return False
    if len(before) > 1 and WORD.match(before[-2]) and before[-1] in "-.@" and before[-2:] not in ("\\n", "\\r", "\\t"):
        return False
    if re.search("[A-Za-z]/$", before) or (after and WORD.match(after[0])):
        return False
    return not (len(after) > 1 and after[0] in "-.@" and WORD.match(after[1]))


def in_url(text: str, start: int) -> bool:
    word = re.split(r"[\s<>\"']", text[:start])[-1]
    return re.search(r"[A-Za-z]://|(?<![0-9A-Za-z])[Ww][Ww][Ww]\.", word) is not None


def is_four(word: str) -> bool:
    return re.fullmatch("[0-9A-Za-z]{4}", word) is not None and re.search("[0-9]", word) is not None


def between_fours(text: str, start: int, end: int, joint: str) -> bool:
    before = re.split("[^0-9A-Za-z -]", text[:start])[-1]
    words = re.split("[ -]", before)
    iban = len(words) > 2 and re.fullmatch("[A-Z]{2}[0-9]{2}", words[-3]) and re.fullmatch("[A-Z]{4}", words[-2])
    if text[:start].endswith(joint) and len(words) > 1 and (is_four(words[-2]) or iban):
        return True
    return text[end:].startswith(joint) and is_four(re.split("[^0-9A-Za-z]", text[end + 1 :])[0])


def naive_cards(text: str) -> set[str]:
    found = set()
    for start in range(len(text)):
        for shape in SHAPES:
            for joint in " -":
                end = start + sum(shape) + len(shape) - 1
                groups = text[start:end].split(joint) if len(shape) > 1 else [text[start:end]]
                if [len(one) for one in groups] != list(shape) or not all(re.fullmatch("[0-9]+", one) for one in groups):
                    continue
                digits = "".join(groups)
                if not stands_alone(text, start, end) or in_url(text, start):
                    continue
                if shape == (4, 4, 4, 4):
                    if between_fours(text, start, end, joint):
                        continue
                    more = re.match(" ([0-9]{3})(?![0-9A-Za-z_])", text[end:])
                    if joint == " " and more and is_card(digits + more[1]):
                        digits += more[1]
                if is_card(digits):
                    found.add(f"card number {digits[:4]}...{digits[-4:]}")
    return found


def without_escapes(text: str) -> str:
    """Of the same length, with the ends of lines that JSON has as what separates words."""
    return re.sub(r"\\[nrt]", "  ", text)


def naive_aws(text: str) -> set[str]:
    text = without_escapes(text)
    ids = list(re.finditer(r"(?<![0-9A-Za-z])(?:AKIA|ASIA)[A-Z2-7]{16}(?![0-9A-Za-z_])", text))
    keys = [one for one in re.finditer(r"[0-9A-Za-z+/]+=?", text) if len(one[0]) == 40 and "=" not in one[0]]
    keys = [one for one in keys if re.search("[a-z]", one[0]) and re.search("[A-Z]", one[0]) and re.search("[0-9]", one[0])]
    return {
        f"AWS access key AKIA...{one[0][-4:]}"
        for one in ids
        for key in keys
        if len(set(one[0][4:])) > 6 and max(key.start() - one.end(), one.start() - key.end()) <= NEAR
    }


def naive_github(text: str) -> set[str]:
    token = r"(?<![0-9A-Za-z])(gh[pousr]_)([0-9A-Za-z]{30})([0-9A-Za-z]{6})(?![0-9A-Za-z_])"
    found = re.findall(token, without_escapes(text))
    return {
        f"GitHub token {mark}{body[:4]}..."
        for mark, body, digits in found
        if base62(zlib.crc32(body.encode())).rjust(6, "0") == digits and len(set(body)) > 9
    }


def naive_material(text: str) -> str:
    found = ""
    for line in re.split(r"\r\n|\r|\n|\\+[rn]", text.partition("-----")[0].replace("\\/", "/")):
        words = line.strip(" \t>|\"'`,;\xa0").split()
        for word in words if words != ["+"] else []:
            if not re.fullmatch("[0-9A-Za-z+/]+=?=?", word):
                return found
            found += word
            if len(word) < 16:
                return found
    return found


def naive_blocks(text: str) -> set[str]:
    found = set()
    for match in re.finditer("-----BEGIN (RSA |)PRIVATE KEY-----", text):
        material = naive_material(text[match.end() :][:2048])
        if len(material) >= 64 and len(set(material)) >= 20:
            found.add(f"{match[1]}private key")
    return found


GLUE = st.sampled_from([" ", "\n", "-", "", " ", "\n", ",", ".", "/", "\\n", "\t", "> ", "\r\n", "@"])
BLOCK = ["-----BEGIN RSA PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----", "-----", "> ", "-----END PRIVATE KEY-----", "word"]
BLOCK += [encoded(48), encoded(48, 1), encoded(21), encoded(12), encoded(9), encoded(31), "MIIE" * 16]
PIECES = st.one_of(
    st.sampled_from(
        [*TESTS, "4111 1111 1111 1111", "5555-5555-5555-4444", "3782 822463 10005", "4111 1111 1111 1112", "123", "1234", "6b20"],
    ),
    st.sampled_from(["AT61", "SCBL", "PK36", "http://x.example/", "www.x", "a", "_", "@", "x.y", "0.", "INV-", "20261129"]),
    st.sampled_from([AWS_ID, AWS_SECRET, f"{AWS_ID} {AWS_SECRET}", f"{AWS_SECRET}\n{AWS_ID}"]),
    st.sampled_from(["AKIAIOSFODNN7EXAMPL", "a" * 40, drawn(HEX, 40), " " * (NEAR - 41), " " * NEAR]),
    st.sampled_from([github(), github("ghs_", 1), github()[:-1], "ghp_"]),
    st.builds(lambda first, words: BLOCK[0] + first + "\n".join(words), GLUE, st.lists(st.sampled_from(BLOCK), max_size=4)),
    st.sampled_from(BLOCK),
    st.sampled_from(["x", "\\", "ä", "/", "=", "+"]),
    st.text("0123456789 -4", max_size=20),
)


@given(st.lists(st.tuples(PIECES, GLUE), max_size=8))
def test_the_same_as_a_naive_reading(pieces):
    text = "".join(one for piece in pieces for one in piece)
    found = secrets(text)
    assert {one.what for one in found if one.kind == "card number"} == naive_cards(text), text
    assert {one.what for one in found if one.what.startswith("AWS")} == naive_aws(text), text
    assert {one.what for one in found if one.what.startswith("GitHub")} == naive_github(text), text
    assert {one.what for one in found if one.kind == "private key"} == naive_blocks(text), text


# Linear time


def times(piece: str, front: str = ""):
    return lambda n: front + piece * (n // len(piece))


WORST = {
    "beginnings of blocks": times("-----BEGIN "),
    "first lines of blocks": times("-----BEGIN RSA PRIVATE KEY-----"),
    "blocks": times("-----BEGIN PRIVATE KEY-----\n" + encoded(48) + "\n"),
    "blocks of tags": times("-----BEGIN PRIVATE KEY-----" + "<" * 2000),
    "blocks of fields": times("-----BEGIN PRIVATE KEY-----" + "Comment: a\n" * 180),
    "tags": times("<a ", "-----BEGIN PRIVATE KEY-----"),
    "dashes": times("-"),
    "ones": times("1"),
    "fours": times("4"),
    "digits and spaces": times("1 "),
    "groups of four": times("4111 "),
    "groups with dashes": times("4111-"),
    "cards": times("4111111111111111 "),
    "cards in groups": times("4111 1111 1111 1111 12 "),
    "no cards": times("4111111111111112 "),
    "of full width": times("\uff14"),
    "AKIA": times("AKIA"),
    "ids of AWS": times(f"{AWS_ID} "),
    "ids and secrets of AWS": times(f"{AWS_ID} {AWS_SECRET} "),
    "base64": lambda n: encoded(n * 3 // 4),
    "lines of base64": lambda n: lines(encoded(n * 3 // 4), 76)[:n],
    "quoting": times("> "),
    "spaces": times(" "),
    "www": times("www. "),
    "URLs": times("a://"),
    "w": times("w"),
    "marks": times(" glpat-"),
    "marks of OpenAI": times("-sk-"),
    "tokens": times(f"{github()} "),
    "keys of Mailgun": times(f"key-{drawn(HEX, 32)} "),
    "beginnings of tokens in JSON": times("-ghs_eyJ"),
    "JWK": times('"kty""d":"'),
    "PuTTY": times("Private-Lines: 1 ", "PuTTY-User-Key-File-2"),
    "Slack": times("xoxb-1-1-1-1-"),
    "surrogates": times("\ud800"),
}


def least_seconds(text: str) -> float:
    best = float("inf")
    for _ in range(3):
        began = time.thread_time()
        secrets(text)
        best = min(best, time.thread_time() - began)
    return best


@pytest.mark.parametrize("name", WORST)
def test_time_grows_no_faster_than_the_text(name):
    """As in tests/test_linear.py: per character, at four times the length; what is square is at 4."""
    short, long = WORST[name](LENGTH // 4), WORST[name](LENGTH)
    for _ in range(20):
        grown = (least_seconds(long) / len(long)) / (least_seconds(short) / len(short))
        if grown <= 2.25:
            return
        time.sleep(0.02)
    raise AssertionError(grown)


def test_memory_is_bounded():
    for name in ("ids and secrets of AWS", "groups of four", "cards", "of full width", "blocks", "JWK", "PuTTY", "surrogates"):
        text = WORST[name](LENGTH)
        tracemalloc.start()
        secrets(text)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 4 << 20, name


def test_what_is_shown_is_printable():
    text = Path(__file__).read_text()
    assert all(one.what.isascii() and one.what.isprintable() for name in PLANTED for one in secrets(PLANTED[name] + text))
