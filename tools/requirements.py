"""Print all requirements of pyproject.toml (build, run, develop), for `pip install -r`."""

import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
print("\n".join(wanted))  # noqa: T201
