"""The compiled kernels: small, hot, bytes in and events out. Reached through `proto`, `shm` and `triplets` only.

Each `.py` kernel has a `.pxd` beside it that types it for Cython; the same source runs interpreted. Production is
compiled: importing an interpreted kernel by accident (a missing or foreign .so) raises ImportError, unless
RELAYMTA_INTERPRETED=1 asks for it (coverage, fuzzing, debugging).
"""

import os
from importlib.machinery import ExtensionFileLoader, PathFinder

INTERPRETED = os.environ.get("RELAYMTA_INTERPRETED") == "1"

if not INTERPRETED:
    for _name in (
        "smtp", "replies", "dkim", "dots", "mime", "octets", "addresses", "structure", "text", "packed", "search", "envelopes",
        "imap", "records", "uids", "cells", "pairs",
    ):  # fmt: skip
        _found = PathFinder.find_spec(f"{__name__}.{_name}", __path__)  # not imported: a relay alone needs half of them
        if _found is None or not isinstance(_found.loader, ExtensionFileLoader):
            raise ImportError(
                f"relaymta._speedups.{_name} is not compiled for this Python; run `make build` "
                "(or set RELAYMTA_INTERPRETED=1 to run it interpreted, slowly)"
            )
