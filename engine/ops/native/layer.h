// The two halves of a decoder layer, each by one team of threads from its first product to its
// last: starting a team, and coming back to Python, takes as long as reading some of the weights.
// The residual stream [T, D] is changed in place.
#pragma once

#include "attention.h"
#include "kept.h"
#include "linear.h"

namespace memplus {

// residual += out(attention(qkv(residual))); `call` lacks its qkv and out, which are made here.
template <class Values>
inline void self_attention(const PackedLinear& qkv, const PackedLinear& out, Attention call,
                           uint8_t* residual) {
  const int64_t rows = call.num_tokens();
  const int64_t residual_bytes = qkv.inputs * Values::bytes;
  const int64_t qkv_bytes = qkv.outputs * Values::bytes, out_bytes = out.inputs * Values::bytes;
  uint8_t* qkv_rows = kept_bytes<struct QkvRows>(rows * qkv_bytes);
  uint8_t* attended = kept_bytes<struct AttendedRows>(rows * out_bytes);
  call.qkv = qkv_rows, call.out = attended;
  const LinearCall first = {qkv, residual, residual_bytes, rows, nullptr, qkv_rows};
  const LinearCall last = {out, attended, out_bytes, rows, residual, residual};
  uint8_t* first_prepared = kept_bytes<struct FirstPrepared>(prepared_bytes<Values>(first));
  uint8_t* last_prepared = kept_bytes<struct LastPrepared>(prepared_bytes<Values>(last));
  TileQueue tiles(call);
  in_parallel(INT64_MAX, [&](int64_t thread, int64_t threads) {
    run_share<Values>(first, first_prepared, thread, threads);
#pragma omp barrier
    attend_share<Values>(call, tiles, thread, threads);
#pragma omp barrier
    run_share<Values>(last, last_prepared, thread, threads);
  });
}

// residual += down(gate_up(residual))
template <class Values>
inline void feed_forward(const PackedLinear& gate_up, const PackedLinear& down, int64_t rows,
                         uint8_t* residual) {
  const int64_t residual_bytes = gate_up.inputs * Values::bytes;
  const int64_t hidden_bytes = down.inputs * Values::bytes;
  uint8_t* hidden = kept_bytes<struct HiddenRows>(rows * hidden_bytes);
  const LinearCall first = {gate_up, residual, residual_bytes, rows, nullptr, hidden};
  const LinearCall last = {down, hidden, hidden_bytes, rows, residual, residual};
  uint8_t* first_prepared = kept_bytes<struct FirstPrepared>(prepared_bytes<Values>(first));
  uint8_t* last_prepared = kept_bytes<struct LastPrepared>(prepared_bytes<Values>(last));
  in_parallel(INT64_MAX, [&](int64_t thread, int64_t threads) {
    run_share<Values>(first, first_prepared, thread, threads);
#pragma omp barrier
    run_share<Values>(last, last_prepared, thread, threads);
  });
}

}  // namespace memplus
