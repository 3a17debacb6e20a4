"""Dtypes of weights in groups, and the size of a group, as plain data without torch."""

GROUP = 32  # inputs
WEIGHT_BITS = {"int8": 8, "int4": 4}
# of embedding and head unless asked otherwise: fewer cost more than in layers
HEAD_DTYPE = "int8"
HEAD_BITS = WEIGHT_BITS[HEAD_DTYPE]
