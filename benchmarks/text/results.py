"""A result of ``memplus bench text``."""

from dataclasses import dataclass

from benchmarks.curves.results import TrainedContestant


@dataclass(frozen=True)
class Result(TrainedContestant):
    """One model, trained from one seed, and its scores of three texts.

    Perplexities are per token of one tokenizer, which all models share.

    Attributes:
        taught_perplexity: of glosses that the model was trained on.
        held_out_perplexity: of glosses that it was not trained on.
        prose_perplexity: of topics of Python's language reference that it was not trained on.
        taught_bits: bits per UTF-8 byte of the same glosses.
        held_out_bits: bits per UTF-8 byte of the held-out glosses.
        prose_bits: bits per UTF-8 byte of the held-out topics.
    """

    taught_perplexity: float
    held_out_perplexity: float
    prose_perplexity: float
    taught_bits: float
    held_out_bits: float
    prose_bits: float
