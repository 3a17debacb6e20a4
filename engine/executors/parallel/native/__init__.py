"""How ranks wait for each other in shared memory, in C++."""
