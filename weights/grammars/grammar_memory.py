"""Limits on the memory of compiled grammars."""

# growth of a process that compiles one grammar, as its trial measures it
COMPILED_BYTES = 16 * 2**20
# the lexer's states, which a compiled grammar makes as it is used, are limited by their number
_STATES_BYTES = 8 * 2**20
# all grammars that are kept or in use: memory that the KV pool and the table rows leave free
GRAMMARS_BYTES = 504 * 2**20
MOST_GRAMMARS = GRAMMARS_BYTES // (COMPILED_BYTES + _STATES_BYTES)
