from typing import Any

from relaymta._speedups.search import Needle

def envelopes(needle: Needle, messages: list[Any], care: bytes, place: int, version: int) -> tuple[bytes, bytes]: ...
