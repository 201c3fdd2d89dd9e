"""Several checks on one relay at the same time, so that they wait at the same time."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor


def together(checks: Mapping[str, Callable[[], object]]) -> None:
    """Make all checks, each on a thread of its own. Raises the failures of all, each with the name of its check."""
    with ThreadPoolExecutor(len(checks)) as threads:
        made = {name: threads.submit(check) for name, check in checks.items()}
    failures = []
    for name, check in made.items():
        if (failure := check.exception()) is not None:
            failure.add_note(f"check: {name}")
            failures.append(failure)
    if failures:
        names = ", ".join(name for name, check in made.items() if check.exception() is not None)
        raise BaseExceptionGroup(f"of {len(made)} checks failed: {names}", failures)
