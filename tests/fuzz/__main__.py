"""`python -m tests.fuzz TARGET SECONDS [libFuzzer's flags]`: fuzz one target with atheris, coverage-guided by the interpreted
kernels. What it finds is written to crash-* here; new inputs go to build/corpus; the tree holds a choice of them."""

import sys
from pathlib import Path
from types import FunctionType

import atheris

from relaymta.proto import smtp_server
from tests.fuzz import targets

CORPUS = Path(__file__).parent / "corpus"


def instrument(*classes: type) -> None:
    for one in classes:
        for name, member in list(vars(one).items()):
            if isinstance(member, FunctionType):
                setattr(one, name, atheris.instrument_func(member))


def main() -> None:
    name, seconds, *flags = sys.argv[1:]
    target = targets.TARGETS[name]
    interpreted = [one for one in (*targets.PARSERS, *targets.REPLIES) if isinstance(one.feed, FunctionType)]
    assert len(interpreted) == 2
    instrument(*interpreted, smtp_server.ServerSession)
    found = Path("build/corpus") / name
    found.mkdir(parents=True, exist_ok=True)

    def one(data: bytes) -> None:
        if len(data) >= 4:
            target(data)

    arguments = [sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", *flags, str(found), str(CORPUS / name)]
    atheris.Setup(arguments, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
