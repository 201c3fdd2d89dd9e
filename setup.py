"""Build the compiled kernels; everything else about the project is in pyproject.toml.

A kernel that does not compile fails the build, so that no relay runs interpreted unnoticed. With RELAYMTA_INTERPRETED=1 at run
time the `.py` + `.pxd` kernels run interpreted (for coverage and fuzzing).
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

KERNELS = {
    "relaymta._speedups.smtp": "relaymta/_speedups/smtp.py",
    "relaymta._speedups.replies": "relaymta/_speedups/replies.py",
    "relaymta._speedups.dkim": "relaymta/_speedups/dkim.py",
    "relaymta._speedups.dots": "relaymta/_speedups/dots.py",
    "relaymta._speedups.mime": "relaymta/_speedups/mime.py",
    "relaymta._speedups.octets": "relaymta/_speedups/octets.py",
    "relaymta._speedups.addresses": "relaymta/_speedups/addresses.py",
    "relaymta._speedups.structure": "relaymta/_speedups/structure.py",
    "relaymta._speedups.text": "relaymta/_speedups/text.py",
    "relaymta._speedups.packed": "relaymta/_speedups/packed.py",
    "relaymta._speedups.search": "relaymta/_speedups/search.py",
    "relaymta._speedups.envelopes": "relaymta/_speedups/envelopes.py",
    "relaymta._speedups.imap": "relaymta/_speedups/imap.py",
    "relaymta._speedups.records": "relaymta/_speedups/records.py",
    "relaymta._speedups.uids": "relaymta/_speedups/uids.py",
    "relaymta._speedups.cells": "relaymta/_speedups/cells.pyx",
    "relaymta._speedups.pairs": "relaymta/_speedups/pairs.pyx",
}
SANITIZE = ["-fsanitize=address,undefined"] if os.environ.get("RELAYMTA_SANITIZE") == "1" else []

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "annotation_typing": False,
}

setup(
    ext_modules=cythonize(  # type: ignore[no-untyped-call]
        [
            Extension(
                name,
                [path],
                extra_compile_args=["-O3", "-g0", "-Wall", "-Wsign-compare", *SANITIZE],
                extra_link_args=SANITIZE,
            )
            for name, path in KERNELS.items()
        ],
        compiler_directives=DIRECTIVES,
    )
)
