"""Prints the dependencies of memplus on a CPU: those of pyproject.toml without triton."""

import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
dependencies = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
print("\n".join(one for one in dependencies if not one.startswith("triton")))
