"""The engine process: prepares and loads the model, then serves requests over a pipe."""

import gc
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.executors.executor import RankedExecutor
from engine.executors.parallel.group import RankLostError
from engine.loaded_patches import PatchSource
from engine.messages import EngineRefused
from engine.process import run_engine
from engine.rank_patches import RankPatches
from engine.sampling.masks import Grammars
from server.allocator import keep_freed_memory
from server.config import EngineSettings
from server.device import chosen_device
from server.logs import set_up_logs
from server.memory_nodes import spread_over_nodes
from server.model_loading import LoadedModel, load_served, served_executor
from server.parallel_engine import parallel_executor
from weights.checkpoints.config_json import read_config
from weights.checkpoints.tokenizer import load_tokenizer
from weights.errors import CheckpointError
from weights.grammars.compiler import GrammarCompiler
from weights.lack_of_memory import lack_of_memory
from weights.models.prepare import prepare
from weights.patches.patch_loader import PatchLoader


def main(connection: Connection, settings: EngineSettings) -> None:
    """Build an engine and run it; if it cannot be built, send the reason."""
    keep_freed_memory()
    set_up_logs(settings.log_format)
    spread_over_nodes(os.sched_getaffinity(0))
    with ExitStack() as at_end:
        try:
            # at once: this process may be in a collective that the dead rank will never join
            engine = build_engine(settings, serves_patches=True, on_rank_death=lambda: os._exit(1))
            # also after an error. A rank whose connection is freed would seem to have died, and
            # nccl would wait for the graphs
            at_end.callback(engine.close)
            engine.warm_up()
            engine.patches.prepare()
        except (CheckpointError, ConfigError) as error:
            connection.send(EngineRefused(str(error)))
            return
        except RankLostError as error:
            connection.send(EngineRefused(str(error), is_failure=True))
            return
        except (MemoryError, OSError, RuntimeError) as error:
            reason = lack_of_memory(error)
            if reason is None:
                raise
            connection.send(EngineRefused(reason, is_failure=True))
            return
        # the loaded objects stay, so the garbage collector need not scan them again
        gc.collect()
        gc.freeze()
        run_engine(engine, connection)


def build_engine(
    settings: EngineSettings,
    device: torch.device | None = None,
    *,
    serves_patches: bool = False,
    on_rank_death: Callable[[], object] = lambda: None,
) -> Engine:
    """An engine with a loaded model; the model is prepared first if needed.

    ``device`` is by default the one that the settings choose. With ``serves_patches`` the engine
    can read row patches, if the settings allow any. ``on_rank_death`` is that of
    ``parallel_executor``.

    Raises:
        CheckpointError: the model cannot be served.
        ConfigError: a setting does not fit the model or the device; the message names the field.
        RankLostError: as ``parallel_executor``.
    """
    # report an unusable device now, before minutes are spent on preparing the model
    several = settings.nodes is not None
    device = device or chosen_device(settings.model, settings.engine, on_several_machines=several)
    folder = prepare(settings.folder)
    serves_patches = serves_patches and settings.engine.max_patches > 0
    if serves_patches and (reason := read_config(folder).model.patch_refusal):
        raise ConfigError(f"patch_dir: {reason}; start without --patch and --patch-dir")
    if serves_patches and settings.model.weight_dtype != "auto":
        # a patch fits the weights of the folder, and rounded ones may choose other rows
        raise ConfigError(
            "weight_dtype: cannot be used with row patches; make a folder with `memplus quantize"
            " --weight-dtype` and learn the patches on it"
        )
    checkpoint = read_config(folder)
    grammars = GrammarCompiler(
        partial(load_tokenizer, folder), checkpoint.model.vocab_size, checkpoint.eos_ids
    )
    patch_source: PatchSource | None = None
    if serves_patches:
        # each rank moves its columns of a patch to its device
        place = device if settings.model.tensor_parallel == 1 else torch.device("cpu")
        patch_source = PatchLoader(folder, checkpoint.model, place)
    if settings.model.tensor_parallel > 1:
        executor = _ranked_executor(settings, folder, device, on_rank_death)
        if patch_source is not None:
            patch_source = RankPatches(patch_source, executor.share_patch)
        eos_ids, engine = checkpoint.eos_ids, settings.engine
        try:
            return Engine(executor, engine, eos_ids, grammars=grammars, patch_source=patch_source)
        except ConfigError:
            executor.close()
            raise
    loaded = load_served(settings.model, folder, settings.engine, device, keep_stored=True)
    return served_engine(loaded, settings.engine, grammars, patch_source)


def _ranked_executor(
    settings: EngineSettings,
    folder: Path,
    device: torch.device,
    on_rank_death: Callable[[], object],
) -> RankedExecutor:
    """The executor of tensor-parallel ranks, on CPUs or from GPU ``device`` on."""
    arguments = settings.model, folder, settings.engine
    if device.type == "cpu":
        more = settings.log_format, on_rank_death, settings.nodes
        return parallel_executor(*arguments, *more)
    # imports triton, which a CPU does not need
    from server.parallel_gpu import gpu_parallel_executor

    return gpu_parallel_executor(*arguments, device, settings.log_format, on_rank_death)


def served_engine(
    loaded: LoadedModel,
    engine: EngineConfig,
    grammars: Grammars | None = None,
    patch_source: PatchSource | None = None,
) -> Engine:
    """An engine for a loaded model; without ``grammars`` it refuses requests that have one, and
    without ``patch_source`` it reads no row patches.

    A caller that only serves can drop the model afterwards.

    Raises:
        ConfigError: a setting does not fit the model; the message names the field.
    """
    executor = served_executor(loaded, engine)
    return Engine(
        executor, engine, loaded.config.eos_ids, grammars=grammars, patch_source=patch_source
    )
