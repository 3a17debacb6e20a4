"""A plan as text to print."""

import math
from collections.abc import Sequence

from server.plan.machine import Machine
from server.plan.options import PlanOptions
from server.plan.planned_model import PlannedModel
from server.plan.prediction import TierPlan
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
    most = max(load.batches)
    kv = most * load.context_len * model.kv_bytes
    lines = [
        f"model     {name}: {model.dense:,} dense parameters{_table(model)}",
        f"machine   {_machine(machine)}",
        f"weights   {size_text(model.weight_bytes)}",
        f"KV cache  {model.kv_bytes:,} bytes a token; {size_text(kv)} for {most} sequences of"
        f" {load.context_len:,} tokens",
    ]
    if model.table_bytes:
        rows = model.config.rows_per_token
        lines += [
            f"table     {size_text(model.table_bytes)}; one token reads {rows:,}"
            f" rows of {model.row_bytes:,} bytes, {size_text(model.work.table_bytes(1))}",
            f"cache     of the host and disk tiers: {options.cache_share:.0%} of the table"
            f" (--table-cache {math.ceil(options.cache_share * model.table_bytes / 2**20)}MiB),"
            f" and {options.hits:.0%} of the rows read need no fetch",
        ]
    device = "memory" if machine.device_memory is None else "GPU memory  host memory"
    batches = "".join(f"{f'at {batch}':>10}" for batch in load.batches)
    lines += ["", f"tier    {device:>12}  fits  tokens/s{batches}    prompt"]
    lines += [_line(one, machine) for one in plans]
    fitting = [one.tier for one in plans if one.fits]
    lines.append(f"\nfastest that fits: {fitting[0]}" if fitting else "\nnothing fits")
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


def _machine(machine: Machine) -> str:
    limits = machine.limits
    products = f"{limits.gflops / 1e3:.2f} TFLOP/s"
    if machine.threads:
        products += f" with {machine.threads} thread{'s' if machine.threads > 1 else ''}"
    if limits.integer_gops:
        products += f", {limits.integer_gops / 1e3:.2f} TOP/s of integers"
    host = f"{size_text(machine.host_memory)} of host memory"
    disk = f"disk {machine.disk.reads_per_s:,.0f} reads/s, {1e6 * machine.disk.latency_s:.0f} µs"
    disk += f" ({machine.disk.origin})"
    if machine.device_memory is None:
        return f"{machine.name}: {host} at {limits.gb_per_s:.1f} GB/s, {products}; {disk}"
    return (
        f"{machine.name}: {size_text(machine.device_memory)} at {limits.gb_per_s:,.0f} GB/s,"
        f" {products}; {host} at {machine.bus_gb_per_s:,.1f} GB/s over the bus; {disk}"
    )


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
