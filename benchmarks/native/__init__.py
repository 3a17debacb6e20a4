"""C++ loops that only read, to measure the limits of memory and disks."""
