"""Profiles of hypothesis, the event loop, and a refusal to run against stale kernels, a small disk."""

import gc
import os
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, settings

import relaymta

settings.register_profile("default", max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("prove", max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("prove" if os.environ.get("RELAYMTA_PROVE") == "1" else "default")

PROVE = os.environ.get("RELAYMTA_PROVE") == "1"


def pytest_configure(config: pytest.Config) -> None:
    folder = Path(relaymta.__file__).parent / "_speedups"
    for built in folder.glob("*.so"):
        for suffix in (".py", ".pyx", ".pxd"):
            source = folder / (built.name.partition(".")[0] + suffix)
            if source.exists() and source.stat().st_mtime > built.stat().st_mtime:
                raise pytest.UsageError(f"{built.name} is older than {source.name}: run `make build`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked `prove` is for `make prove`."""
    if not PROVE and (left := [item for item in items if item.get_closest_marker("prove")]):
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("prove")]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is collected, some hundred thousand objects, stays until the end: no collection of garbage looks at it, neither now
    nor when a test asks for one, to see that nothing fails unheard."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, object]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, in `tmp_path`."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=False)


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """An overlay file system, in `tmp_path`. (Its layers are in a tmpfs: an overlay cannot be one of another.)"""
    layers, made = tmp_path / "layers", tmp_path / "overlay"
    for folder in (layers, made):
        folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", layers], check=True)
    try:
        for name in ("lower", "upper", "work"):
            (layers / name).mkdir()
        options = f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", made], check=True)
        yield made
    finally:
        for folder in (made, layers):
            subprocess.run(["umount", "-l", folder], check=False)
