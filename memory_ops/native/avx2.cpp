// Every kernel, compiled with AVX2, FMA and F16C.
#include "interface.h"
