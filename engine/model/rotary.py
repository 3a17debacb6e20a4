"""Rotary position embedding: frequencies, angles of positions, rotation of heads."""

import math

import torch
from torch import Tensor

from engine.model.rope_scaling import LinearScaling, RopeScaling, YarnScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position for each pair of lanes, fp32 ``[head_dim / 2]`` on the CPU.

    Source: arXiv 2104.09864; ``rope_scaling.py`` has those of the scalings.
    """
    lanes = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / theta ** (lanes / head_dim)
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, YarnScaling):
        kept = 1 - _yarn_ramp(head_dim, theta, scaling)
        return frequencies * (kept + (1 - kept) / scaling.factor)
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((scaling.original_max_position / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rope_amplitude(scaling: RopeScaling | None) -> float:
    """The factor by which the rotation multiplies queries and keys."""
    return scaling.amplitude if isinstance(scaling, YarnScaling) else 1.0


def rope_angles(
    positions_T: Tensor, frequencies: Tensor, amplitude: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, 1, head_dim / 2]`` in fp32 for all tokens of a forward."""
    angles = positions_T.to(frequencies.dtype).unsqueeze(-1) * frequencies
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    return (cos, sin) if amplitude == 1.0 else (cos * amplitude, sin * amplitude)


def _yarn_ramp(head_dim: int, theta: float, scaling: YarnScaling) -> Tensor:
    """0 for pairs of lanes that stay, 1 for those that are scaled, ``[head_dim / 2]``."""
    low, high = (
        head_dim
        * math.log(scaling.original_max_position / (turns * 2 * math.pi))
        / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # as in Hugging Face's code, equal limits make a step
    width = high - low if high != low else 0.001
    lanes = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    return ((lanes - low) / width).clamp(0.0, 1.0)


def rotate(x_THE: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each head of width E, pairing lanes e and e + E / 2; keep the dtype of ``x``."""
    cos, sin = angles
    first, second = x_THE.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_THE.dtype)
