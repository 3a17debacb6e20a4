"""Compiles grammars to token masks with llguidance."""

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from weakref import WeakSet

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from engine.errors import RequestError
from engine.sampling.grammar import Grammar
from engine.sampling.masks import Bitmask, Grammars, TokenMask, num_words
from weights.checkpoints.tokenizer import Tokenizer
from weights.grammars.grammar_memory import MOST_GRAMMARS
from weights.grammars.lark_source import lark_source
from weights.grammars.vocabulary import grammar_tokenizer

# work and memory of one mask, whose lexer takes 1 kB per state; common schemas need a tenth
_LIMITS = LLParserLimits(step_max_items=10_000, max_lexer_states=8_000, verbose_errors=False)
_MOST_COPIES = 64
_MOST_MESSAGE = 300


class GrammarMask:
    """A token mask that follows a grammar. If it exceeds a limit, it fails for good."""

    def __init__(self, matcher: LLMatcher, template: "_Template | None" = None) -> None:
        self.matcher = matcher
        self._template = template  # it is in memory as long as one of its masks

    @property
    def is_complete(self) -> bool:
        return self.matcher.is_stopped() and not self.matcher.is_error()

    @property
    def may_end(self) -> bool:
        return self.matcher.is_accepting() and not self.matcher.is_error()

    @property
    def failure(self) -> str | None:
        return _shortened(self.matcher.get_error()) if self.matcher.is_error() else None

    def fill(self, bitmask: Bitmask) -> None:
        self.matcher.unsafe_compute_mask_ptr(bitmask.ctypes.data, bitmask.nbytes)
        if self.matcher.is_error():
            bitmask[:] = 0  # the library allows the end of the answer

    def accept(self, token_ids: Sequence[int]) -> None:
        self.matcher.consume_tokens(list(token_ids))

    def rollback(self, count: int) -> None:
        self.matcher.rollback(count)


class GrammarCompiler(Grammars):
    """Compiles the grammars of one model.

    It keeps compiled grammars, because masks of the same grammar share the states of its lexer.
    Those that are kept or in use take at most ``GRAMMARS_BYTES``, if a caller respects
    ``num_free``. One thread at a time may compile; another may fill masks meanwhile.
    """

    def __init__(
        self, make_tokenizer: Callable[[], Tokenizer], vocab_size: int, eos_ids: frozenset[int]
    ) -> None:
        """``make_tokenizer`` is called with the first grammar; ``eos_ids`` end answers."""
        self._make_tokenizer, self._vocab_size = make_tokenizer, vocab_size
        self._eos_ids = sorted(eos_ids)
        self._templates: dict[Grammar, _Template] = {}  # the last used is last
        self._in_memory = WeakSet[_Template]()  # the kept ones, and others that have masks
        self._lock = threading.Lock()  # for _in_memory

    def warm_up(self) -> None:
        """Prepare the tokenizer, which otherwise the first grammar does."""
        if self._eos_ids:
            self._matcher(Grammar("choice", ("a",)))

    @property
    def num_free(self) -> int:
        with self._lock:
            return MOST_GRAMMARS - sum(template.is_used for template in self._in_memory)

    def copies_left(self, grammar: Grammar) -> int:
        template = self._templates.get(grammar)
        # an unused one may be dropped for another grammar
        return template.copies_left if template is not None and template.is_used else 0

    def compile(self, grammar: Grammar) -> TokenMask:
        template = self._templates.pop(grammar, None)
        if template is None or not template.copies_left:
            del template
            self._evict()
            template = _Template(self._matcher(grammar))
            with self._lock:
                self._in_memory.add(template)
        self._templates[grammar] = template
        return template.copy()

    def _evict(self) -> None:
        """Drop grammars without masks, the least recently used first, until one more fits."""
        unused = [key for key, template in self._templates.items() if not template.is_used]
        for key in unused:
            with self._lock:
                if len(self._in_memory) < MOST_GRAMMARS:
                    return
            del self._templates[key]

    def fill(self, masks: Sequence[tuple[int, TokenMask]], bitmask_LW: Bitmask) -> None:
        """As ``Grammars.fill``, in native threads for all masks at once."""
        pairs = [(mask.matcher, row) for row, mask in masks if isinstance(mask, GrammarMask)]
        assert len(pairs) == len(masks), "every mask must be made by this compiler"
        num_rows, width = bitmask_LW.shape
        self._threads.unsafe_compute_mask_ptr(
            pairs, bitmask_LW.ctypes.data, width * bitmask_LW.itemsize, num_rows
        )
        for matcher, row in pairs:
            if matcher.is_error():
                bitmask_LW[row] = 0

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher that allows at least one token."""
        if not self._eos_ids:
            message = "a grammar needs a model with an end-of-sequence token"
            raise RequestError(grammar.param, message)
        source = lark_source(grammar)
        matcher = LLMatcher(self._llguidance, source, log_level=0, limits=_LIMITS)
        mask = GrammarMask(matcher)
        bitmask = np.zeros(num_words(self._vocab_size), dtype=np.uint32)
        if not matcher.is_error():
            mask.fill(bitmask)
        if not bitmask.any():
            message = mask.failure or ""
            if not message or message.startswith("NoExtension"):
                message = "no text follows it"
            raise RequestError(grammar.param, f"wrong {grammar.kind}: {message}")
        return matcher

    @cached_property
    def _llguidance(self) -> LLTokenizer:
        return grammar_tokenizer(self._make_tokenizer(), self._vocab_size, self._eos_ids)

    @cached_property
    def _threads(self) -> LLExecutor:
        return LLExecutor()


class _Template:
    """A compiled grammar whose copies share lexer states, which add up: hence a limit."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._masks = WeakSet[GrammarMask]()
        self.copies_left = _MOST_COPIES

    @property
    def is_used(self) -> bool:
        """Whether a request still has a mask of the grammar."""
        return len(self._masks) > 0

    def copy(self) -> GrammarMask:
        self.copies_left -= 1
        mask = GrammarMask(self._matcher.deep_copy(), self)
        self._masks.add(mask)
        return mask


def _shortened(message: str) -> str:
    """The message on one line, without the library's internal state."""
    for marker in ("<state>", "<backtrace>", "<non-verbose/>"):
        message = message.partition(marker)[0]
    line = " ".join(message.split())
    return line if len(line) <= _MOST_MESSAGE else f"{line[:_MOST_MESSAGE]}..."
