"""A plan as text to print."""

import math
from collections.abc import Sequence

from server.plan.machine import Link, Machine
from server.plan.options import Load, PlanOptions
from server.plan.planned_model import PlannedModel
from server.plan.prediction import TierPlan, slower_tiers
from weights.checkpoints.memory_request import size_text


def report(
    name: str,
    model: PlannedModel,
    machine: Machine,
    options: PlanOptions,
    plans: Sequence[TierPlan],
) -> str:
    """The sizes of the model, the machine, and a line per tier."""
    load = options.load(model.config.max_positions)
    tiers = slower_tiers(model, machine)
    most = max(load.batches)
    kv = most * load.context_len * model.kv_bytes
    lines = [
        f"model     {name}: {model.dense:,} dense parameters{_table(model)}",
        f"machine   {_machine(machine, has_disk='disk' in {one.tier for one in plans})}",
        f"weights   {size_text(model.weight_bytes)}",
        f"KV cache  {model.kv_bytes:,} bytes a token; {size_text(kv)} for {most} sequences of"
        f" {load.context_len:,} tokens",
    ]
    if model.table_bytes:
        rows = model.config.rows_per_token
        lines.append(
            f"table     {size_text(model.table_bytes)}; one token reads {rows:,}"
            f" rows of {model.row_bytes:,} bytes, {size_text(model.work.table_bytes(1))}"
        )
    if len(plans) > 1:
        lines.append(
            f"cache     of the host and disk tiers: {options.cache_share:.0%} of the table"
            f" (--table-cache {math.ceil(options.cache_share * model.table_bytes / 2**20)}MiB),"
            f" and {options.hits:.0%} of the rows read need no fetch"
        )
    if machine.link is not None:
        lines += _ranks(model, machine, load)
    lines += ["", *_tiers(plans, machine, load.batches)]
    lines += [
        f"{tier:<7} refused: {model.refused[tier]}" for tier in tiers if tier in model.refused
    ]
    fitting = [one.tier for one in plans if one.fits]
    lines += ["", f"fastest that fits: {fitting[0]}" if fitting else "nothing fits"]
    if options.replicas > 1:
        lines += ["", *_replicas(options.replicas, plans, machine, load.batches)]
    if options.replicas > 1 or machine.ranks > 1:
        lines += ["", "computed, not measured with several processes, GPUs or machines"]
    return "\n".join(lines)


def _table(model: PlannedModel) -> str:
    memory, config = model.config.memory, model.config
    if memory is None:
        return ""
    count = len(config.table_names)
    return (
        f"; {len(config.memory_layers)} memory layers,"
        f" {'one table' if count == 1 else f'{count} tables'} of {memory.num_rows:,} rows"
        f" x {memory.value_dim:,} ({count * memory.num_rows * memory.value_dim:,} parameters)"
    )


def _machine(machine: Machine, *, has_disk: bool) -> str:
    limits = machine.limits
    products = f"{limits.gflops / 1e3:.2f} TFLOP/s"
    if machine.threads:
        products += f" with {machine.threads} thread{'s' if machine.threads > 1 else ''}"
    if limits.integer_gops:
        products += f", {limits.integer_gops / 1e3:.2f} TOP/s of integers"
    host = f"{size_text(machine.host_memory)} of host memory"
    if machine.device_memory is None:
        text = f"{machine.name}: {host} at {limits.gb_per_s:.1f} GB/s, {products}"
    else:
        each = "each " if machine.ranks > 1 else ""
        memory = f"{size_text(machine.device_memory)} at {limits.gb_per_s:,.0f} GB/s"
        text = f"{machine.name}: {each}{memory}, {products}"
        if machine.host_memory:
            text += f"; {host} at {machine.bus_gb_per_s:,.1f} GB/s over the bus"
    disk = machine.disk
    if has_disk:
        text += f"; disk {disk.reads_per_s:,.0f} reads/s, {1e6 * disk.latency_s:.0f} µs"
        text += f" ({disk.origin})"
    return text


def _ranks(model: PlannedModel, machine: Machine, load: Load) -> list[str]:
    """The largest rank's part of the model, and what the ranks send each other."""
    most, exchange = max(load.batches), model.exchange
    kv_tokens = most * load.context_len
    parts = [
        f"{size_text(max(rank.weight_bytes for rank in model.ranks))} of weights",
        f"{size_text(kv_tokens * max(rank.kv_bytes for rank in model.ranks))} of the KV cache",
    ]
    if model.table_bytes:
        table = max(rank.table_bytes for rank in model.ranks)
        parts.append(f"{size_text(table)} of the table, by {exchange.table_sharding}")
    once = "; they have embedding and head in memory once"
    link = machine.link
    assert link is not None
    return [
        f"ranks     {machine.ranks}, each with up to {', '.join(parts)}"
        f"{'' if machine.is_on_gpu or not model.mapped_bytes else once}",
        f"exchange  {len(exchange.collectives(most, most))} in a step of {most} tokens, in which"
        f" each rank sends {size_text(round(exchange.sent_bytes(most, most)))}; {_link(link)}",
    ]


def _link(link: Link) -> str:
    return f"{link.gb_per_s:,.1f} GB/s, {1e6 * link.latency_s:.0f} µs each ({link.origin})"


def _tiers(plans: Sequence[TierPlan], machine: Machine, batches: Sequence[int]) -> list[str]:
    device = "memory" if machine.device_memory is None else "GPU memory  host memory"
    columns = "".join(f"{f'at {batch}':>10}" for batch in batches)
    header = f"tier    {device:>12}  fits  tokens/s{columns}    prompt"
    return [header, *(_line(one, machine) for one in plans)]


def _replicas(
    count: int, plans: Sequence[TierPlan], machine: Machine, batches: Sequence[int]
) -> list[str]:
    """Memory and speed of all replicas, and what routing by prefixes keeps."""
    together = [one.of_replicas(count, machine) for one in plans]
    return [
        f"{count} replicas, each on such a machine, together; with {count} times the sequences:",
        *_tiers(together, machine, [count * batch for batch in batches]),
        "routing   a prompt goes to the replica that has computed its beginning, so all KV cache"
        f" hits of one server remain; by chance, 1 in {count} would",
    ]


def _line(one: TierPlan, machine: Machine) -> str:
    memory = f"{size_text(one.device_bytes):>12}"
    if machine.device_memory is not None:
        memory = f"{size_text(one.device_bytes):>10}  {size_text(one.host_bytes):>11}"
    speeds = "".join(f"{_speed(value):>10}" for value in one.decode_tokens_per_s)
    return (
        f"{one.tier:<7} {memory}  {'yes' if one.fits else 'no':<4}          {speeds}"
        f"{_speed(one.prefill_tokens_per_s):>10}"
    )


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.1f}"
