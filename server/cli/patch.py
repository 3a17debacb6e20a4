"""``memplus patch``: inspects, merges, scales, applies and compares row patches."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from server.cli.output_options import add_output_folder
from server.config import cache_folder

if TYPE_CHECKING:  # these modules import torch
    from weights.patches.patch_folder import StoredPatch


def inspect(options: argparse.Namespace) -> None:
    """Check a patch and print its tables, hashes, settings and scores."""
    from weights.patches.patch_folder import read_patch

    print(_describe(read_patch(options.patch)))


def merge(options: argparse.Namespace) -> None:
    """Write the sum of several patches as a new patch."""
    from weights.patches.combine import merged
    from weights.patches.patch_folder import read_patch, write_patch

    patch = merged([read_patch(one) for one in options.patches])
    write_patch(options.out, patch)
    print(_written(options.out, patch))


def scale(options: argparse.Namespace) -> None:
    """Write a patch with all deltas multiplied by a factor as a new patch."""
    from weights.patches.combine import scaled
    from weights.patches.patch_folder import read_patch, write_patch

    patch = scaled(read_patch(options.patch), options.factor)
    write_patch(options.out, patch)
    print(_written(options.out, patch))


def apply(options: argparse.Namespace) -> None:
    """Write a copy of a model with a patch added to its tables."""
    from weights.models.prepare import prepared_folder
    from weights.patches.apply import apply_patch

    model = prepared_folder(options.model, cache_folder())
    for name, error in apply_patch(model, options.patch, options.out).items():
        print(
            f"{name}: {error.num_rows:,} rows written; rounding error: largest"
            f" {error.largest:.3g}, mean {error.mean:.3g}"
        )


def diff(options: argparse.Namespace) -> None:
    """Write the patch that turns the tables of one model into those of another."""
    from weights.models.prepare import prepared_folder
    from weights.patches.difference import write_difference

    first, second = (
        prepared_folder(one, cache_folder()) for one in (options.first, options.second)
    )
    for name, num_rows in write_difference(first, second, options.out).items():
        print(f"{name}: {num_rows:,} rows differ")


def add_patch(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``patch`` and its verbs."""
    description = "Work with row patches: sparse differences of value tables."
    patches = verbs.add_parser("patch", help=description, description=description).add_subparsers(
        title="verbs", required=True, metavar="VERB"
    )
    verb = patches.add_parser("inspect", help=inspect.__doc__, description=inspect.__doc__)
    verb.set_defaults(run=inspect)
    verb.add_argument("patch", type=Path, metavar="PATCH", help="patch folder")

    verb = patches.add_parser("merge", help=merge.__doc__, description=merge.__doc__)
    verb.set_defaults(run=merge)
    several = "patch folders of one model; deltas of the same row are added"
    verb.add_argument("patches", type=Path, nargs="+", metavar="PATCH", help=several)
    _add_out(verb)

    verb = patches.add_parser("scale", help=scale.__doc__, description=scale.__doc__)
    verb.set_defaults(run=scale)
    verb.add_argument("patch", type=Path, metavar="PATCH", help="patch folder")
    factor = "number to multiply by, such as 0.5 or -0.25; -1 gives a patch that undoes this one"
    verb.add_argument("factor", type=float, metavar="FACTOR", help=factor)
    _add_out(verb)

    verb = patches.add_parser("apply", help=apply.__doc__, description=apply.__doc__)
    verb.set_defaults(run=apply)
    verb.add_argument("model", metavar="MODEL", help="model name, folder or ORG/NAME")
    verb.add_argument("patch", type=Path, metavar="PATCH", help="patch folder made for that model")
    _add_out(verb)

    verb = patches.add_parser("diff", help=diff.__doc__, description=diff.__doc__)
    verb.set_defaults(run=diff)
    verb.add_argument("first", metavar="MODEL_A", help="model name, folder or ORG/NAME")
    same = "model of the same origin, such as a folder that `patch apply` wrote"
    verb.add_argument("second", metavar="MODEL_B", help=same)
    _add_out(verb)


def _add_out(verb: argparse.ArgumentParser) -> None:
    add_output_folder(verb, "--out", "folder to create", required=True)


def _written(folder: Path, patch: "StoredPatch") -> str:
    return f"{folder}: {patch.num_rows:,} rows, {patch.num_bytes:,} bytes, {patch.content_hash}"


def _describe(patch: "StoredPatch") -> str:
    description = patch.description
    lines = [
        f"content hash  {patch.content_hash}",
        f"row choice    {description.row_choice}",
        f"data          {description.data or 'none'}",
    ]
    for name, (rows_P, deltas_PV) in patch.tables.items():
        num_rows, value_dim = description.shapes[name]
        dtype = str(deltas_PV.dtype).removeprefix("torch.")
        largest = f", largest delta {float(deltas_PV.abs().max()):.3g}" if len(rows_P) else ""
        lines += [
            f"table         {name}: {len(rows_P):,} of {num_rows:,} rows x {value_dim}, {dtype}"
            f"{largest}",
            f"  origin      {description.origins[name]}",
            *(f"  made on     {one}" for one in description.base_patches.get(name, ())),
        ]
    lines.append(f"size          {patch.num_rows:,} rows, {patch.num_bytes:,} bytes")
    lines.append(f"settings      {json.dumps(description.settings)}")
    lines.append(f"scores        {json.dumps(description.scores)}")
    return "\n".join(lines)
