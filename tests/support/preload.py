"""Libraries that a program under test preloads: shifted_clock.c, failing_calls.c."""

import subprocess
from pathlib import Path

from tests.support.programs import need

__all__ = ["built"]


def built(source: str, folder: Path) -> Path:
    """The library made of a C source beside this file, in `folder`."""
    library = folder / Path(source).with_suffix(".so").name
    subprocess.run(
        [need("gcc"), "-shared", "-fPIC", "-O1", "-o", library, Path(__file__).parent / source, "-ldl"], check=True
    )  # fmt: skip
    return library
