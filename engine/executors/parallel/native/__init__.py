"""The C++ barrier of ranks in shared memory."""
