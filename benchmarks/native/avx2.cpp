// The read loops, compiled with AVX2.
#include "interface.h"
