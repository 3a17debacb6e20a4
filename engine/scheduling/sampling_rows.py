"""The sampling rows of a step plan, with each request's logit rules kept between steps."""

from engine.sampling.request_rules import RequestRules, SamplingRow
from engine.scheduling.step_plan import SequenceChunk, StepPlan


class SamplingRows:
    """Makes the sampling rows of each plan and keeps the requests' rules between plans."""

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self._eos_ids = eos_ids
        self._rules: dict[str, RequestRules] = {}

    def of(self, plan: StepPlan) -> list[SamplingRow]:
        """One row per sampled position of the plan, in order."""
        kept, self._rules = self._rules, {}
        rows: list[SamplingRow] = []
        for chunk in plan.chunks:
            if not chunk.samples:
                continue
            end = chunk.end - chunk.num_drafts
            rules = None
            if chunk.sampling.has_rules_after(end - chunk.prompt_length):
                rules = self._follow(chunk, kept)
            rows.append(SamplingRow(chunk.sampling, chunk.seed, end, rules))
            for count in range(1, chunk.num_drafts + 1):
                drafts = chunk.drafts[:count]
                rows.append(SamplingRow(chunk.sampling, chunk.seed, end + count, rules, drafts))
        return rows

    def _follow(self, chunk: SequenceChunk, kept: dict[str, RequestRules]) -> RequestRules:
        # the rules of a preempted request are dropped, and made again from its history
        rules = kept.get(chunk.request_id)
        is_first = chunk.end - chunk.num_drafts == chunk.prompt_length
        if rules is None or is_first:
            rules = RequestRules(chunk.sampling, chunk.prompt_length, self._eos_ids)
        rules.follow(chunk.history)
        self._rules[chunk.request_id] = rules
        return rules
