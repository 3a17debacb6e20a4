"""The model that a server serves: its engine process, its tokenizer and its metrics."""

import os
import time
from functools import partial
from pathlib import Path

from engine.config import EngineConfig
from engine.process import EngineProcess
from engine.request import EngineStatistics
from server.config import EngineSettings, HttpOptions, SupervisionOptions, cache_folder
from server.engine_client import EngineClient
from server.http.activity_log import ActivityLog
from server.http.admission import Admission
from server.http.grammar_checker import GrammarChecker
from server.http.metrics import Metrics
from server.http.served_patches import ServedPatches
from server.http.service import Service
from server.limits import LimitOptions
from server.logs import say
from server.model_options import ModelOptions
from server.monitoring import MonitoringOptions
from server.node_options import NodeSettings
from server.patch_options import PatchOptions
from weights.checkpoints.chat_template import load_chat_template
from weights.checkpoints.tokenizer import load_tokenizer
from weights.models.adapted_model import find_served
from weights.models.folder_lock import hold
from weights.models.named_models import NAMED_MODELS

ENGINE_ENTRY = "server.engine_entry:main"


class ServedModel:
    """Starts one engine process, and describes it as a ``Service``.

    Attributes:
        name: the model's name for clients.
    """

    def __init__(
        self,
        model: ModelOptions,
        engine: EngineConfig,
        http: HttpOptions,
        patches: PatchOptions,
        limits: LimitOptions,
        supervision: SupervisionOptions,
        monitoring: MonitoringOptions,
        nodes: NodeSettings | None = None,
    ) -> None:
        """Read the tokenizer and the chat template, if the model's folder exists already.

        Raises:
            ChatTemplateError: the model's chat template is not valid.
            CheckpointError: the model does not exist, or its tokenizer cannot be read.
            ConfigError: the limits contradict each other, a folder of patches does not exist, or
                the engine's settings of patches do not fit the patches.
        """
        limits.check_bodies(http.max_body_mib)
        patches.check_folders()
        self._source = find_served(model.model, model.memory_adapter, cache_folder())
        self.name = http.served_model_name or self._source.repository or _model_name(model.model)
        self.metrics = Metrics(self.name, monitoring.metrics_prefix)
        self.activity = ActivityLog(say)
        self._http, self._engine, self._supervision = http, engine, supervision
        self._patches, self._limits = patches, limits
        self._log_prompts = monitoring.log_prompts
        self._folder = self._source.folder
        # report a bad tokenizer now, before minutes are spent on loading the model
        self._tokenizer = load_tokenizer(self._folder) if self._folder.is_dir() else None
        if self._tokenizer is not None:
            self._tokenizer.token_name(0)  # makes the table of names now, not while streams wait
        self._override = Path(http.chat_template) if http.chat_template else None
        self._template = load_chat_template(self._folder, self._override)
        settings = EngineSettings(
            model, self._source, patches.engine_config(engine), monitoring.log_format, nodes
        )
        self._make_process = partial(EngineProcess, ENGINE_ENTRY, settings)
        self._process = self._make_process()
        self._client: EngineClient | None = None
        self._grammars: GrammarChecker | None = None

    def load(self) -> Service:
        """Start the engine process and wait until the model is loaded.

        Raises:
            ChatTemplateError, CheckpointError: as the constructor, for a model without a folder.
            EngineStartError: the engine could not be built, or ``stop`` ended it.
        """
        ready = self._process.start()
        for made in (self._source, self._source.base):
            if made is not None and made.source is not None:
                # engines that restart need the folder, also after a GGUF file has changed
                hold(made.folder)
        grammars = GrammarChecker(self._folder, ready.limits)
        grammars.start()
        self._grammars = grammars
        client = EngineClient(self._process, self._observe, self._supervision, self._make_process)
        self._client = client
        return Service(
            model_name=self.name,
            created=int(time.time()),
            tokenizer=self._tokenizer or load_tokenizer(self._folder),
            chat_template=self._template or load_chat_template(self._folder, self._override),
            limits=ready.limits,
            engine=client,
            admission=self._admission(ready.limits.max_model_len),
            metrics=self.metrics,
            options=self._limits,
            grammars=grammars,
            patches=ServedPatches(
                client, self.metrics.patches, self._patches, self._engine.max_patches
            ),
            log_prompts=self._log_prompts,
        )

    def stop(self) -> None:
        """End the engine process, also while it loads."""
        (self._client or self._process).stop()
        if self._grammars is not None:
            self._grammars.stop()

    def _admission(self, max_model_len: int) -> Admission:
        places = self._engine.max_num_seqs + self._http.max_queued_requests
        # not all requests are as long as the model allows
        tokens = self._limits.max_admitted_tokens or max(places // 2, 1) * max_model_len
        body_bytes = self._limits.max_bodies_mib * 2**20
        return Admission(
            {"prompts": places, "tokens": tokens, "body_bytes": body_bytes},
            lambda reason: self.metrics.rejections.labels(reason).inc(),
        )

    def _observe(self, statistics: EngineStatistics) -> None:
        self.metrics.observe_step(statistics)
        self.activity.observe_step(statistics)


def _model_name(model: str) -> str:
    # a link's own name: what it points to may be called by a hash
    return model if model in NAMED_MODELS else Path(os.path.abspath(model)).name
