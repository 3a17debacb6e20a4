"""Loads row patches for a model that is served: reads, checks, indexes, and places them."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from engine.model.config import ModelConfig
from engine.model.row_patches import RowPatch
from engine.request import PatchSummary
from memory_ops.patches.patched_rows import PatchedRows
from weights.errors import CheckpointError, PatchReadError
from weights.patches.model_identity import ModelIdentity, model_identity
from weights.patches.patch_folder import OpenedPatch, opened_patch

logger = logging.getLogger(__name__)


class PatchLoader:
    """The patch source of one model; see ``engine.loaded_patches.PatchSource``."""

    def __init__(self, model: Path, config: ModelConfig, device: torch.device) -> None:
        """Load patches of a checkpoint folder's model into the memory of ``device``."""
        self._model, self._config, self._device = model, config, device

    def prepare(self) -> None:
        """Begin to compute the hashes of the model's weights, in the background."""
        _ = self._identity

    @contextmanager
    def open(self, folder: Path) -> "Iterator[LoadablePatch]":
        """As ``PatchSource.open``. The first call waits for the hashes of the model's weights.

        Raises:
            PatchError: the patch is not valid, or the model takes no patches.
            PatchReadError: files cannot be read now, or memory for them is missing.
        """
        try:
            identity = self._identity.result()
        except (CheckpointError, OSError) as error:
            del self._identity  # the next load tries again
            raise PatchReadError(str(error)) from None
        with opened_patch(folder, identity, follow=False) as opened:
            yield LoadablePatch(opened, self._config, self._device)

    @cached_property
    def _identity(self) -> Future[ModelIdentity]:
        thread = ThreadPoolExecutor(1, thread_name_prefix="model-identity")
        identity = thread.submit(_timed_identity, self._model)
        thread.shutdown(wait=False)
        return identity


class LoadablePatch:
    """An opened patch of the model; see ``engine.loaded_patches.OpenedPatch``."""

    def __init__(self, opened: OpenedPatch, config: ModelConfig, device: torch.device) -> None:
        self._opened, self._config, self._device = opened, config, device
        self.num_rows, self.num_bytes = sum(opened.table_rows.values()), opened.num_bytes

    def content_hash(self) -> str:
        return self._opened.content_hash()

    def read(self, find: Callable[[str], RowPatch | None]) -> RowPatch:
        stored = self._opened.read()
        if (known := find(stored.content_hash)) is not None:
            return known
        tables = {name: PatchedRows(*pair) for name, pair in stored.tables.items()}
        if self._device.type != "cpu":
            tables = {name: rows.to(self._device) for name, rows in tables.items()}
        names = {i: self._config.layer_tables(i).values for i in self._config.memory_layers}
        layers = {layer: tables[name] for layer, name in names.items() if name in tables}
        return RowPatch(stored.content_hash, layers)

    def summary(self, content_hash: str) -> PatchSummary:
        opened = self._opened
        sizes = self.num_rows, self.num_bytes, opened.table_rows
        return PatchSummary(content_hash, *sizes, opened.description.data)


def _timed_identity(model: Path) -> ModelIdentity:
    start = time.monotonic()
    identity = model_identity(model)
    seconds = time.monotonic() - start
    logger.info("row patches: computed the hashes of the model's weights in %.1f s", seconds)
    return identity
