// The C interface, compiled once for each instruction set; read_limits.py calls it.
#pragma once

#include "read_limits.h"
#include "read_rate.h"
#include "memory_ops/native/team_interface.h"

extern "C" {

// `cache` is the level that rows are prefetched into: 1 or 2.
uint32_t memplus_read_rows(const uint8_t* data, int64_t row_bytes, const int64_t* ids,
                           int64_t count, int64_t group, int64_t ahead, int32_t cache) {
  const memplus::RowOrder order = {group, ahead};
  return cache == 1 ? memplus::read_rows<3>(data, row_bytes, ids, count, order)
                    : memplus::read_rows<2>(data, row_bytes, ids, count, order);
}

uint32_t memplus_read_all(const uint8_t* data, int64_t bytes) {
  return memplus::read_all(data, bytes);
}

// Nanoseconds, or a negative errno.
int64_t memplus_read_file_ns(int file, int64_t offset, int64_t num_rows, int64_t row_bytes,
                             int64_t alignment, int64_t depth, int64_t count, int64_t seed) {
  return memplus::read_rows_ns({file, offset, num_rows, row_bytes, alignment}, (unsigned)depth,
                               count, (uint64_t)seed);
}

}  // extern "C"
