"""The card that is checked: its name, and the versions of the software."""

import importlib.metadata
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Card:
    """A GPU, and the software that runs on it.

    Attributes:
        name: as the driver reports it.
        versions: of torch and triton, and the commit of this checkout, or None if it is unknown.
    """

    name: str
    versions: dict[str, str | None]

    @classmethod
    def found(cls) -> "Card":
        """The current CUDA device."""
        versions = {
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton"),
            "commit": _commit(),
        }
        return cls(torch.cuda.get_device_name(), versions)


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
