"""The CUDA executor on a fake device, with kernels that Triton interprets."""

from engine.config import EngineConfig
from engine.executors.cuda.executor import CudaExecutor
from engine.executors.cuda.step import DeviceModel
from engine.executors.lookahead import LookaheadConfig
from engine.model.transformer import Transformer
from tests.engine.executors.cuda.fake_device import FakeDevice


def cuda_on_cpu(
    model: Transformer,
    config: EngineConfig,
    device: FakeDevice | None = None,
    lookahead: LookaheadConfig | None = None,
    *,
    warm: bool = True,
) -> CudaExecutor:
    """An executor whose work runs when its results are waited for; its graphs rerun kernels."""
    device = device or FakeDevice()
    per_token = model.config.kv_bytes_per_token(itemsize=4)
    num_blocks = config.num_kv_blocks(per_token, model.config.max_positions)
    executor = CudaExecutor(DeviceModel(model, lookahead), config, device, num_blocks)
    if warm:
        executor.warm_up()
    return executor
