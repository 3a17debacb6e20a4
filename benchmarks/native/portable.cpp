// The read loops, compiled for any machine.
#include "interface.h"
#include "memory_ops/native/best_build.h"
