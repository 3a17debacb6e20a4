"""Copies of a module with one planted fault, for tests that must notice it."""

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType


def with_fault(module: ModuleType, right: str, wrong: str, tmp_path: Path) -> ModuleType:
    """A separate copy of a module in which ``wrong`` replaces ``right``, which occurs once."""
    source = inspect.getsource(module)
    assert source.count(right) == 1, f"{right!r} occurs {source.count(right)} times"
    path = tmp_path / f"faulty_{Path(module.__file__).name}"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    return faulty
