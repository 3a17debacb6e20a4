// The C interface of disk_rows.h, for ctypes; see disk_rows.py.
#include "disk_rows.h"

using namespace memplus;

namespace {

int64_t start(void* self, const int64_t* rows, int64_t tokens, int64_t token_rows, int32_t is_new,
              int64_t layer, int64_t* slots) {
  return ((DiskRows*)self)->start(rows, tokens, token_rows, is_new, layer, slots);
}

int64_t finish(void* self, const int64_t* slots, int64_t count, int64_t layer, int32_t* error) {
  return ((DiskRows*)self)->finish(slots, count, layer, error);
}

void release(void* self, const int64_t* slots, int64_t count) {
  ((DiskRows*)self)->release(slots, count);
}

}  // namespace

extern "C" {

// Returns null and an errno on failure, or -errno if `threads` is 0 and io_uring is not available.
void* memplus_disk_open(int file, int64_t offset, int64_t num_rows, int64_t row_bytes,
                        int64_t alignment, uint8_t* memory, int64_t num_slots, int64_t depth,
                        int64_t threads, int64_t fail_every, int64_t fail_with,
                        int64_t fail_submits, int64_t fail_submits_with, int64_t retry_ms,
                        int32_t* error) try {
  std::unique_ptr<Reads> reads;
  if (threads) {
    reads = std::make_unique<ThreadReads>(file, (unsigned)threads);
  } else {
    auto ring = std::make_unique<RingReads>(file, (unsigned)depth);
    if (!ring->is_open()) {
      *error = -ring->error();
      return nullptr;
    }
    reads = std::move(ring);
  }
  const ReadFault fault = {fail_every, fail_with, fail_submits, fail_submits_with};
  if (fail_every || fail_submits) reads = std::make_unique<FaultyReads>(std::move(reads), fault);
  const RowFile from = {file, offset, num_rows, row_bytes, alignment};
  auto rows = std::make_unique<DiskRows>(from, memory, num_slots, (unsigned)depth, retry_ms,
                                         std::move(reads));
  *error = ENOMEM;
  return rows->has_buffers() ? rows.release() : nullptr;
} catch (...) {  // memory or threads cannot be allocated
  *error = ENOMEM;
  return nullptr;
}

void memplus_disk_close(void* rows) { delete (DiskRows*)rows; }

void memplus_disk_fetcher(void* self, int64_t layer, void (*on_progress)(), RowFetcher* fetcher) {
  *fetcher = {start, finish, release, on_progress, self, layer};
}

// Starts a lookup; free it with lookup_drop. Wait for its parts with lookup_next; see Fetch::next.
void* memplus_disk_lookup_start(void* self, const int64_t* rows, int64_t tokens, int64_t token_rows,
                                int64_t layer, int64_t* slots, int64_t* outside) {
  const RowFetcher fetcher = {start, finish, release, nullptr, self, layer};
  auto* lookup = new Fetch(fetcher, rows, tokens, token_rows, slots);
  lookup->start();
  *outside = lookup->outside();
  return lookup;
}

int64_t memplus_disk_lookup_next(void* lookup, ReadFailure* failure) {
  return ((Fetch*)lookup)->next(*failure);
}

void memplus_disk_lookup_drop(void* lookup, int32_t is_open) {
  if (!is_open) ((Fetch*)lookup)->abandon();
  delete (Fetch*)lookup;
}

void memplus_disk_hint(void* self, const int64_t* rows, int64_t count, int64_t layer) {
  ((DiskRows*)self)->hint(rows, count, layer);
}

void memplus_disk_fill(void* self, const int64_t* rows, int64_t count) {
  ((DiskRows*)self)->fill(rows, count);
}

int32_t memplus_disk_is_lost(void* self, int32_t* error) {
  return ((DiskRows*)self)->is_lost(error);
}

int64_t memplus_disk_num_layers(void* self) { return ((DiskRows*)self)->num_layers(); }

void memplus_disk_counts(void* self, int64_t layer, int64_t* counts) {
  *(DiskCounts*)counts = ((DiskRows*)self)->counts(layer);
}

}  // extern "C"
