"""Suggests the known name nearest to an unknown one, for error messages."""

import difflib
from collections.abc import Iterable, Mapping

# a longer name is not a typing error, and would take long to compare
_LONGEST = 64
# the names that memplus uses, each with names that other programs and papers use for it
_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_layers", "n_layers", "n_layer", "layers", "depth"),
    "hidden_size": ("dim", "d_model", "n_embd", "hidden_dim", "embedding_dim", "width"),
    "intermediate_size": ("feed_forward", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"),
    "num_heads": ("n_heads", "n_head", "heads"),
    "num_attention_heads": ("num_heads", "n_heads", "n_head", "heads"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads"),
    "max_position_embeddings": ("block_size", "context_length", "max_seq_len", "n_ctx"),
    "lr": ("learning_rate", "max_lr"),
    "clip_norm": ("grad_clip", "max_grad_norm", "gradient_clipping"),
    "warmup_steps": ("warmup", "warmup_iters", "num_warmup_steps"),
    "tokens_per_step": ("batch_size", "train_batch_size", "global_batch_size"),
    "passes_per_step": ("gradient_accumulation_steps", "grad_accum_steps", "micro_batches"),
    "steps": ("epochs", "num_epochs", "num_train_epochs", "max_steps", "num_steps", "max_iters"),
    "sequence_length": (
        *("seq_len", "seq_length", "max_length", "max_sequence_length", "model_max_length"),
    ),
    "dtype": ("torch_dtype", "use_bfloat16"),
    "checkpoint_activations": ("gradient_checkpointing",),
}
# units of names whose other names may have another unit
_UNITS: Mapping[str, str] = {"tokens_per_step": "in tokens", "steps": "in optimizer steps"}


def suggestion(name: str, known: Iterable[str], *, is_typing_error: bool = True) -> str:
    """Text to append to an error: "; did you mean X?", or nothing if no name is near.

    Names may have a section: ``run.lr`` is near ``optimizer.lr``. Names of other programs count
    as near too: ``n_layers`` is near ``num_hidden_layers``; a unit follows if theirs may differ.
    Without ``is_typing_error`` a name of similar spelling is not near.
    """
    if len(name) > _LONGEST:
        return ""
    names = sorted(known)
    last = name.rpartition(".")[2]
    elsewhere = [one for one in names if one.rpartition(".")[2] == last]
    synonyms = [one for one in names if last in _OTHER_NAMES.get(one.rpartition(".")[2], ())]
    found = elsewhere or synonyms
    if not found and is_typing_error:
        found = difflib.get_close_matches(name, names, 1, 0.7)
    if not found:
        return ""
    unit = _UNITS.get(found[0].rpartition(".")[2]) if found is synonyms else None
    return f"; did you mean {found[0]}, {unit}?" if unit else f"; did you mean {found[0]}?"
