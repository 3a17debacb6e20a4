// Where rows lie in a file, and how they are read from there.
#pragma once

#include <algorithm>

#include "reads.h"

namespace memplus {

struct RowFile {
  int file;
  int64_t offset;      // of row 0
  int64_t num_rows;
  int64_t row_bytes;
  int64_t alignment;   // of offsets and sizes that the file is read by; 1 where it has none

  int64_t begin(int64_t row) const { return offset + row * row_bytes; }
  // Bytes that a read of a row brings before it.
  int64_t before(int64_t row) const { return begin(row) % alignment; }
  // What the memory that a read fills must be aligned to; some filesystems ask it of memory too.
  int64_t buffer_alignment() const { return std::max<int64_t>(4096, alignment); }
  // The most bytes of a read: a row and what aligning adds, a multiple of `buffer_alignment`.
  int64_t span_bytes() const {
    const int64_t step = buffer_alignment();
    return (row_bytes + 2 * (alignment - 1) + step - 1) / step * step;
  }
  Read read_of(int64_t row, void* buffer, uint64_t tag) const {
    const int64_t first = begin(row) / alignment * alignment, end = begin(row) + row_bytes;
    const int64_t size = (end - first + alignment - 1) / alignment * alignment;
    return {first, buffer, (unsigned)size, tag};
  }
};

}  // namespace memplus
