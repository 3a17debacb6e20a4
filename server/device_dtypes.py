"""Dtypes that only a CPU, or only a GPU, supports."""


def cpu_dtype(weight_dtype: str, kv_dtype: str) -> str | None:
    """Name and value of a setting that only a CPU supports, if one is given."""
    if weight_dtype != "auto":
        return f"weight_dtype {weight_dtype}"
    return "kv_dtype int8" if kv_dtype == "int8" else None


def gpu_dtype(dtype: str, kv_dtype: str) -> str | None:
    """Name and value of a setting that only a GPU supports, if one is given."""
    if dtype == "float16":
        return "dtype float16"
    return "kv_dtype fp8" if kv_dtype == "fp8" else None
