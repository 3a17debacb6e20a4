// Position of a table's rows in a file, and aligned reads of single rows.
#pragma once

#include <algorithm>

#include "reads.h"

namespace memplus {

struct RowFile {
  int file;
  int64_t offset;      // of row 0
  int64_t num_rows;
  int64_t row_bytes;
  int64_t alignment;   // of the offsets and sizes of reads; 1 if the file requires none

  int64_t begin(int64_t row) const { return offset + row * row_bytes; }
  // Bytes that an aligned read of a row returns before the row.
  int64_t before(int64_t row) const { return begin(row) % alignment; }
  // Alignment of the buffers of reads; some filesystems require it of memory too.
  int64_t buffer_alignment() const { return std::max<int64_t>(4096, alignment); }
  // The size of the largest aligned read of a row, rounded up to a multiple of `buffer_alignment`.
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
