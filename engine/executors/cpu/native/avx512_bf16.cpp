// Every kernel, compiled with AVX-512 and its BF16 products.
#include "interface.h"
