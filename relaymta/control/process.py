"""How our own programs are started."""

import os
import site
import sys
from pathlib import Path

__all__ = ["program"]


def program(module: str, *arguments: str) -> list[str]:
    """The command that runs `main()` of a module of ours in a process of its own, isolated (python -I): neither the current
    folder nor a PYTHON* variable decides what is imported. The search path is the interpreter's own folders, then those from
    which this process has imported."""
    own = {os.path.dirname(sys.executable), *site.getsitepackages()}
    library, package = os.path.dirname(os.__file__), str(Path(__file__).absolute().parents[2])
    found = [path for path in dict.fromkeys((*sys.path, package)) if os.path.isabs(path) and path not in own]
    paths = [path for path in found if not path.startswith(library) and not path.endswith(".zip")]
    # What is imported stays: the garbage collector looks at it neither now nor later.
    boot = f"import gc, sys; gc.disable(); sys.path += {paths!r}; from {module} import main; gc.freeze(); gc.enable(); main()"
    return [sys.executable, "-I", "-c", boot, *arguments]
