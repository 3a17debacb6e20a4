"""``memplus convert``, ``export`` and ``quantize``: write a model as a new folder."""

import argparse
from pathlib import Path

from engine.errors import ConfigError
from engine.model.weight_bits import HEAD_DTYPE
from server.cli.output_options import add_output_folder
from server.config import cache_folder
from weights.checkpoints.dtype_names import FLOAT_DTYPES, GROUPED_DTYPES, TABLE_DTYPES


def convert(options: argparse.Namespace) -> None:
    """Convert a model to a checkpoint folder."""
    from weights.checkpoints.convert import convert
    from weights.models.named_models import local_name
    from weights.models.prepare import prepared_folder

    if options.memory_adapter is None:
        source = Path(local_name(options.source))
    else:
        source = prepared_folder(options.source, cache_folder(), options.memory_adapter)
    convert(
        source,
        options.target,
        options.dtype,
        options.table_dtype,
        tokenizer=options.tokenizer,
    )


def export(options: argparse.Namespace) -> None:
    """Write a checkpoint folder in another program's format."""
    from weights.checkpoints.exporters.huggingface import export_transformers
    from weights.checkpoints.exporters.lingua import export_lingua
    from weights.models.prepare import prepared_folder

    if options.to == "lingua" and options.dtype is not None:
        raise ConfigError("dtype: needs --to transformers")
    source, target = prepared_folder(options.source, cache_folder()), options.target
    if options.to == "lingua":
        export_lingua(source, target)
    else:
        export_transformers(source, target, options.dtype)


def quantize(options: argparse.Namespace) -> None:
    """Round value tables, or weights, of a model to fewer bits."""
    from weights.checkpoints.convert import convert
    from weights.models.prepare import prepared_folder

    if options.table_dtype is None and options.weight_dtype is None:
        raise ConfigError("table_dtype, weight_dtype: give one or both")
    source = prepared_folder(options.source, cache_folder())
    convert(
        source,
        options.target,
        table_dtype=options.table_dtype,
        weight_dtype=options.weight_dtype,
        embedding_dtype=options.embedding_dtype,
    )


def add_conversions(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``convert``, ``export`` and ``quantize``."""
    verb = verbs.add_parser("convert", help=convert.__doc__)
    verb.set_defaults(run=convert)
    verb.add_argument(
        "source", metavar="SRC", help="GGUF file, folder of a model or run, or ORG/NAME"
    )
    add_output_folder(verb, "target", "folder to create", metavar="DST")
    dtype = "make all weights dense in this dtype (default: as stored, in groups or not)"
    verb.add_argument("--dtype", choices=FLOAT_DTYPES, help=dtype)
    verb.add_argument("--table-dtype", help="dtype of value tables (default: the value of --dtype)")
    tokenizer = "folder with the tokenizer of a run folder, which has none"
    verb.add_argument("--tokenizer", type=Path, metavar="DIR", help=tokenizer)
    adapter = "folder of a memory adapter, whose layers are added to the model"
    verb.add_argument("--memory-adapter", metavar="DIR", help=adapter)

    verb = verbs.add_parser("export", help=export.__doc__)
    verb.set_defaults(run=export)
    verb.add_argument("source", metavar="SRC", help="model name, folder, GGUF file or ORG/NAME")
    add_output_folder(verb, "target", "folder to create", metavar="DST")
    formats = "lingua: the consolidated files of facebookresearch/memory; transformers: a folder"
    formats += " that from_pretrained loads, with trust_remote_code=True for memory layers"
    verb.add_argument("--to", choices=["lingua", "transformers"], required=True, help=formats)
    dtype = "dtype of all tensors, for transformers (default: as stored; few bits become floating)"
    verb.add_argument("--dtype", choices=FLOAT_DTYPES, help=dtype)

    verb = verbs.add_parser("quantize", help=quantize.__doc__)
    verb.set_defaults(run=quantize)
    verb.add_argument("source", metavar="SRC", help="model name, folder, GGUF file or ORG/NAME")
    add_output_folder(verb, "target", "folder to create", metavar="DST")
    verb.add_argument("--table-dtype", choices=TABLE_DTYPES, help="new dtype of value tables")
    weights = "dtype of linear layers: integers with a scale per 32 weights"
    verb.add_argument("--weight-dtype", choices=GROUPED_DTYPES, help=weights)
    heads = f"dtype of embedding and head, with --weight-dtype (default: {HEAD_DTYPE})"
    verb.add_argument("--embedding-dtype", choices=GROUPED_DTYPES, help=heads)
