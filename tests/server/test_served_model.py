"""The model's name for clients, and the version of a GGUF file that engines serve."""

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
from weights.models.named_models import ModelFolder


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


@pytest.mark.parametrize(
    ("model", "repository", "given", "name"),
    [
        ("acme/tiny@main", "acme/tiny", None, "acme/tiny"),
        ("acme/tiny", None, None, "tiny"),
        ("acme/tiny", "acme/tiny", "ours", "ours"),
    ],
)
def test_a_model_of_the_hub_is_served_under_its_name(
    monkeypatch, memory_plus_folder, model, repository, given, name
):
    folder = ModelFolder(memory_plus_folder, repository=repository)
    monkeypatch.setattr(served_model, "find_served", lambda name, adapter, cache: folder)
    engine, http = EngineConfig(kv_cache_gib=0.001), HttpOptions(served_model_name=given)
    others = http, PatchOptions(), LimitOptions(), SupervisionOptions(), MonitoringOptions()
    assert ServedModel(ModelOptions(model, device="cpu"), engine, *others).name == name
