// Every kernel, compiled with AVX-512.
#include "interface.h"
