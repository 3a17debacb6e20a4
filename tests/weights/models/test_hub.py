"""Models of the Hugging Face Hub, downloaded from a hub on this machine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download

from server.cli import train
from server.cli.main import main
from tests.weights.models.fake_hub import FakeHub, fake_hub
from weights.checkpoints.checkpoint import open_checkpoint
from weights.errors import CheckpointError, ModelNotFoundError, TrainingError
from weights.models.hub import HubModel, hub_model
from weights.models.named_models import find_model, local_name

NAME = "acme/tiny"


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def hub(cache, monkeypatch):
    """A hub without repositories, as ``HF_ENDPOINT`` names it, and an empty cache."""
    with fake_hub() as made:
        template = f"{made.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(cache.parent)
        yield made
        huggingface_hub.close_session()


@pytest.fixture
def files(memory_plus_folder) -> dict[str, bytes]:
    """The files of a model, with two that must not be downloaded."""
    found = {path.name: path.read_bytes() for path in memory_plus_folder.iterdir()}
    return found | {"pytorch_model.bin": b"pickle", "modeling.py": b"raise SystemExit"}


def found(name: str) -> Path:
    return find_model(name, Path("cache")).folder


def go_offline(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()


def test_a_model_is_downloaded_once_without_code_and_pickles(hub, files):
    hub.add(NAME, files)
    model = find_model(NAME, Path("cache"))
    assert model.repository == NAME and model.source is None
    wanted = files.keys() - {"pytorch_model.bin", "modeling.py"}
    assert set(hub.downloaded) == {path.name for path in model.folder.iterdir()} == wanted
    assert open_checkpoint(model.folder)[0].model.memory is not None
    hub.requests.clear()
    assert found(NAME) == model.folder
    assert not hub.requests


def test_copies_in_other_layouts_and_files_in_folders_are_not_downloaded(hub, files):
    others = ("consolidated.safetensors", "adapter_model.safetensors", "onnx/model.safetensors")
    hub.add(NAME, files | dict.fromkeys(others, b"x"))
    assert not {path.name for path in found(NAME).iterdir()} & set(others)
    assert "onnx" not in os.listdir(found(NAME))


def test_a_model_in_the_cache_is_found_offline(hub, files, monkeypatch):
    hub.add(NAME, files)
    folder = found(NAME)
    go_offline(monkeypatch)
    assert found(NAME) == folder
    with pytest.raises(CheckpointError, match=r"^acme/other: .* cache .*; HF_HUB_OFFLINE is set"):
        found("acme/other")


def test_a_model_that_is_not_wholly_in_the_cache_is_refused_offline(hub, files, monkeypatch):
    hub.add(NAME, files)
    (found(NAME) / "model.safetensors").unlink()
    go_offline(monkeypatch)
    with pytest.raises(CheckpointError, match=r"^acme/tiny: is incomplete in the cache"):
        found(NAME)


def test_a_model_in_the_cache_is_found_if_the_hub_cannot_be_reached(hub, files, monkeypatch):
    hub.add(NAME, files)
    folder = found(NAME)
    # a port that is reserved for no service
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert found(NAME) == folder
    with pytest.raises(CheckpointError, match=r"^acme/other: .*127.0.0.1:1 cannot be reached"):
        found("acme/other")


def test_a_revision_is_a_branch_or_a_commit(hub, files):
    first = hub.add(NAME, files)
    second = hub.add(NAME, files | {"generation_config.json": b"{}"}, "refs/pr/1")
    assert found(NAME).name == found(f"{NAME}@main").name == found(f"{NAME}@{first}").name == first
    folder = found(f"{NAME}@refs/pr/1")
    assert folder.name == second and (folder / "generation_config.json").read_bytes() == b"{}"
    assert find_model(f"{NAME}@{second}", Path("cache")).repository == NAME
    with pytest.raises(ModelNotFoundError, match=r"^acme/tiny@v9: .* no revision v9$"):
        found(f"{NAME}@v9")


def test_a_broken_download_is_resumed(hub, files, monkeypatch, capsys):
    hub.add(NAME, files)
    hub.cut = {"model.safetensors"}
    waits: list[float] = []
    monkeypatch.setattr(file_download.time, "sleep", waits.append)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 64)
    folder = found(NAME)
    assert "Fetching" not in capsys.readouterr().err  # shown on terminals only
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    half = len(files["model.safetensors"]) // 2
    parts = [part for _, path, part in hub.requests if path.endswith("/model.safetensors")]
    # the library keeps whole chunks
    assert parts == [None, None, f"bytes={half // 64 * 64}-"] and waits


def test_a_signal_ends_a_download_and_leaves_no_partial_files(hub, files, cache, monkeypatch):
    hub.add(NAME, files)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.endless["model.safetensors"] = lambda: os.kill(os.getpid(), signal.SIGINT)
    # a process in the background may ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            found(NAME)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(cache.rglob("*.incomplete"))
    hub.endless.clear()
    assert (found(NAME) / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_private_model_needs_its_token(hub, files, monkeypatch):
    hub.add(NAME, files)
    hub.tokens[NAME] = "secret"
    with pytest.raises(ModelNotFoundError, match=r"^acme/tiny: is neither .*private, set HF_TOKEN"):
        found(NAME)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert (found(NAME) / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "GatedRepo", r"is gated; accept its terms at http://.*/acme/tiny, then set HF_TOKEN"),
        (403, "GatedRepo", r"is gated; "),
        (403, "", r"answered with HTTP status 403; set HF_TOKEN"),
        (404, "RepoNotFound", r"is neither a folder here nor a repository at http://"),
        (410, "", r"answered with HTTP status 410$"),
    ],
)
@pytest.mark.parametrize("of_files", [False, True])
def test_refusals_are_reported_in_one_line(hub, files, status, code, message, of_files):
    hub.add(NAME, files)
    (hub.file_errors if of_files else hub.errors)[NAME] = status, code
    with pytest.raises(CheckpointError, match=f"^{NAME}: .*{message}") as caught:
        found(NAME)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["README.md", "m.Q4.gguf"],
            "but GGUF files; run `hf download acme/tiny m.Q4.gguf` and",
        ),
        (["config.json", "pytorch_model.bin"], "has config.json, pytorch_model.bin$"),
        (["adapter_model.safetensors"], "no adapters. The repository has adapter_model.safeten"),
        ([f"part-{i}.bin" for i in range(7)], r"has part-0.bin, .*part-4.bin and 2 more$"),
        (["bad\nname.bin"], r"has bad\\nname.bin$"),
    ],
)
def test_a_repository_without_safetensors_is_refused_with_what_it_has(hub, names, message):
    hub.add(NAME, dict.fromkeys(names, b"x"))
    with pytest.raises(CheckpointError, match=f"^{NAME}: .*{message}"):
        found(NAME)
    assert set(hub.downloaded) <= {"config.json"}


def test_names_in_the_listing_do_not_leave_the_cache(hub, files, cache):
    names = ["../../../../evil.safetensors", "/tmp/evil.safetensors", "..", "..\\evil.safetensors"]
    hub.add(NAME, files | dict.fromkeys(names[:3], b"x"))
    folder = found(NAME)
    assert {path.name for path in folder.iterdir()} <= files.keys()
    assert not list(cache.parent.rglob("*evil*"))


def test_a_folder_of_the_same_name_wins(hub, files):
    hub.add(NAME, files)
    Path(NAME).mkdir(parents=True)
    assert found(NAME) == Path(NAME) and local_name(NAME) == NAME
    assert find_model(NAME, Path("cache")).repository is None and not hub.requests


@pytest.mark.parametrize("name", ["./a/b", "../b", "/a/b", "~/b", "a/b/c", "a", "a/b.gguf", ""])
def test_paths_are_not_names_of_the_hub(name):
    assert hub_model(name) is None


def test_a_name_has_an_organisation_and_maybe_a_revision():
    assert hub_model("a-1/B.2_c") == HubModel("a-1/B.2_c")
    assert hub_model("a/b@refs/pr/1") == HubModel("a/b", "refs/pr/1")


@pytest.mark.parametrize("revision", ["", "..", "a/../../b", "/etc", "a b", "a\n", "x" * 300])
def test_revisions_that_git_does_not_have_are_refused(revision):
    with pytest.raises(ModelNotFoundError, match=r"^a/b: the rev.* is not a branch, tag or c"):
        hub_model(f"a/b@{revision}")


def test_names_that_the_hub_does_not_allow_are_refused(hub):
    with pytest.raises(ModelNotFoundError, match=r"^a--b/c: is not a valid name on the Hub"):
        found("a--b/c")


def test_verbs_convert_and_inspect_download(hub: FakeHub, files, capsys):
    hub.add(NAME, files)
    assert main(["convert", NAME, "copy", "--dtype", "bfloat16"]) == 0
    assert open_checkpoint(Path("copy"))[0].dtype == "bfloat16"
    assert main(["inspect", NAME]) == 0
    assert "memory" in capsys.readouterr().out
    assert main(["inspect", "acme/none"]) == 2
    assert capsys.readouterr().err.startswith("memplus: acme/none: is neither a folder here nor")


def test_training_starts_from_a_downloaded_model(hub, files, monkeypatch, tmp_path):
    hub.add(NAME, files)
    started: list[str] = []

    def make(config, folder, **settings):
        started.append(config.run.init_from)
        raise TrainingError("enough")

    monkeypatch.setattr(train, "Trainer", make)
    config = '[data]\ntrain = ["a.txt"]\n[run]\nsteps = 1\ninit_from = "acme/tiny"\n'
    (tmp_path / "train.toml").write_text(config)
    assert main(["train", "train.toml", "--out", "run"]) == 2
    assert started == [str(found(NAME))]


@pytest.mark.slow
def test_the_variables_of_the_library_choose_hub_and_cache(hub: FakeHub, files, cache):
    commit = hub.add(NAME, files)
    home = cache.parent / "home"
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    command = [sys.executable, "-m", "server.cli.main", "generate", "ab", "--model", NAME]
    root = Path(__file__).parents[3]
    for offline in ("0", "1"):
        environment = os.environ | variables | {"HF_HUB_OFFLINE": offline}
        done = subprocess.run(
            [*command, "--max-tokens", "4"],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert (home / "hub" / "models--acme--tiny" / "snapshots" / commit).is_dir()
