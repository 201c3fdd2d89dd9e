"""Where shards of mailboxes are tested that sync very often."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.sessions import settled
from tests.store.test_shard import Bench


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, for tests that do not depend on a disk, and would spend minutes on its syncs."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
async def bench(memory_path):
    async with Bench(memory_path / "mail") as bench:
        await bench.user(1, "Sent")
        yield bench
        await settled(bench.shard)


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of three messages."""
    for module in ("sessions", "appending"):
        monkeypatch.setattr(f"relaymta.store.{module}.SLICE", 3)
