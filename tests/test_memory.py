"""Memory use: what the kernel can free on demand does not count."""

import mmap
import subprocess
import sys
from pathlib import Path

import lmdb

from relaymta import memory

MB = 1 << 20


def test_tables_that_were_read_do_not_count(tmp_path):
    """All pages of 100 MB of tables are read, so that they are mapped; then as much memory is used."""
    with lmdb.open(str(tmp_path), map_size=1 << 30, sync=False) as env:
        for start in range(0, 25_600, 256):
            with env.begin(write=True) as txn:
                for number in range(start, start + 256):
                    txn.put(b"%08d" % number, b"x" * 4000)
        limit = 1 << 30
        before, resident = memory.share(limit, 1), _resident()
        with env.begin() as txn:
            assert sum(len(value) for _, value in txn.cursor()) > 97 * MB
        assert _resident() - resident > 60 * MB, "the test maps the tables"
        assert memory.share(limit, 1) - before < 20 * MB / limit
    kept = b"x" * (100 * MB)
    assert memory.share(limit, 1) - before > len(kept) * 0.8 / limit
    assert memory.share(limit, 2) > 1.5 * memory.share(limit, 1)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def test_the_memory_of_another_process():
    with subprocess.Popen([sys.executable, "-c", "x = b'x' * (50 << 20); input()"], stdin=subprocess.PIPE) as process:
        while memory.anonymous(process.pid) < 50 * MB:
            assert process.poll() is None
        process.communicate(b"\n")


def test_the_cache_of_a_cgroup_does_not_count(tmp_path):
    (tmp_path / "memory.max").write_text(f"{1000 * MB}\n")
    (tmp_path / "memory.current").write_text(f"{950 * MB}\n")
    stat = {"anon": 200, "active_file": 300, "inactive_file": 300, "slab_reclaimable": 50, "shmem": 100}
    (tmp_path / "memory.stat").write_text("".join(f"{name} {count * MB}\n" for name, count in stat.items()))
    assert memory._of_cgroup(tmp_path) == 0.3
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._of_cgroup(tmp_path) == 0.0
    assert memory._of_cgroup(tmp_path / "none") == 0.0


def test_the_limit_of_a_cgroup_above_holds_too(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
    own = tmp_path / "above" / group.strip("/")
    own.mkdir(parents=True)
    monkeypatch.setattr(memory.Path, "read_text", _with({"/proc/self/cgroup": f"0::/above{group}\n"}))
    for folder, most in ((own, "max"), (tmp_path / "above", str(1000 * MB))):
        (folder / "memory.max").write_text(most)
        (folder / "memory.current").write_text(str(900 * MB))
        (folder / "memory.stat").write_text("anon 900\n")
    assert memory.share(0, 1) == 0.9


def _with(texts):
    read = Path.read_text
    return lambda path, *args, **options: texts.get(str(path)) or read(path, *args, **options)
