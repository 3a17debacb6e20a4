// Every kernel, compiled with AVX2.
#include "interface.h"
