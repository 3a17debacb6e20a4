"""Rotary position embedding: frequencies, angles of positions, rotation of heads."""

import math

import torch
from torch import Tensor

from engine.model.config import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position for each pair of lanes, fp32 ``[head_dim / 2]`` on the CPU.

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
    """Cosines and sines ``[T, 1, head_dim / 2]`` in fp32 for all tokens of a forward."""
    angles = positions_T.to(frequencies.dtype).unsqueeze(-1) * frequencies
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def rotate(x_THE: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each head of width E, pairing lanes e and e + E / 2; keep the dtype of ``x``."""
    cos, sin = angles
    first, second = x_THE.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_THE.dtype)
