from collections.abc import Callable
from typing import Any

class Needle:
    def __init__(
        self,
        octets: bytes,
        whole: bool,
        rare: tuple[int, int, int],
        kind_of: Callable[[bytes], int],
        hidden: Callable[[], bytes],
    ) -> None: ...
    def texts(self, messages: list[Any], care: bytes, headers: bool, version: int) -> tuple[bytes, bytes, bytes]: ...

def encoded(p: bytes, pos: int, end: int) -> bool: ...
