"""Names of the dtypes that weights and value tables may be stored in. Needs no torch."""

FLOAT_DTYPES = ("bfloat16", "float16", "float32")
TABLE_DTYPES = (*FLOAT_DTYPES, "int8", "int4", "fp8")
