from typing import Final

class Part:
    depth: Final[int]
    kind: Final[int]
    header: Final[int]
    body: Final[int]
    end: Final[int]
    lines: Final[int]
    type: Final[int]
    type_end: Final[int]
    subtype: Final[int]
    subtype_end: Final[int]
    encoding: Final[int]
    parameters: Final[list[tuple[int, int, int, int]] | None]
    boundary: Final[bytes | None]
    fields: Final[list[tuple[int, int, int]]]

def scan(data: bytes) -> list[Part]: ...
def fields(data: bytes, start: int, end: int) -> list[tuple[int, int, int, int]]: ...
def value(data: bytes, start: int, end: int) -> tuple[int, int, list[tuple[int, int, int, int]] | None]: ...
