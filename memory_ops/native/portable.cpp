// Every kernel, compiled for any machine.
#include "best_build.h"
#include "interface.h"
