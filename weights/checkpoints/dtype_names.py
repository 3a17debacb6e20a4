"""Names of the dtypes in which weights and value tables are stored. Needs no torch."""

from engine.model.weight_bits import WEIGHT_BITS

FLOAT_DTYPES = ("bfloat16", "float16", "float32")
TABLE_DTYPES = (*FLOAT_DTYPES, "int8", "int4", "int4_row", "fp8")
GROUPED_DTYPES = tuple(WEIGHT_BITS)
