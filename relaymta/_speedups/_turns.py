"""What lets other threads run while a kernel is at work; not compiled."""

__all__ = ["give_way"]


def give_way() -> None:
    """Let a thread run that waits for the interpreter: it changes hands where an interpreted function is called."""
