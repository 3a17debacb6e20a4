// The read loops, compiled with AVX-512.
#include "interface.h"
