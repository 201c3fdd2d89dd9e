"""The fuzzers' corpus, replayed: inputs that reached new code, and every finding."""

import ast
import importlib
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parents[1] / "fuzz/corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_corpus(name):
    inputs = sorted((CORPUS / name).iterdir())
    assert len(inputs) >= 10
    for path in inputs:
        try:
            TARGETS[name](path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{path.name}") from error


def test_what_the_fuzzers_follow_is_there():
    tree = ast.parse((CORPUS.parent / "__main__.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("relaymta", "tests")):
            of = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(of, name.name) or importlib.import_module(f"{node.module}.{name.name}")
