// Every kernel, compiled with AVX-512, its BF16 products and the matrix tiles of AMX.
#include "interface.h"
