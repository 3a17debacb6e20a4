"""The served version of a GGUF file: found once, and kept by engines that restart."""

import gguf
import pytest

from engine.config import EngineConfig
from server import served_model
from server.config import EngineSettings, HttpOptions, SupervisionOptions
from server.engine_entry import build_engine
from server.limits import LimitOptions
from server.model_options import ModelOptions
from server.monitoring import MonitoringOptions
from server.patch_options import PatchOptions
from server.served_model import ServedModel
from tests.weights.checkpoints.importers.test_gguf import wide_model, with_merges, write_gguf
from weights.errors import CheckpointError


def test_engines_that_restart_serve_the_version_that_the_server_found(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMPLUS_CACHE", str(tmp_path / "cache"))
    started: list[EngineSettings] = []
    monkeypatch.setattr(
        served_model, "EngineProcess", lambda entry, settings: started.append(settings)
    )
    path, model = tmp_path / "m.gguf", wide_model(tie_embeddings=True)
    write_gguf(path, model, gguf.GGMLQuantizationType.Q8_0, changes=with_merges)

    def served():
        engine = EngineConfig(kv_cache_gib=0.001)
        options = ModelOptions(str(path), device="cpu")
        others = HttpOptions(), PatchOptions(), LimitOptions()
        return ServedModel(options, engine, *others, SupervisionOptions(), MonitoringOptions())

    first = served()
    build_engine(started[-1])
    write_gguf(path, model, gguf.GGMLQuantizationType.Q4_0, changes=with_merges)
    first._make_process()
    build_engine(started[-1])
    assert [settings.folder for settings in started] == [first._source] * 2
    assert [one.name for one in (tmp_path / "cache" / "models").glob("m-*[!k]")] == [
        first._source.folder.name
    ]
    # a server that found the new version converts it, unless the file changes again
    served()
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="changed while it was converted; try again"):
        build_engine(started[-1])
