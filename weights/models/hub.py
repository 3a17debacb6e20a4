"""Models from the Hugging Face Hub: names, downloads and their errors. Needs no torch.

``huggingface_hub`` keeps the files in its own cache and reads its own variables: ``HF_TOKEN``,
``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``.
"""

import contextlib
import logging
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from weights.errors import CheckpointError, ModelNotFoundError

logger = logging.getLogger(__name__)
_INDEX = "model.safetensors.index.json"
# with the tokenizer's files all that a checkpoint folder may have: never code or pickles, and no
# second copies of the weights, such as model.fp16.safetensors
_WANTED = (
    *("config.json", "generation_config.json", "chat_template.json", _INDEX),
    *("model.safetensors", "model-*.safetensors", "table-*.safetensors", "hot_rows.safetensors"),
)
# files in folders, second copies of the weights in other layouts, and adapters
_UNWANTED = ["*/*", "consolidated*", "adapter_*"]
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(.*))?", re.ASCII | re.DOTALL)
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]{0,254}", re.ASCII)
_MOST_NAMED_FILES = 5
# of an address: it may stand in HF_ENDPOINT
_CREDENTIALS = re.compile(r"//[^/@\s]*@")


@dataclass(frozen=True)
class HubModel:
    """A model on the Hub: ``org/name``, maybe with ``@revision`` (a branch, tag or commit).

    Attributes:
        repository: ``org/name``.
        revision: branch, tag or commit; None for the default branch.
    """

    repository: str
    revision: str | None = None

    @property
    def cache_name(self) -> str:
        """The name of its folder in the cache of ``huggingface_hub``."""
        return f"models--{self.repository.replace('/', '--')}"

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def hub_model(name: str) -> HubModel | None:
    """The model that ``name`` names on the Hub; None if it has another form, such as a path.

    Raises:
        ModelNotFoundError: the revision is not a valid name of a branch, tag or commit.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[1].lower().endswith(".gguf"):
        return None
    if match[2] is not None and not _REVISION.fullmatch(match[2]):
        raise ModelNotFoundError(
            f"{match[1]}: the revision {match[2]!r:.99} is not a branch, tag or commit; write a"
            " model of the Hugging Face Hub as ORG/NAME or ORG/NAME@REVISION"
        )
    return HubModel(match[1], match[2])


def download(model: HubModel) -> Path:
    """The folder of a model in the cache of ``huggingface_hub``, after a download if needed.

    Files that are in the cache are not downloaded again, and a broken connection is resumed. A
    model whose files are all in the cache is served from it if the Hub cannot be reached. Shows a
    progress bar on a terminal.

    Raises:
        ModelNotFoundError: the repository or the revision does not exist, or is not readable.
        CheckpointError: the repository has no safetensors, or the download failed.
    """
    logger.info("%s: looking for its files in the cache and on the Hugging Face Hub", model)
    try:
        folder = _snapshot(model)
    except Exception as error:  # also the errors of its HTTP libraries, which vary by version
        raise _described(model, error) from None
    found = Path(folder)
    if not (found / _INDEX).exists() and not any(found.glob("model*.safetensors")):
        raise CheckpointError(f"{model}: {_without_weights(model, commit=found.name)}")
    return found


def _snapshot(model: HubModel) -> str:
    """The folder that ``snapshot_download`` returns; a signal ends the download.

    The library alone would first finish the files that it has begun, which may take hours.
    """
    # slow to import, and needed only for names of the Hub
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    from weights.checkpoints.tokenizer import TOKENIZER_FILES

    stopped = Event()

    class Bar(tqdm):
        """A progress bar for terminals only, since logs may be JSON; it also stops downloads."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **({"disable": None} | settings))  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if stopped.is_set():
                raise InterruptedError
            super().update(n)

    # it would write warnings twice, and each request to the server's log
    logging.getLogger("huggingface_hub").handlers.clear()
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with ThreadPoolExecutor(max_workers=1) as thread:
        snapshot = thread.submit(
            snapshot_download,
            model.repository,
            revision=model.revision,
            allow_patterns=[*_WANTED, *TOKENIZER_FILES],
            ignore_patterns=_UNWANTED,
            tqdm_class=Bar,
        )
        try:
            return snapshot.result()
        except (KeyboardInterrupt, SystemExit):
            stopped.set()
            with contextlib.suppress(ImportError):  # not in all versions
                from huggingface_hub.utils._xet import abort_xet_session

                abort_xet_session()  # type: ignore[no-untyped-call]
            raise


def _without_weights(model: HubModel, commit: str) -> str:
    """The reason why a repository without safetensors cannot be served."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(model.repository, revision=commit)
    except Exception:  # as in ``download``; the list is only for the message
        return "the cache of the Hugging Face Hub has no safetensors of this model"
    gguf_files = [name for name in files if name.lower().endswith(".gguf")]
    if gguf_files:
        return (
            f"has no safetensors, but GGUF files; run `hf download {model.repository}"
            f" {shlex.quote(gguf_files[0])}` and give the path that it prints"
        )
    shown = ", ".join(repr(name)[1:-1] for name in files[:_MOST_NAMED_FILES]) or "no files"
    more = len(files) - _MOST_NAMED_FILES
    return (
        "has no model.safetensors and no other model*.safetensors; memplus opens no pickled"
        f" weights and no adapters. The repository has {shown}"
        f"{f' and {more} more' if more > 0 else ''}"
    )


def _described(model: HubModel, error: Exception) -> CheckpointError:
    """An error of ``huggingface_hub`` as ours, in one line."""
    from huggingface_hub import constants, errors

    endpoint = _CREDENTIALS.sub("//", constants.ENDPOINT)
    # the library falls back to its cache, and reports both failures in one error
    is_missing = isinstance(error, errors.LocalEntryNotFoundError)
    cause = error.__cause__ if is_missing and isinstance(error.__cause__, Exception) else error
    login = "set HF_TOKEN to a token that may read it, or run `hf auth login`"
    if isinstance(cause, errors.HFValidationError):
        return ModelNotFoundError(f"{model}: is not a valid name on the Hub ({_line(cause)})")
    if isinstance(cause, errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"{model}: the repository has no revision {model.revision or 'main'}"
        )
    if isinstance(cause, errors.GatedRepoError):
        return ModelNotFoundError(
            f"{model}: is gated; accept its terms at {endpoint}/{model.repository}, then {login}"
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"{model}: is neither a folder here nor a repository at {endpoint}; if it is"
            f" private, {login}"
        )
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return CheckpointError(
            f"{model}: is incomplete in the cache {constants.HF_HUB_CACHE}; HF_HUB_OFFLINE is set,"
            " so memplus does not download it"
        )
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        advice = f"; {login}" if status in (401, 403) else ""
        return CheckpointError(f"{model}: {endpoint} answered with HTTP status {status}{advice}")
    if is_missing:
        return CheckpointError(
            f"{model}: is neither a folder here nor wholly in the cache {constants.HF_HUB_CACHE},"
            f" and {endpoint} cannot be reached ({_line(cause)})"
        )
    return CheckpointError(f"{model}: cannot be downloaded ({_line(cause)})")


def _line(error: Exception) -> str:
    text = _CREDENTIALS.sub("//", " ".join(str(error).split()))[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
