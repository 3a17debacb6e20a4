"""The device that computes: chosen by ``--device``, with a log line that gives the reason."""

import importlib.util
import logging

import torch
from torch import distributed

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.config import c_compiler
from server.device_dtypes import cpu_dtype, gpu_dtype
from server.model_options import ModelOptions

# the Triton kernels are compiled for bfloat16 products, which older GPUs do not have
_MIN_CAPABILITY = (8, 0)

logger = logging.getLogger(__name__)


def chosen_device(
    model: ModelOptions, engine: EngineConfig | None = None, *, on_several_machines: bool = False
) -> torch.device:
    """The device of ``model.device``, after a check that it supports the other settings.

    With tensor-parallel ranks it is the first one; each later rank has the next GPU. Ranks on
    several machines need the CPU.

    Raises:
        ConfigError: a GPU is not usable, or the device does not support a setting.
    """
    engine = engine or EngineConfig()
    needs_cpu = "nnodes above 1" if on_several_machines else _cpu_setting(model, engine)
    device, reason = _choice(model, needs_cpu)
    if device.type == "cpu":
        logger.info("device: cpu (%s)", reason)
        _check_cpu_settings(model, engine, reason)
    else:
        ranks = model.tensor_parallel
        last = f" to cuda:{device.index + ranks - 1}" if ranks > 1 else ""
        name = torch.cuda.get_device_name(device)
        logger.info("device: %s%s, %s (%s)", device, last, name, reason)
    return device


def _choice(model: ModelOptions, cpu_setting: str | None) -> tuple[torch.device, str]:
    """The device, and the reason for it; ``cpu_setting`` is one that only a CPU supports."""
    option = model.device
    if option == "cpu":
        return torch.device("cpu"), "--device cpu"
    if cpu_setting and option == "auto":
        return torch.device("cpu"), f"auto: --{cpu_setting.replace('_', '-')} needs the CPU"
    index = int(option.partition(":")[2] or 0)
    problem = _problem(index)
    if problem is None and cpu_setting:
        setting = cpu_setting.replace(" ", ": ", 1)
        hint = "use --device cpu"
        if model.weight_dtype != "auto":
            hint += ", or serve a folder that `memplus quantize --weight-dtype` wrote"
        raise ConfigError(f"{setting} is not supported on a GPU yet; {hint}")
    if problem is None and model.tensor_parallel > 1:
        problem = _ranks_problem(index, model.tensor_parallel)
        if problem is not None and option != "auto":
            raise ConfigError(f"tensor_parallel: {problem}; use --device cpu")
    if problem is None:
        reason = "auto takes a usable GPU" if option == "auto" else f"--device {option}"
        return torch.device("cuda", index), reason
    if option == "auto":
        return torch.device("cpu"), f"auto: {problem}"
    raise ConfigError(f"device: {option} cannot be used: {problem}; use --device cpu")


def _cpu_setting(model: ModelOptions, engine: EngineConfig) -> str | None:
    """Name and value of a setting that only a CPU supports, if one is given."""
    return cpu_dtype(model.weight_dtype, engine.kv_dtype)


def _problem(index: int) -> str | None:
    """The reason why this GPU cannot be used; None if it can."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this build of torch supports no GPU"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if c_compiler() is None:
        return "triton needs a C compiler: install gcc or clang, or set CC to one"
    count = torch.cuda.device_count()
    if index >= count:
        return f"torch finds {count} GPU{'s' if count > 1 else ''}, and numbers start at 0"
    if torch.version.hip is not None:  # compute capabilities are NVIDIA's
        return None
    found = torch.cuda.get_device_capability(index)
    if found < _MIN_CAPABILITY:
        needed = "{}.{}".format(*_MIN_CAPABILITY)
        return "its compute capability is {}.{}, less than {}".format(*found, needed)
    return None


def _ranks_problem(first: int, num_ranks: int) -> str | None:
    """The reason why ranks cannot use the GPUs from ``first`` on; None if they can."""
    count = torch.cuda.device_count()
    if first + num_ranks > count:
        gpus = f"{count} GPU{'s' if count > 1 else ''}"
        return f"{num_ranks} ranks from cuda:{first} on need one GPU each, but torch finds {gpus}"
    if not distributed.is_nccl_available():
        return "this build of torch has no nccl"
    # other kinds round differently, so the ranks would choose different rows of the value tables
    devices = [torch.device("cuda", index) for index in range(first, first + num_ranks)]
    names = [torch.cuda.get_device_name(device) for device in devices]
    other = next((one for one, name in enumerate(names, first) if name != names[0]), None)
    if other is None:
        return None
    return f"all ranks need the same kind of GPU, but cuda:{other} is {names[other - first]}"


def _check_cpu_settings(model: ModelOptions, engine: EngineConfig, reason: str) -> None:
    needs = f"needs a GPU, but the engine runs on the CPU ({reason})"
    if model.table_tier == "host":
        raise ConfigError(f"table_tier: host {needs}")
    dtype = gpu_dtype(model.dtype, engine.kv_dtype)
    if dtype is not None:
        raise ConfigError(f"{dtype.replace(' ', ': ')} {needs}")
    if engine.gpu_memory_utilization != EngineConfig.gpu_memory_utilization:
        # a warning, so that it shows at every level
        logger.warning("the engine runs on the CPU: --gpu-memory-utilization has no effect")
