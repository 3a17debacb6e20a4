"""Rows of an access pattern in device memory, which the steps of an engine read in turn.

Shape suffixes: S steps, B sequences, T tokens, M memory layers, H memory heads, K rows per head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# fraction of the predicted rows that the layer really reads, as measured on the benchmark model
_RIGHT_PREDICTIONS = 0.85


class RowReplay:
    """Replaces the rows that memory layers choose by recorded ones; CUDA graphs can capture it.

    A model of drawn weights chooses rows about uniformly; a trained one does not. A step of at most
    B tokens reads the next recorded decode step, whose number the device counts, so the host fills
    nothing between steps. A step of more tokens, which computes prompts, reads the first rows of
    another recording. Scores, top-K and weights are computed as always, for other rows. The
    micro-batches of a step read its rows one after another, in each layer.

    Left out: rows do not depend on the tokens, so sequences do not share rows as their texts would,
    and all prompts read the same rows. Selecting rows adds three small kernels to each step.
    """

    def __init__(
        self,
        layers: Sequence[int],
        shape: tuple[int, int],
        device: torch.device,
        *,
        num_steps: int,
        num_sequences: int,
        num_tokens: int,
    ) -> None:
        """Reserve S = ``num_steps`` decode steps, and prompts of T = ``num_tokens``, of row 0.

        Args:
            layers: layer indices of the memory layers, in the order in which they run, at least
                two: a second lookup of a layer without one of another belongs to the same step.
            shape: H and K.
            device: the model's device.
            num_steps: decode steps, after which the first one follows again.
            num_sequences: B, the most tokens of a step that counts as a decode step.
            num_tokens: the most tokens of any step.
        """
        assert len(layers) > 1
        self._layers = {layer: memory for memory, layer in enumerate(layers)}

        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(*sizes, *shape, dtype=torch.int64, device=device)

        self._decode_SMBHK = zeros(num_steps, len(layers), num_sequences)
        self._prompt_MTHK = zeros(len(layers), num_tokens)
        self._current_1MBHK = zeros(1, len(layers), num_sequences)
        self._step_1 = torch.full((1,), -1, device=device)
        self._is_begun = False  # a prediction began the next step
        # the memory layer of the last lookup, and how many tokens of its step have looked up there
        self._memory, self._count = len(layers) - 1, 0

    def load(self, decode_SMBHK: Tensor, prompt_TMHK: Tensor) -> None:
        """Fill the recordings and begin with the first step; the device must be idle.

        Shorter recordings repeat. Sequences that they lack keep their rows.
        """
        num_steps, num_tokens = len(self._decode_SMBHK), self._prompt_MTHK.shape[1]
        steps = torch.arange(num_steps) % len(decode_SMBHK)
        batch = decode_SMBHK.shape[2]
        self._decode_SMBHK[:, :, :batch] = decode_SMBHK[steps].to(self._decode_SMBHK.device)
        tokens = torch.arange(num_tokens) % len(prompt_TMHK)
        self._prompt_MTHK.copy_(prompt_TMHK[tokens].transpose(0, 1))
        self._step_1.fill_(-1)

    def rows(self, num_tokens: int, layer: int) -> Tensor:
        """The rows ``[T, H, K]`` that ``num_tokens`` tokens read in a layer, in layer order."""
        memory = self._layers[layer]
        part = self._part(num_tokens, memory)
        is_prompt = part.stop > self._current_1MBHK.shape[2]
        if not is_prompt:
            self._begin(memory)
        elif self._is_begun:
            # a prediction took the prompt for a decode step, because it is made for few tokens
            self._step_1.sub_(1)
        self._memory, self._count, self._is_begun = memory, part.stop, False
        return (self._prompt_MTHK if is_prompt else self._current_1MBHK[0])[memory, part]

    def predicted(self, rows_THC: Tensor, layer: int) -> Tensor:
        """Predictions like ``rows``, the model's own, of which most are rows of this step."""
        num_tokens, _, candidates = rows_THC.shape
        memory, right = self._layers[layer], round(candidates * _RIGHT_PREDICTIONS)
        part = self._part(num_tokens, memory)
        if part.stop > self._current_1MBHK.shape[2]:
            return rows_THC
        self._begin(memory)
        read_THK = self._current_1MBHK[0, memory, part]
        return torch.cat((read_THK[:, :, :right], rows_THC[:, :, right:]), dim=2)

    def _part(self, num_tokens: int, memory: int) -> slice:
        """The tokens of the step that look up next."""
        first = self._count if memory == self._memory else 0
        return slice(first, first + num_tokens)

    def _begin(self, memory: int) -> None:
        """At the first use of a step, copy its rows."""
        if memory == 0 and self._memory == len(self._layers) - 1 and not self._is_begun:
            # the lookups of the step before are done: its last layer waited for them
            self._step_1.add_(1).remainder_(len(self._decode_SMBHK))
            torch.index_select(self._decode_SMBHK, 0, self._step_1, out=self._current_1MBHK)
            self._is_begun = True
