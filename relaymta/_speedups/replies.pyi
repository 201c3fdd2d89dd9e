from typing import Final

class Replies:
    line_limit: Final[int]
    lines_limit: Final[int]
    broken: Final[bool]
    def __init__(self, line_limit: int, lines_limit: int) -> None: ...
    def feed(self, data: bytes) -> list[tuple[int, bytes]]: ...
