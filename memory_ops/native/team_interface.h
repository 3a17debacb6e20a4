// C interface of a library's team of threads; thread_team.py calls it.
#pragma once

#include "team.h"

extern "C" {

void* memplus_team() { return memplus::team(); }

// Uses the team of another library from now on.
void memplus_join_team(void* team) { memplus::team() = (memplus::Team*)team; }

void memplus_set_threads(int64_t count) { memplus::team()->set_num_threads(count); }

}  // extern "C"
