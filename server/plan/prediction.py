"""Memory that each tier of a table takes, and a bound of the tokens a second that it gives."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.model.step_work import Chunk
from server.plan.disk_time import seconds_from_disk
from server.plan.machine import Machine
from server.plan.options import Load, PlanOptions
from server.plan.planned_model import PlannedModel
from server.plan.step_time import step_seconds

# of a GPU's memory, as --gpu-memory-utilization; of the host's, which others use too
_USABLE = 0.9
# the disk tier's row cache on a GPU, in front of the one in host memory
_GPU_CACHE = 2 * 2**30


@dataclass(frozen=True)
class TierPlan:
    """One tier of a plan.

    Attributes:
        tier: device, host or disk.
        device_bytes: memory of the device: weights, KV cache, table or its cache. On a CPU this is
            host memory.
        host_bytes: host memory that a GPU's server needs for the table or its cache.
        fits: whether the machine has both.
        decode_tokens_per_s: of each batch.
        prefill_tokens_per_s: of a prompt.
    """

    tier: str
    device_bytes: int
    host_bytes: int
    fits: bool
    decode_tokens_per_s: tuple[float, ...]
    prefill_tokens_per_s: float


def plans(model: PlannedModel, machine: Machine, options: PlanOptions) -> list[TierPlan]:
    """The plan of each tier that the machine can have, fastest first.

    KV memory is that of the largest batch. A model without tables has one plan.

    Raises:
        ConfigError: a sequence of the load exceeds the model's positions.
    """
    load = options.load(model.config.max_positions)
    tiers = ["device"]
    if model.table_bytes:
        tiers += ["disk"] if machine.device_memory is None else ["host", "disk"]
    return [_plan(tier, model, machine, options, load) for tier in tiers]


def _plan(
    tier: str, model: PlannedModel, machine: Machine, options: PlanOptions, load: Load
) -> TierPlan:
    kv = max(load.batches) * load.context_len * model.kv_bytes
    cache = round(options.cache_share * model.table_bytes)
    device, host = model.weight_bytes + kv, 0
    if tier == "device":
        device += model.table_bytes
    elif tier == "host":
        device, host = device + cache, model.table_bytes
    elif machine.device_memory is None:
        device += cache
    else:
        device, host = device + min(_GPU_CACHE, model.table_bytes), cache
    memory = machine.host_memory if machine.device_memory is None else machine.device_memory
    # steps attend to half of the context on average
    decode = [Chunk(load.context_len // 2, 1)]
    return TierPlan(
        tier,
        device,
        host,
        device <= _USABLE * memory and host <= _USABLE * machine.host_memory,
        tuple(
            batch / _seconds(tier, model, machine, options, decode * batch, batch)
            for batch in load.batches
        ),
        load.prompt_len / _seconds(tier, model, machine, options, [Chunk(0, load.prompt_len)], 1),
    )


def _seconds(
    tier: str,
    model: PlannedModel,
    machine: Machine,
    options: PlanOptions,
    chunks: Sequence[Chunk],
    num_logits: int,
) -> float:
    """The time of a step.

    A GPU's transfers of rows are counted as if they did not overlap with products; at best the
    longer of both counts. Behind a GPU, rows of the disk tier come over the bus from the cache in
    host memory too.
    """
    tokens = sum(chunk.count for chunk in chunks)
    seconds = step_seconds(
        model.work,
        machine.limits,
        chunks,
        num_logits,
        efficiency=options.efficiency,
        threads=machine.threads,
    )
    if tier == "device" or not model.row_bytes:
        return seconds
    row_bytes = model.work.table_bytes(tokens)
    missed_bytes = (1 - options.hits) * row_bytes
    if machine.bus_gb_per_s:
        seconds += (row_bytes if tier == "disk" else missed_bytes) / machine.bus_gb_per_s / 1e9
    if tier != "disk":
        return seconds
    assert model.config.memory is not None
    return seconds_from_disk(
        model.config,
        machine.disk,
        seconds,
        tokens,
        missed_bytes / model.row_bytes,
        cached_rows=round(options.cache_share * model.config.memory.num_rows),
        is_on_gpu=machine.device_memory is not None,
    )
