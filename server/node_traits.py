"""The traits that all machines of a tensor-parallel model must share, and their differences."""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.executors.cpu.kernels import cpu_kernels
from engine.executors.parallel.shares import RankShare
from server.version import VERSION
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.sampled_hash import sampled_hash

_CPU_INFO = Path("/proc/cpuinfo")
_VENDOR_LINES = ("vendor_id", "CPU implementer")
_INSTRUCTION_LINES = ("flags", "Features")
# instructions for which libraries have other kernels, with other rounding
_VECTOR_INSTRUCTIONS = ("avx", "amx", "fma", "f16c", "asimd", "sve", "sme", "bf16", "i8mm")
_SHOWN_LENGTH = 40


def node_traits(
    folder: Path,
    share: RankShare,
    dtype: torch.dtype,
    table_dtype: str,
    engine: EngineConfig,
    num_nodes: int,
) -> dict[str, str]:
    """The model, the settings and the arithmetic of this machine, by name.

    Ranks compute some parts of the model each for itself, such as the choice of table rows. They
    must get the same bits, so programs, processors and threads must agree.

    Args:
        folder: the checkpoint folder.
        share: the share of any rank.
        dtype: dtype of the weights in memory.
        table_dtype: as in ``ModelOptions``.
        engine: the settings of the engine.
        num_nodes: the number of machines.

    Raises:
        CheckpointError: a file cannot be read.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    kernels = cpu_kernels(torch.device("cpu"), dtype)
    traits = {
        "memplus": VERSION,
        "torch": torch.__version__,
        "processor": f"{platform.machine()} {_first_line(_VENDOR_LINES)} {capability}",
        "kernels": "none" if kernels is None else kernels.build,
        "threads per rank": str(torch.get_num_threads()),
        "--nnodes": str(num_nodes),
        "--tensor-parallel": str(share.size),
        "--table-sharding": share.table_sharding,
        "--table-dtype": table_dtype,
        "--dtype": str(dtype),
    }
    for name, value in asdict(engine).items():
        traits[f"--{name.replace('_', '-')}"] = str(value)
    for name in _instructions():
        traits[f"instructions {name}"] = "present"
    for name, value in _leaves(asdict(share.config)).items():
        digest = hashlib.sha256(value.encode()).hexdigest()
        traits[f"config {name}"] = value if len(value) <= _SHOWN_LENGTH else digest
    checkpoint, stored = open_checkpoint(folder)
    tables = [stored.pop(name) for name in checkpoint.model.table_names]
    traits["weights"] = sampled_hash(stored.values())
    for one in tables:
        traits[f"table {one.name}"] = sampled_hash([one])
    return traits


def difference(own: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """In words how the traits of another node differ from ``own``; None if they do not."""
    names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
    if not names:
        return None
    parts = (
        f"{_shown(name)}: {_shown(other.get(name))} there, {_shown(own.get(name))} on node 0"
        for name in names[:4]
    )
    return "; ".join(parts) + ("; and more" if len(names) > 4 else "")


def _shown(value: str | None) -> str:
    return "missing" if value is None else value[:_SHOWN_LENGTH]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The values of nested mappings, as text, by their joined names."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = str(value)
    return found


def _instructions() -> list[str]:
    """The vector instructions of the first processor."""
    return [
        one
        for one in _first_line(_INSTRUCTION_LINES).split()
        if one.startswith(_VECTOR_INSTRUCTIONS)
    ]


def _first_line(names: tuple[str, ...]) -> str:
    """The value of the first line of /proc/cpuinfo with one of these names; empty if none has."""
    for line in _CPU_INFO.read_text().splitlines():
        if line.startswith(names):
            return line.partition(":")[2].strip()
    return ""
