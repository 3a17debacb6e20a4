"""The choice of the device, with a fake torch.cuda, and settings that a device refuses."""

import logging
from types import SimpleNamespace

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from memory_ops.tables.device import DeviceTable
from server import model_loading
from server.cli.main import main
from server.device import chosen_device
from server.model_loading import load_served
from server.model_options import ModelOptions
from weights.checkpoints.gpu_tier import GpuTierChoice


@pytest.fixture(autouse=True)
def _all_messages(caplog):
    caplog.set_level(logging.INFO)


@pytest.fixture
def gpus(monkeypatch):
    """Installs a fake torch.cuda with GPUs of these compute capabilities."""

    def install(*capabilities, cuda="13.0", hip=None, names=None, has_nccl=True):
        names = names or [f"GPU {index}" for index in range(len(capabilities))]
        fake = SimpleNamespace(
            is_available=lambda: bool(capabilities),
            device_count=lambda: len(capabilities),
            get_device_capability=lambda device: capabilities[device],
            get_device_name=lambda device: names[device.index],
        )
        monkeypatch.setattr(torch, "cuda", fake)
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)

    return install


@pytest.mark.parametrize(
    ("option", "index", "line"),
    [
        ("auto", 0, "device: cuda:0, GPU 0 (auto takes a usable GPU)"),
        ("cuda", 0, "device: cuda:0, GPU 0 (--device cuda)"),
        ("cuda:1", 1, "device: cuda:1, GPU 1 (--device cuda:1)"),
    ],
)
def test_a_usable_gpu_is_taken_and_logged(gpus, caplog, option, index, line):
    gpus((9, 0), (8, 0))
    assert chosen_device(ModelOptions(device=option)) == torch.device("cuda", index)
    assert caplog.messages == [line]


def test_the_cpu_is_taken_if_asked_for(gpus, caplog):
    gpus((9, 0))
    assert chosen_device(ModelOptions(device="cpu")) == torch.device("cpu")
    assert caplog.messages == ["device: cpu (--device cpu)"]


@pytest.mark.parametrize(
    ("capabilities", "cuda", "option", "problem"),
    [
        ([], None, "cuda", "this build of torch supports no GPU"),
        ([], "13.0", "cuda", "torch finds no GPU"),
        ([(7, 5)], "13.0", "cuda:0", "its compute capability is 7.5, less than 8.0"),
        ([(9, 0)], "13.0", "cuda:1", "torch finds 1 GPU, and numbers start at 0"),
        ([(9, 0)] * 2, "13.0", "cuda:2", "torch finds 2 GPUs, and numbers start at 0"),
    ],
)
def test_an_unusable_gpu_is_refused_and_auto_takes_the_cpu(
    gpus, caplog, capabilities, cuda, option, problem
):
    gpus(*capabilities, cuda=cuda)
    named = f"device: {option} cannot be used: {problem}; use --device cpu"
    with pytest.raises(ConfigError) as refused:
        chosen_device(ModelOptions(device=option))
    assert str(refused.value) == named
    if option in ("cuda", "cuda:0"):
        assert chosen_device(ModelOptions()) == torch.device("cpu")
        assert caplog.messages == [f"device: cpu (auto: {problem})"]


def test_a_gpu_of_amd_has_no_compute_capability_to_compare(gpus):
    gpus((7, 0), cuda=None, hip="6.4")
    assert chosen_device(ModelOptions()) == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("model", "engine", "named"),
    [
        ({"table_tier": "host"}, {}, "table_tier: host needs a GPU"),
        ({"dtype": "float16"}, {}, "dtype: float16 needs a GPU"),
        ({}, {"kv_dtype": "fp8"}, "kv_dtype: fp8 needs a GPU"),
    ],
)
def test_a_cpu_refuses_settings_that_need_a_gpu_with_the_reason(gpus, model, engine, named):
    gpus()
    reason = r", but the engine runs on the CPU \(auto: torch finds no GPU\)"
    with pytest.raises(ConfigError, match=f"^{named}{reason}"):
        chosen_device(ModelOptions(**model), EngineConfig(**engine))
    gpus((9, 0))
    chosen_device(ModelOptions(**model), EngineConfig(**engine))


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (ModelOptions, "weight_dtype", "int8"),
        (ModelOptions, "weight_dtype", "int4"),
        (EngineConfig, "kv_dtype", "int8"),
    ],
)
def test_a_gpu_refuses_settings_that_need_a_cpu_and_auto_takes_the_cpu(
    gpus, caplog, settings, name, value
):
    gpus((9, 0))

    def chosen(device):
        values = {ModelOptions: {"device": device}, EngineConfig: {}}
        values[settings][name] = value
        return chosen_device(*(one(**given) for one, given in values.items()))

    with pytest.raises(ConfigError, match=f"{name}: {value} is not supported on a GPU yet; use"):
        chosen("cuda")
    assert chosen("auto") == torch.device("cpu")
    option = name.replace("_", "-")
    assert caplog.messages == [f"device: cpu (auto: --{option} {value} needs the CPU)"]


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("cuda", "device: cuda:0 to cuda:1, H (--device cuda)"),
        ("auto", "device: cuda:0 to cuda:1, H (auto takes a usable GPU)"),
        ("cuda:1", "device: cuda:1 to cuda:2, H (--device cuda:1)"),
    ],
)
def test_tensor_parallel_ranks_take_the_gpus_from_the_chosen_one_on(gpus, caplog, option, line):
    gpus(*[(9, 0)] * 3, names=["H"] * 3)
    found = chosen_device(ModelOptions(device=option, tensor_parallel=2))
    assert found == torch.device("cuda", int(option == "cuda:1"))
    assert caplog.messages == [line]


@pytest.mark.parametrize(
    ("option", "gpu", "problem"),
    [
        ("cuda", {}, "4 ranks from cuda:0 on need one GPU each, but torch finds 3 GPUs"),
        ("cuda:1", {"ranks": 3}, "3 ranks from cuda:1 on need one GPU each, but torch finds 3"),
        ("cuda", {"ranks": 3, "has_nccl": False}, "this build of torch has no nccl"),
        (
            "cuda",
            {"ranks": 3, "names": ["H", "H", "A"]},
            "all ranks need the same kind of GPU, but cuda:2 is A",
        ),
    ],
)
def test_gpus_that_ranks_cannot_use_are_refused_and_auto_takes_the_cpu(
    gpus, caplog, option, gpu, problem
):
    ranks = gpu.pop("ranks", 4)
    gpus(*[(9, 0)] * 3, **({"names": ["H"] * 3} | gpu))
    with pytest.raises(ConfigError, match=f"^tensor_parallel: {problem}.*; use --device cpu$"):
        chosen_device(ModelOptions(device=option, tensor_parallel=ranks))
    if option == "cuda":
        assert chosen_device(ModelOptions(tensor_parallel=ranks)) == torch.device("cpu")
        assert caplog.messages == [f"device: cpu (auto: {problem})"]


def test_ranks_on_several_machines_need_the_cpu(gpus, caplog):
    # the ranks of all machines together are more than the GPUs of this one
    gpus((9, 0), names=["H"])

    def chosen(device):
        model = ModelOptions(device=device, tensor_parallel=2)
        return chosen_device(model, on_several_machines=True)

    with pytest.raises(ConfigError, match="^nnodes: above 1 is not supported on a GPU yet"):
        chosen("cuda")
    assert chosen("auto") == chosen("cpu") == torch.device("cpu")
    assert caplog.messages[0] == "device: cpu (auto: --nnodes above 1 needs the CPU)"


def test_a_gpu_needs_triton(gpus, monkeypatch):
    gpus((9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="device: cuda cannot be used: triton is not installed"):
        chosen_device(ModelOptions(device="cuda"))


def test_a_gpu_needs_a_c_compiler_where_triton_looks_for_it(gpus, monkeypatch, tmp_path):
    gpus((9, 0))
    named = "device: cuda cannot be used: triton needs a C compiler: install gcc or clang, or set"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for name in (None, "cc", "gcc", "clang"):
        for file in tmp_path.iterdir():
            file.unlink()
        if name is not None:
            (tmp_path / name).touch(0o755)
        if name in ("gcc", "clang"):
            assert chosen_device(ModelOptions(device="cuda")).type == "cuda"
            continue
        with pytest.raises(ConfigError, match=named):
            chosen_device(ModelOptions(device="cuda"))
    monkeypatch.setenv("CC", "my-cc")
    with pytest.raises(ConfigError, match=named):
        chosen_device(ModelOptions(device="cuda"))
    (tmp_path / "my-cc").touch(0o755)
    assert chosen_device(ModelOptions(device="cuda")).type == "cuda"


def test_an_option_without_effect_is_logged(gpus, caplog):
    gpus((9, 0))
    engine = EngineConfig(gpu_memory_utilization=0.5)
    chosen_device(ModelOptions(), engine)
    assert "no effect" not in caplog.text
    chosen_device(ModelOptions(device="cpu"), engine)
    assert "--gpu-memory-utilization has no effect" in caplog.messages[-1]


@pytest.mark.parametrize(("asked", "kv_bytes"), [(None, None), (0.5, 2**29)])
def test_a_gpu_leaves_the_kv_pool_to_the_executor(memory_plus_folder, monkeypatch, asked, kv_bytes):
    config = EngineConfig(kv_cache_gib=asked, gpu_memory_utilization=0.7, kv_dtype="fp8")
    requests = []

    def choice(request, device, utilization, limits):
        requests.append((request, utilization))
        return GpuTierChoice(request, device, utilization, limits, lambda device: (2**33, 2**33))

    monkeypatch.setattr(model_loading, "GpuTierChoice", choice)
    options = ModelOptions(str(memory_plus_folder), dtype="float16")
    # meta tensors stand for those of a GPU
    device = torch.device("meta")
    loaded = load_served(options, memory_plus_folder, config, device, keep_stored=True)
    assert loaded.kv_bytes == kv_bytes and loaded.dtype is torch.float16
    assert {one.device for one in loaded.model.parameters()} == {device}
    ((request, utilization),) = requests
    assert utilization == 0.7 and request.is_kv_requested == (asked is not None)
    # 64 sequences of 512 positions, of 4 layers x 2 x 2 KV heads x 8 dims x 1 byte
    assert request.kv_bytes == (kv_bytes or 64 * 512 * 4 * 2 * 2 * 8)


def test_a_gpu_gets_tables_on_disk_with_both_caches(memory_plus_folder, monkeypatch):
    pytest.importorskip("triton")
    calls = []

    def choice(request, device, utilization, limits):
        return GpuTierChoice(request, device, utilization, limits, lambda device: (2**33, 2**33))

    def opened(stored, layouts, config, caches, device, **options):
        calls.append(caches)
        rows_RV = torch.empty(config.memory.num_rows, config.memory.value_dim)
        return {name: DeviceTable(rows_RV) for name in config.table_names}

    monkeypatch.setattr(model_loading, "GpuTierChoice", choice)
    monkeypatch.setattr("weights.checkpoints.gpu_disk_tables.open_gpu_disk_tables", opened)
    options = ModelOptions(str(memory_plus_folder), table_tier="disk", table_cache="3MiB")
    load_served(options, memory_plus_folder, EngineConfig(), torch.device("meta"))
    ((gpu_cache, host_cache),) = calls
    # the GPU's cache holds all rows of the small table
    assert host_cache == 3 * 2**20 and 0 < gpu_cache < 2**30


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--port", "0"],
        ["generate", "x"],
        ["eval", "--questions", "questions.jsonl"],
        ["bench", "offline"],
        ["bench", "trace", "questions.jsonl", "--out", "trace.npz"],
        ["bench", "lookahead", "questions.jsonl"],
    ],
)
def test_the_command_refuses_a_missing_gpu_in_one_line(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    assert main([*arguments, "--device", "cuda"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "device" in line] == lines[-1:]
    assert lines[-1].startswith("memplus: --device: cuda cannot be used: ")
    # the first line gives the number of threads, the second says that a server loads its model
    assert len(lines) <= 3
