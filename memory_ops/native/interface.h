// C interface of the kernels for backend.py, compiled once per instruction set.
#pragma once

#include "gather_rows.h"
#include "group_rows.h"
#include "product_topk.h"
#include "quantize_rows.h"
#include "row_dots.h"
#include "row_patches.h"
#include "sparse_adam.h"
#include "team_interface.h"

using memplus::Table;

extern "C" {

// half_scores [heads, 2, num_subkeys] to rows and weights [heads, k]
void memplus_product_topk(const float* half_scores, int64_t heads, int32_t num_subkeys, int32_t k,
                          int64_t* rows, float* weights) {
  memplus::product_topk(half_scores, heads, num_subkeys, k, rows, weights);
}

// Arguments of a value table: data, num_rows, row_stride, value_dim, scale_offset, format.

// Returns the index of an id outside the table, or -1 after writing `out` [tokens, V].
int64_t memplus_gather_rows(const uint8_t* data, int64_t num_rows, int64_t row_stride,
                            int64_t value_dim, int64_t scale_offset, int32_t format,
                            const int64_t* ids, const float* weights, int64_t tokens,
                            int64_t per_token, float* out) {
  const Table table = {data, num_rows, row_stride, value_dim, scale_offset, format};
  const int64_t wrong = memplus::first_outside(table, ids, tokens * per_token);
  if (wrong < 0) memplus::gather_rows(table, {ids, weights, nullptr, per_token, out}, tokens);
  return wrong;
}

// Adds to `out` [tokens, value_dim] what the patches add to the rows `ids` [tokens, per_token].
void memplus_add_patched_rows(const memplus::TokenPatches* patches, const int64_t* ids,
                              const float* weights, int64_t tokens, int64_t per_token, float* out,
                              int64_t value_dim) {
  memplus::add_patched_rows(*patches, {ids, weights, nullptr, per_token, out}, tokens, value_dim);
}

// The same for sums of different lengths: sum s begins at starts[s]. Does not check the ids.
void memplus_gather_groups(const uint8_t* data, int64_t num_rows, int64_t row_stride,
                           int64_t value_dim, int64_t scale_offset, int32_t format,
                           const int64_t* ids, const float* weights, const int64_t* starts,
                           int64_t sums, float* out) {
  const Table table = {data, num_rows, row_stride, value_dim, scale_offset, format};
  memplus::gather_rows(table, {ids, weights, starts, 0, out}, sums);
}

// Returns the index of an id outside the table, or -1 after writing `dots` [tokens, per_token].
int64_t memplus_row_dots(const uint8_t* data, int64_t num_rows, int64_t row_stride,
                         int64_t value_dim, int64_t scale_offset, int32_t format,
                         const int64_t* ids, const float* x_TV, int64_t tokens, int64_t per_token,
                         float* dots) {
  const Table table = {data, num_rows, row_stride, value_dim, scale_offset, format};
  const int64_t wrong = memplus::first_outside(table, ids, tokens * per_token);
  if (wrong < 0) memplus::row_dots(table, ids, x_TV, tokens, per_token, dots);
  return wrong;
}

// Returns the number of distinct rows, or -1 - the index of an invalid id; see memplus::Grouped.
int64_t memplus_group_rows(const int64_t* ids, const float* weights, int64_t count,
                           int64_t per_token, int64_t* rows, int64_t* starts, int64_t* tokens,
                           float* sorted_weights) {
  return memplus::group_rows(ids, weights, count, per_token,
                             {rows, starts, tokens, sorted_weights});
}

// Arguments of grouped references: their gradients [T, V] as a table, then rows, starts, tokens,
// weights and the number of rows.

// The squared norm of the rows' gradients.
double memplus_squared_norm(const uint8_t* data, int64_t num_rows, int64_t row_stride,
                            int64_t value_dim, int64_t scale_offset, int32_t format,
                            const int64_t* rows, const int64_t* starts, const int64_t* tokens,
                            const float* weights, int64_t count) {
  const Table gradients = {data, num_rows, row_stride, value_dim, scale_offset, format};
  return memplus::squared_norm({gradients, rows, starts, tokens, weights, count});
}

// Updates the rows and their moments; `first` is null for the row-wise variant.
void memplus_sparse_adam(const uint8_t* data, int64_t num_rows, int64_t row_stride,
                         int64_t value_dim, int64_t scale_offset, int32_t format,
                         const int64_t* rows, const int64_t* starts, const int64_t* tokens,
                         const float* weights, int64_t count, float* values, void* first,
                         void* second, int32_t has_bf16_moments, double scale, double step_size,
                         double beta1, double beta2, double eps) {
  const Table gradients = {data, num_rows, row_stride, value_dim, scale_offset, format};
  const memplus::AdamStep step = {(float)scale,       (float)step_size, (float)beta1,
                                  (float)(1 - beta1), (float)beta2,     (float)(1 - beta2),
                                  (float)eps};
  const memplus::RowGroups groups = {gradients, rows, starts, tokens, weights, count};
  if (has_bf16_moments)
    memplus::sparse_adam<uint16_t>({values, (uint16_t*)first, (uint16_t*)second}, groups, step);
  else
    memplus::sparse_adam<float>({values, (float*)first, (float*)second}, groups, step);
}

// Writes `records`, the data of another table, and returns -1; or returns the first row with a
// value that the records cannot hold.
int64_t memplus_quantize_rows(const uint8_t* data, int64_t num_rows, int64_t row_stride,
                              int64_t value_dim, int64_t scale_offset, int32_t format,
                              uint8_t* records, int64_t row_bytes, int64_t records_scale_offset,
                              int32_t records_format) {
  const Table table = {data, num_rows, row_stride, value_dim, scale_offset, format};
  return memplus::quantize_rows(table, {records, row_bytes, records_scale_offset, records_format});
}

}  // extern "C"
