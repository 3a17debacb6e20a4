"""Prints the dependencies of memplus, without the packages that the arguments name."""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
dependencies = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
print("\n".join(one for one in dependencies if re.split("[^a-z0-9-]", one)[0] not in sys.argv))
