"""Memory that each tier of a table takes, and the tokens a second that it is expected to give."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.model.step_work import Chunk
from server.plan.disk_time import cpu_micro_batches, seconds_from_disk
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
        device_bytes: memory of each GPU: weights, KV cache, table or its cache. On a CPU this is
            the host memory of all ranks.
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

    def of_replicas(self, count: int, machine: Machine) -> "TierPlan":
        """Memory of all GPUs, or CPUs, and tokens per second of ``count`` copies on such machines.

        Each copy has the whole load, so together they have ``count`` times the sequences.
        """
        gpus = machine.ranks if machine.is_on_gpu else 1
        return replace(
            self,
            device_bytes=count * gpus * self.device_bytes,
            host_bytes=count * self.host_bytes,
            decode_tokens_per_s=tuple(count * one for one in self.decode_tokens_per_s),
            prefill_tokens_per_s=count * self.prefill_tokens_per_s,
        )


def plans(model: PlannedModel, machine: Machine, options: PlanOptions) -> list[TierPlan]:
    """The plan of each tier that the machine can have and that is not refused, fastest first.

    KV memory is that of the largest batch. A model without tables has one plan.

    Raises:
        ConfigError: a sequence of the load exceeds the model's positions.
    """
    load = options.load(model.config.max_positions)
    tiers = [
        "device",
        *(tier for tier in slower_tiers(model, machine) if tier not in model.refused),
    ]
    return [_plan(tier, model, machine, options, load) for tier in tiers]


def slower_tiers(model: PlannedModel, machine: Machine) -> tuple[str, ...]:
    """The tiers in which tables can be outside of the device's memory."""
    if not model.table_bytes:
        return ()
    return ("host", "disk") if machine.is_on_gpu else ("disk",)


def _plan(
    tier: str, model: PlannedModel, machine: Machine, options: PlanOptions, load: Load
) -> TierPlan:
    device = model.bytes_in_memory(
        max(load.batches) * load.context_len,
        has_tables=tier == "device",
        is_on_gpu=machine.is_on_gpu,
    )
    host, cache = 0, round(options.cache_share * model.table_bytes)
    if tier == "host":
        device, host = device + cache, model.table_bytes
    elif tier == "disk" and not machine.is_on_gpu:
        device += cache
    elif tier == "disk":
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

    Ranks wait for the slowest one, then exchange. A GPU's transfers of rows are counted as if they
    did not overlap with products; at best the longer of both counts. Behind a GPU, rows of the disk
    tier come over the bus from the cache in host memory too.
    """
    tokens = sum(chunk.count for chunk in chunks)
    row_bytes = model.work.table_bytes(tokens)
    missed_bytes = (1 - options.hits) * row_bytes
    reads = missed_bytes / model.row_bytes if tier == "disk" else 0.0
    micro_batches = 1
    if reads and not machine.is_on_gpu:
        assert model.config.memory is not None
        cached_rows = round(options.cache_share * model.config.memory.num_rows)
        micro_batches = cpu_micro_batches(model.config, tokens, reads, cached_rows)
    seconds = max(
        step_seconds(
            rank.work,
            machine.rank_limits,
            chunks,
            num_logits,
            efficiency=options.efficiency,
            threads=machine.rank_threads,
            micro_batches=micro_batches,
        )
        for rank in model.ranks
    )
    if machine.link is not None:
        seconds += model.exchange.seconds(tokens, num_logits, machine.link)
    if tier != "device" and machine.is_on_gpu:
        seconds += (row_bytes if tier == "disk" else missed_bytes) / machine.bus_gb_per_s / 1e9
    if tier != "disk":
        return seconds
    return seconds_from_disk(
        model.config,
        machine.disk,
        seconds,
        reads,
        micro_batches=micro_batches,
        is_on_gpu=machine.is_on_gpu,
    )
