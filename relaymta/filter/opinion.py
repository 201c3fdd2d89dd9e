"""Whether receivers can verify mail signed with a key: by our own rules, and by dkimpy, which shares no code with us."""

import dkim

from relaymta.filter.keys import Key
from relaymta.filter.published import candidates, refusal, tag_list
from relaymta.filter.signatory import sign_hash
from relaymta.filter.signing import Draft
from relaymta.proto.dkim import signed, split_fields

__all__ = ["trouble"]

_BODY = b"A sample.\r\n"


def trouble(key: Key, text: str, seconds: int) -> str:
    """Why receivers refuse mail that is signed with a key while the DNS has `text` at its selector; "" when they accept it. A
    sample is signed as mail is, and verified. `seconds`: the wall clock."""
    records = candidates([text])
    if not records:
        return "it is no key record"
    domain = key.settings.domain
    header = f"From: <sample@{domain}>\r\nTo: <sample@{domain}>\r\nSubject: A sample\r\n\r\n".encode()
    draft = Draft(split_fields(header), [key], len(header), seconds)
    draft.body.feed(header + _BODY)
    (one,) = draft.unsigned()
    refused = refusal(records[0], tag_list(one.own.partition(b":")[2])["a"], False)
    if refused:
        return refused
    message = dkim.DKIM(signed(one.own, sign_hash(key.private, one.hashed)) + header + _BODY)
    try:
        good = message.verify(dnsfunc=lambda name, timeout=5: text.encode())
    except dkim.DKIMException as error:
        return str(error)
    return "" if good else "the signature does not verify"
