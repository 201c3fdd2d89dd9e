"""Whether a file of hooks can be imported."""

import resource
from pathlib import Path

import pytest

from relaymta.filter import hookcheck
from tests.support.daemon import wait_for

HOOK = "async def on_rcpt(client, envelope, recipient): pass\n"


def _written(folder: Path, code: str) -> str:
    file = folder / "policy.py"
    file.write_text(code)
    return str(file)


def test_a_file_that_prints_without_end_fills_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(hookcheck, "SECONDS", 1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="not imported within 1 s"):
        hookcheck.imported(_written(tmp_path, "while True: print('x' * 100_000)\n"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_what_a_file_begins_as_it_is_imported_is_ended_and_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(hookcheck, "SECONDS", 10.0)
    pid = tmp_path / "pid"
    code = f"import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nopen({str(pid)!r}, 'w').write(str(child.pid))\n"
    assert hookcheck.imported(_written(tmp_path, code + HOOK)) == ["on_rcpt"]
    state = Path(f"/proc/{pid.read_text()}/stat")
    wait_for(lambda: not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX")


def test_the_environment_is_that_of_hooks(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    with pytest.raises(ValueError, match=r"policy.py:2: ValueError: None\Z"):
        hookcheck.imported(_written(tmp_path, "import os\nraise ValueError(os.environ.get('SECRET'))\n"))


@pytest.mark.parametrize("code", ["import os; os._exit(0)", "import os; os.closerange(3, 65536)"])
def test_an_import_that_says_nothing(tmp_path, code):
    with pytest.raises(ValueError, match="its import ends the process"):
        hookcheck.imported(_written(tmp_path, code + "\n" + HOOK))
