"""How the token of one row of logits is chosen, as plain data that kernels read."""

import numpy as np
from numpy.typing import NDArray

# the fields of SamplingParams, 0 or less for no top_k, and a number in [0, 1) that decides;
# struct Choice of native/sampling.h
CHOICE = np.dtype(
    [("temperature", "f8"), ("top_k", "i8"), ("top_p", "f8"), ("min_p", "f8"), ("uniform", "f8")]
)
Choices = NDArray[np.void]
