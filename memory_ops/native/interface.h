// The C interface, compiled once for each instruction set; backend.py calls it.
#pragma once

#include "gather_rows.h"
#include "group_rows.h"
#include "product_topk.h"
#include "quantize_rows.h"
#include "row_dots.h"
#include "sparse_adam.h"

using memplus::Table;

extern "C" {

// half_scores [heads, 2, num_subkeys] to rows and weights [heads, k]
void memplus_product_topk(const float* half_scores, int64_t heads, int32_t num_subkeys, int32_t k,
                          int64_t* rows, float* weights) {
  memplus::product_topk(half_scores, heads, num_subkeys, k, rows, weights);
}

// A value table is given by: data, num_rows, row_stride, value_dim, scale_offset, format.

// Returns the place of an id outside the table, or -1 where `out` [tokens, V] was written.
int64_t memplus_gather_rows(const uint8_t* data, int64_t num_rows, int64_t row_stride,
                            int64_t value_dim, int64_t scale_offset, int32_t format,
                            const int64_t* ids, const float* weights, int64_t tokens,
                            int64_t per_token, float* out) {
  const Table table = {data, num_rows, row_stride, value_dim, scale_offset, format};
  const int64_t wrong = memplus::first_outside(table, ids, tokens * per_token);
  if (wrong < 0) memplus::gather_rows(table, {ids, weights, nullptr, per_token, out}, tokens);
  return wrong;
}

// The same with sums of different lengths, that of sum s from starts[s] on, and ids that are rows.
void memplus_gather_groups(const uint8_t* data, int64_t num_rows, int64_t row_stride,
                           int64_t value_dim, int64_t scale_offset, int32_t format,
                           const int64_t* ids, const float* weights, const int64_t* starts,
                           int64_t sums, float* out) {
  const Table table = {data, num_rows, row_stride, value_dim, scale_offset, format};
  memplus::gather_rows(table, {ids, weights, starts, 0, out}, sums);
}

// Returns the place of an id outside the table, or -1 where `dots` [tokens, per_token] was written.
int64_t memplus_row_dots(const uint8_t* data, int64_t num_rows, int64_t row_stride,
                         int64_t value_dim, int64_t scale_offset, int32_t format,
                         const int64_t* ids, const float* x_TV, int64_t tokens, int64_t per_token,
                         float* dots) {
  const Table table = {data, num_rows, row_stride, value_dim, scale_offset, format};
  const int64_t wrong = memplus::first_outside(table, ids, tokens * per_token);
  if (wrong < 0) memplus::row_dots(table, ids, x_TV, tokens, per_token, dots);
  return wrong;
}

// Returns how many distinct rows there are, or -1 - the place of an id that can be no row; see
// memplus::Grouped.
int64_t memplus_group_rows(const int64_t* ids, const float* weights, int64_t count,
                           int64_t per_token, int64_t* rows, int64_t* starts, int64_t* tokens,
                           float* sorted_weights) {
  return memplus::group_rows(ids, weights, count, per_token,
                             {rows, starts, tokens, sorted_weights});
}

// Grouped references are given by: rows, starts, tokens, weights, how many rows; their gradients
// [T, V] come before them, as a table.

// The squared norm of the rows' gradients.
double memplus_squared_norm(const uint8_t* data, int64_t num_rows, int64_t row_stride,
                            int64_t value_dim, int64_t scale_offset, int32_t format,
                            const int64_t* rows, const int64_t* starts, const int64_t* tokens,
                            const float* weights, int64_t count) {
  const Table gradients = {data, num_rows, row_stride, value_dim, scale_offset, format};
  return memplus::squared_norm({gradients, rows, starts, tokens, weights, count});
}

// Changes the rows and their moments; `first` is null where there is one moment a row.
void memplus_sparse_adam(const uint8_t* data, int64_t num_rows, int64_t row_stride,
                         int64_t value_dim, int64_t scale_offset, int32_t format,
                         const int64_t* rows, const int64_t* starts, const int64_t* tokens,
                         const float* weights, int64_t count, float* values, float* first,
                         float* second, double scale, double step_size, double beta1, double beta2,
                         double eps) {
  const Table gradients = {data, num_rows, row_stride, value_dim, scale_offset, format};
  const memplus::AdamStep step = {(float)scale,       (float)step_size, (float)beta1,
                                  (float)(1 - beta1), (float)beta2,     (float)(1 - beta2),
                                  (float)eps};
  memplus::sparse_adam({values, first, second}, {gradients, rows, starts, tokens, weights, count},
                       step);
}

// Returns the first row that has a value which is not finite, or -1 where all of `records`, another
// table's data, were written.
int64_t memplus_quantize_rows(const uint8_t* data, int64_t num_rows, int64_t row_stride,
                              int64_t value_dim, int64_t scale_offset, int32_t format,
                              uint8_t* records, int64_t row_bytes, int64_t records_scale_offset,
                              int32_t records_format) {
  const Table table = {data, num_rows, row_stride, value_dim, scale_offset, format};
  return memplus::quantize_rows(table, {records, row_bytes, records_scale_offset, records_format});
}

}  // extern "C"
