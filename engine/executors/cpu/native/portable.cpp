// Every kernel, compiled for any machine.
#include "interface.h"
#define MEMPLUS_HAS_BF16_BUILDS
#include "memory_ops/native/best_build.h"
