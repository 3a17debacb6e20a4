"""The row patches that requests may use, by name: loads, removes and finds them."""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine.errors import (
    ConfigError,
    PatchBusyError,
    PatchFailedError,
    PatchNotLoadedError,
    PatchRefusedError,
    RequestError,
)
from engine.process import EngineLostError
from engine.request import PatchRef, PatchSummary, canonical_patches
from server.api_keys import ApiKey
from server.engine_client import EngineClient
from server.http.errors import ApiError, EngineError
from server.http.named_patches import NamedPatch
from server.http.patch_metrics import PatchMetrics
from server.patch_options import PatchOptions
from weights.errors import PatchError, PatchNotFoundError
from weights.patches.patch_dir import folder_in

logger = logging.getLogger(__name__)
# the first load waits for the hashes of the model's weights, of which there may be 100 GB
_LOAD_TIMEOUT_S = 120.0
_RETRY = {"Retry-After": "5"}


@dataclass(frozen=True)
class ServedPatch:
    """A loaded patch under its name.

    Attributes:
        folder: where it was loaded from.
        is_default: whether requests that name no patches use it.
        created: when it was loaded, in seconds since 1970.
    """

    name: str
    folder: Path
    summary: PatchSummary
    is_default: bool
    created: int


class ServedPatches:
    """The loaded patches of one engine. Several names may stand for equal patches."""

    def __init__(
        self, engine: EngineClient, metrics: PatchMetrics, options: PatchOptions, max_patches: int
    ) -> None:
        """``max_patches`` limits the names, and with them the labels of metrics."""
        self._engine = engine
        self._metrics = metrics
        self._options = options
        self._max_patches = max_patches
        # a folder on a hung disk must not hold the threads that encode prompts
        self._finder = ThreadPoolExecutor(1, thread_name_prefix="patch-folders")
        self._served: dict[str, ServedPatch] = {}
        self._loading: set[str] = set()
        engine.on_patch_lost = self._lost

    def __contains__(self, name: str) -> bool:
        return name in self._served

    def __getitem__(self, name: str) -> ServedPatch:
        return self._served[name]

    def of_key(self, key: ApiKey | None) -> list[ServedPatch]:
        """The patches that a key may use, by name."""
        names = sorted(self._served)
        return [self._served[name] for name in names if key is None or key.may_use(name)]

    async def load_first(self) -> None:
        """Load the patches of ``--patch``.

        Raises:
            ConfigError: one of them cannot be used; the message names it.
            EngineLostError: the engine has died.
        """
        for name, folder in self._options.folders.items():
            try:
                await self._load(name, folder)
            except PatchNotLoadedError as error:
                raise ConfigError(f"patch: {name}: {error}") from None

    async def load(self, name: str) -> ServedPatch:
        """Load the patch of a name that is not in use.

        The folder is that of ``--patch``, or the one with this name in ``--patch-dir``.

        Raises:
            ApiError: 400 if it is refused, 404 if there is none, 409 if the name is in use, 500 if
                it cannot be loaded now, 503 if the engine is not running or requests still use
                removed patches whose memory it needs, 504 if it takes too long.
        """
        if name in self._served:
            raise ApiError(409, f"name: patch {name!r} is already loaded", param="name")
        self._check_not_loading(name)
        self._loading.add(name)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_LOAD_TIMEOUT_S):
                folder = await loop.run_in_executor(self._finder, self._folder, name)
                self._check_number()
                return await self._load(name, folder)
        except TimeoutError:
            self._metrics.loads.labels("failed").inc()
            message = f"patch {name!r} was not loaded within {_LOAD_TIMEOUT_S:g} s"
            logger.error("%s; the load was cancelled", message)
            raise ApiError(504, f"name: {message}", "timeout_error", param="name") from None
        except PatchBusyError as error:
            self._metrics.loads.labels("failed").inc()
            message = f"name: patch {name!r}: {error}"
            raise ApiError(503, message, "server_error", "name", headers=_RETRY) from None
        except PatchFailedError as error:
            self._metrics.loads.labels("failed").inc()
            logger.error("patch %s was not loaded: %s", name, error)
            message = f"name: patch {name!r} could not be loaded; the server's log says why"
            raise EngineError(message) from None
        except PatchRefusedError as error:
            self._metrics.loads.labels("refused").inc()
            logger.warning("patch %s was refused: %s", name, error)
            # clients need not know where the server keeps its patches
            reason = str(error).replace(str(folder), name)
            raise ApiError(400, f"name: patch {name!r}: {reason}", param="name") from None
        except EngineLostError as error:
            raise ApiError(503, str(error), "server_error", headers=_RETRY) from None
        finally:
            self._loading.remove(name)

    async def unload(self, name: str) -> None:
        """Refuse a patch to new requests; those that use it finish with it.

        Raises:
            ApiError: 404 if there is none of that name, 409 if it is a default one or is being
                loaded.
        """
        self._check_not_loading(name)
        if name not in self._served:
            raise ApiError(404, f"name: no patch {name!r} is loaded", param="name")
        served = self._served[name]
        if served.is_default:
            message = f"name: patch {name!r} is one of --default-patches"
            raise ApiError(409, message, param="name")
        self._drop(name)
        content_hash = served.summary.content_hash
        self._engine.unload_patch(content_hash, served.folder)
        logger.info("patch %s was removed: %s", name, content_hash)

    def refs(self, named: Sequence[NamedPatch] | None, key: ApiKey | None) -> tuple[PatchRef, ...]:
        """The patches of a request, in canonical order; None gives the default ones for the key.

        Raises:
            ApiError: 403 if the key may not use one, 503 if a default one is lost.
            RequestError: one is not loaded, or the sum of its scales is out of range.
        """
        if named is None:
            named = self._defaults(key)
        for name, _ in named:
            check_key(key, name, "memory_patches")
            if name not in self._served:
                raise RequestError("memory_patches", f"no patch {name!r} is loaded")
        return canonical_patches(
            PatchRef(self._served[name].summary.content_hash, scale) for name, scale in named
        )

    def check_defaults(self) -> None:
        """Raise ApiError (503) without a name if a default patch is lost; the log has the name."""
        if not all(name in self._served for name in self._options.default_patches):
            raise _lost_error("a default row patch")

    def _defaults(self, key: ApiKey | None) -> list[NamedPatch]:
        names = self._options.default_patches
        usable = [name for name in names if key is None or key.may_use(name)]
        lost = [name for name in usable if name not in self._served]
        if lost:
            raise _lost_error(f"the default patch {lost[0]!r}")
        return [NamedPatch(name) for name in usable]

    def _check_not_loading(self, name: str) -> None:
        if name in self._loading:
            raise ApiError(409, f"name: patch {name!r} is being loaded", param="name")

    def _check_number(self) -> None:
        """Raise PatchRefusedError if the names in use and those being loaded are too many."""
        if len(self._served) + len(self._loading) > self._max_patches:
            raise PatchRefusedError(
                f"--max-patches: {self._max_patches} row patches are allowed, and as many are"
                " loaded; remove a patch or raise the limit"
            )

    def _folder(self, name: str) -> Path:
        """The folder of a patch, which is not a symbolic link; ApiError if there is none."""
        if name in self._options.folders:
            return self._options.folders[name]
        if self._options.patch_dir is None:
            message = "name: patches cannot be loaded; the server was started without --patch-dir"
            raise ApiError(400, message, param="name")
        try:
            return folder_in(Path(self._options.patch_dir), name)
        except PatchNotFoundError as error:
            raise ApiError(404, f"name: patch {error}", param="name") from None
        except PatchError as error:
            raise ApiError(400, f"name: patch {error}", param="name") from None

    async def _load(self, name: str, folder: Path) -> ServedPatch:
        summary = await self._engine.load_patch(folder)
        is_default = name in self._options.default_patches
        served = self._served[name] = ServedPatch(
            name, folder, summary, is_default, int(time.time())
        )
        self._metrics.add(name, summary)
        self._metrics.loads.labels("loaded").inc()
        rows, size, content_hash = summary.num_rows, summary.num_bytes, summary.content_hash
        logger.info("patch %s was loaded: %d rows, %d bytes, %s", name, rows, size, content_hash)
        return served

    def _lost(self, content_hash: str) -> None:
        """Drop the names of a patch that a restarted engine could not load again."""
        for name, served in list(self._served.items()):
            if served.summary.content_hash == content_hash:
                self._drop(name)
                logger.error("patch %s is lost: %s", name, content_hash)

    def _drop(self, name: str) -> None:
        served = self._served.pop(name)
        self._metrics.remove(name, served.summary.content_hash)


def _lost_error(patch: str) -> ApiError:
    message = f"{patch} was lost when the engine restarted"
    return ApiError(503, message, "server_error", code="patch_lost")


def check_key(key: ApiKey | None, patch: str, param: str) -> None:
    """Raise ApiError (403) if requests with a key may not use a patch, loaded or not."""
    if key is not None and not key.may_use(patch):
        message = f"{param}: this API key may not use patch {patch!r}"
        raise ApiError(403, message, param=param, code="patch_not_allowed")
