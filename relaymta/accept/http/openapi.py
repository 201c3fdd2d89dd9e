"""The description of the operations (OpenAPI 3.1)."""

from typing import Any

__all__ = ["description"]


def description() -> dict[str, Any]:
    """The document."""
    return {}
