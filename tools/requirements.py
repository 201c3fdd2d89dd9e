"""Print requirements of pyproject.toml, for `pip install -r`: those to `build`, `run` or `develop`, or all."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
wanted = {
    "build": project["build-system"]["requires"],
    "run": project["project"]["dependencies"],
    "develop": project["dependency-groups"]["dev"],
}
print("\n".join(one for name in sys.argv[1:] or wanted for one in wanted[name]))  # noqa: T201
