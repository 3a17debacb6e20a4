"""Times decode steps of requests with row patches, interleaved with the same steps otherwise."""

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.decode_steps import DecodeRun, run_requests
from benchmarks.patches.drawn_patches import drawn_patch, read_rows
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.executor import Executor
from engine.model.row_patches import RowPatch
from engine.model.transformer import Transformer
from engine.request import PatchRef, Request
from engine.sampling.params import SamplingParams

_PROMPT_TOKENS = 32
# Of the rows that a request reads while it decodes, its patch holds this share. It holds fewer of
# those that its prompt reads; at least 30 % of all reads are asked.
_DRAWN_SHARE = 0.4


@dataclass(frozen=True)
class PatchedSteps:
    """Decode steps of ``batch`` requests, each of which uses another patch.

    Attributes:
        patch_rows: rows of each patch.
        num_loaded: patches that are loaded.
        loaded_bytes: memory of the loaded patches, computed from their sizes.
        resident_bytes: by how much the memory of this process grew when they were made.
        hit_share: share of the rows that the requests read which their patches hold.
        compared_with: what the other steps are.
        other_step_ms: of the other steps. Both times are medians of the rounds.
        overhead: median of the rounds' ratios, minus 1.
        other_longest_ms: the longest of the other steps in a round. It and the next are medians of
            the rounds.
        longest_ms: the longest step in a round.
    """

    batch: int
    patch_rows: int
    num_loaded: int
    loaded_bytes: int
    resident_bytes: int
    hit_share: float
    compared_with: str
    other_step_ms: float
    step_ms: float
    overhead: float
    other_longest_ms: float
    longest_ms: float


@dataclass(frozen=True)
class _Drawn:
    """Patches, and by how much the memory of this process grew when they were made."""

    patches: Sequence[RowPatch]
    resident_bytes: int


class PatchContest:
    """Runs the same requests on one executor with and without patches."""

    def __init__(
        self,
        model: Transformer,
        executor: Executor,
        config: EngineConfig,
        tokens: int,
        rounds: int,
    ) -> None:
        """``tokens`` is the length of answers."""
        self._model, self._executor, self._config = model, executor, config
        self._tokens, self._rounds = tokens, rounds
        generator = torch.Generator().manual_seed(0)
        shape = config.max_num_seqs, _PROMPT_TOKENS
        drawn = torch.randint(model.config.vocab_size, shape, generator=generator)
        self._prompts = [tuple(ids) for ids in drawn.tolist()]
        answers = self._run(len(self._prompts), [], []).answers
        self._reads = [
            # the last token is generated, and never read
            read_rows(model, [*prompt, *answers[str(number)][:-1]], _PROMPT_TOKENS)
            for number, prompt in enumerate(self._prompts)
        ]

    def own_patches(self, batch: int, num_rows: int) -> PatchedSteps:
        """Requests whose patches hold much of what they read, and the same without patches."""
        drawn = self._drawn(batch, batch, num_rows)
        return self._compared(drawn, [], drawn.patches, "no patches")

    def many_patches(self, batch: int, num_rows: int, num_loaded: int) -> PatchedSteps:
        """Requests while many patches are loaded, and the same while only theirs are."""
        drawn = self._drawn(num_loaded, batch, num_rows)
        used = drawn.patches[:batch]
        return self._compared(drawn, used, used, "only their patches")

    def _drawn(self, count: int, batch: int, num_rows: int) -> "_Drawn":
        """Patches of which the first ``batch`` fit the requests."""
        before, patches = _resident_bytes(), []
        for number in range(count):
            reads = self._reads[number % batch]
            patches.append(drawn_patch(number, self._model, reads, num_rows, _DRAWN_SHARE))
        return _Drawn(patches, _resident_bytes() - before)

    def _compared(
        self,
        drawn: "_Drawn",
        other: Sequence[RowPatch],
        used: Sequence[RowPatch],
        compared_with: str,
    ) -> PatchedSteps:
        """A warm-up round and the others; each round runs first what the last ran second."""
        batch, pairs = len(used), []
        for number in range(self._rounds + 1):
            runs = {}
            for is_tested in (False, True) if number % 2 else (True, False):
                loaded = drawn.patches if is_tested else other
                runs[is_tested] = self._run(batch, used if loaded else [], loaded)
            pairs.append((runs[False], runs[True]))
        counts = [patch.counts() for patch in used]
        timed = pairs[1:]
        return PatchedSteps(
            batch=batch,
            patch_rows=sum(len(rows.rows_P) for rows in set(used[0].layers.values())),
            num_loaded=len(drawn.patches),
            loaded_bytes=sum(patch.num_bytes for patch in drawn.patches),
            resident_bytes=drawn.resident_bytes,
            hit_share=sum(one.hits for one in counts) / sum(one.reads for one in counts),
            compared_with=compared_with,
            other_step_ms=1e3 * median(other.step_s for other, _ in timed),
            step_ms=1e3 * median(tested.step_s for _, tested in timed),
            overhead=median(tested.step_s / other.step_s for other, tested in timed) - 1,
            other_longest_ms=1e3 * median(other.longest_s for other, _ in timed),
            longest_ms=1e3 * median(tested.longest_s for _, tested in timed),
        )

    def _run(self, batch: int, used: Sequence[RowPatch], loaded: Sequence[RowPatch]) -> DecodeRun:
        # a new engine has no cached prefix; the KV memory is the executor's
        engine = Engine(self._executor, self._config)
        for patch in loaded:
            engine.patches.put(patch)
        requests = []
        for number, prompt in enumerate(self._prompts[:batch]):
            params = SamplingParams(max_tokens=self._tokens, temperature=0, ignore_eos=True)
            refs = (PatchRef(used[number].content_hash, 1.0),) if used else ()
            requests.append(Request(str(number), prompt, params, patches=refs))
        return run_requests(engine, requests)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
