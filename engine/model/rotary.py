"""Rotary frequencies of a model, Llama 3's scaling included, and the angles of given positions."""

import math

import torch
from torch import Tensor

from engine.model.config import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians a position for each pair of lanes, fp32 ``[head_dim / 2]`` on the CPU.

    Source: arXiv 2104.09864; the scaling is Llama 3.1's.
    """
    lanes = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / theta ** (lanes / head_dim)
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((scaling.original_max_position / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rope_angles(positions_T: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, 1, head_dim / 2]`` in fp32 for every token of a forward."""
    angles = positions_T.to(frequencies.dtype).unsqueeze(-1) * frequencies
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
