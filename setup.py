"""Build the compiled kernels, and put the files for operators into the package; everything else is in pyproject.toml.

A kernel that does not compile fails the build, so that no relay runs interpreted unnoticed. With RELAYMTA_INTERPRETED=1 at run
time the `.py` + `.pxd` kernels run interpreted (for coverage and fuzzing).
"""

import os
import shutil
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

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

ASSETS = ("config", "grafana")  # folders that `relaymta assets` writes out again (relaymta/cli/assets.py)


class BuildWithAssets(build_py):
    """As setuptools'; the folders of ASSETS are copied into the package. (Not by an editable installation: there they are beside
    it.)"""

    def run(self) -> None:
        """Copy the modules, then the folders."""
        super().run()
        if self.editable_mode:
            return
        for name in ASSETS:
            there = Path(self.build_lib) / "relaymta" / "assets" / name
            shutil.rmtree(there, ignore_errors=True)  # what an earlier build has left
            shutil.copytree(name, there)


setup(
    cmdclass={"build_py": BuildWithAssets},
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
    ),
)
