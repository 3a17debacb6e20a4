// The C interface, compiled once per instruction set; kernels.py calls it. The counters of
// `progress` (progress.h), if given, change while the call runs.
#pragma once

#include "attention.h"
#include "decoder_layers.h"
#include "linear.h"
#include "log_probabilities.h"
#include "mask_logits.h"
#include "sampling.h"
#include "silu_gate.h"
#include "memory_ops/native/team_interface.h"

// Writes this step's keys and values, then `out` [T, H, E]; the fields are those of
// memplus::Attention. Blocks and lengths come from the engine and are not checked.
extern "C" void memplus_attention(const uint8_t* qkv, const float* cosines, const float* sines,
                                  const memplus::HeadNorms* norms, uint8_t* kv,
                                  const int64_t* block_table,
                                  const int64_t* query_starts, const int64_t* context_lengths,
                                  uint8_t* out, int64_t num_sequences, int64_t table_stride,
                                  int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                  int64_t block_size, int32_t is_bf16, int32_t has_int8_kv,
                                  int64_t* progress) {
  const memplus::Attention call = {
      qkv, cosines, sines, norms, kv, block_table, query_starts, context_lengths, out,
      num_sequences, table_stride, num_heads, num_kv_heads, head_dim, block_size,
      has_int8_kv != 0, {progress}};
  is_bf16 ? memplus::attend<memplus::Bf16Values>(call) : memplus::attend<memplus::Fp32Values>(call);
}

// Bytes of the panels of a linear layer; its `panels` may still be null.
extern "C" int64_t memplus_panel_bytes(const memplus::PackedLinear* linear) {
  return linear->blocks * linear->block_panels() * linear->panel_bytes();
}

// Number of bias values of a linear layer, one per place in its panels.
extern "C" int64_t memplus_bias_size(const memplus::PackedLinear* linear) {
  return linear->blocks * linear->block_panels() * memplus::PANEL_VECTORS * memplus::LANES;
}

// Packs `count` rows of weights, `stride` bytes apart, their scales or null, and a bias or null into
// zeroed panels; see memplus::WeightRows.
extern "C" void memplus_pack_rows(const memplus::PackedLinear* linear, const uint8_t* rows,
                                  int64_t stride, const uint8_t* scales,
                                  const uint8_t* minimums, const float* bias, int64_t count,
                                  int64_t block, int64_t first, int64_t part) {
  memplus::pack(*linear, {rows, stride, scales, minimums, bias, count, block, first, part});
}

// Writes `out` [T, blocks, outputs]; `residual`, of the same shape, may be null or `out` itself.
extern "C" void memplus_linear(const memplus::PackedLinear* linear, const uint8_t* x,
                               int64_t x_stride, int64_t num_rows, const uint8_t* residual,
                               uint8_t* out, int64_t* progress) {
  const memplus::LinearCall call = {*linear, x, x_stride, num_rows, residual, out, {progress}};
  linear->is_bf16 ? memplus::run_linear<memplus::Bf16Values>(call)
                  : memplus::run_linear<memplus::Fp32Values>(call);
}

// Writes silu(gate) * x, of `size` values; `x` is fp32, the others are bf16 or fp32.
extern "C" void memplus_silu_gate(const uint8_t* gate, const float* x, uint8_t* out, int64_t size,
                                  int32_t is_bf16) {
  is_bf16 ? memplus::silu_gate<memplus::Bf16Values>(gate, x, out, size)
          : memplus::silu_gate<memplus::Fp32Values>(gate, x, out, size);
}

// Runs decoder layers on the residual stream [T, D], in place; KV blocks are `kv_bytes` apart.
// Writes the `rows` and `weights` [memories, T, H, K] that the memories chose, and adds the `patches`
// of each memory's tokens to its sums, if they are not null. G and E follow from
// the sizes of the products; the other arguments are those of memplus_attention. Returns 0 if a row
// could not be read: then `failure` names it and all other results are invalid.
extern "C" int32_t memplus_decoder_layers(const memplus::DecoderLayer* layers, int64_t count,
                                       uint8_t* residual, const float* cosines,
                                       const float* sines, uint8_t* kv, int64_t kv_bytes,
                                       const int64_t* block_table, const int64_t* query_starts,
                                       const int64_t* context_lengths, int64_t num_sequences,
                                       int64_t table_stride, int64_t num_heads,
                                       int64_t block_size, int32_t has_int8_kv, int64_t* rows,
                                       float* weights,
                                       const memplus::TokenPatches* patches,
                                       memplus::ReadFailure* failure, int64_t* progress) {
  const memplus::PackedLinear &qkv = *layers->qkv, &out = *layers->out;
  const int64_t head_dim = out.inputs / num_heads;
  const int64_t num_kv_heads = (qkv.outputs / head_dim - num_heads) / 2;
  const memplus::Attention call = {
      nullptr, cosines, sines, nullptr, kv, block_table, query_starts, context_lengths, nullptr,
      num_sequences, table_stride, num_heads, num_kv_heads, head_dim, block_size,
      has_int8_kv != 0, {progress}};
  using namespace memplus;
  const ChosenRows chosen = {rows, weights, patches};
  *failure = qkv.is_bf16
                 ? DecoderLayers<Bf16Values>(call, kv_bytes, residual, chosen).run(layers, count)
                 : DecoderLayers<Fp32Values>(call, kv_bytes, residual, chosen).run(layers, count);
  return failure->memory < 0;
}

// Writes `out` [rows, vocab_size]: logits of the tokens allowed by `bits` [rows, words], else -inf.
extern "C" void memplus_mask_logits(const uint8_t* data, int64_t rows, int64_t vocab_size,
                                    int64_t stride, int32_t is_bf16, const uint32_t* bits,
                                    int64_t words, uint8_t* out) {
  memplus::mask_logits({data, rows, vocab_size, stride}, is_bf16, bits, words, out);
}

// Writes `chosen` [rows]; the logits are described as in memplus::Logits.
extern "C" void memplus_sample(const uint8_t* data, int64_t rows, int64_t vocab_size,
                               int64_t stride, int32_t is_bf16, const memplus::Choice* choices,
                               int64_t* chosen, int64_t* progress) {
  const memplus::Logits logits = {data, rows, vocab_size, stride};
  is_bf16 ? memplus::sample<memplus::Bf16Values>(logits, choices, chosen, {progress})
          : memplus::sample<memplus::Fp32Values>(logits, choices, chosen, {progress});
}

// Writes four of the fields of memplus::Scores.
extern "C" void memplus_log_probabilities(const uint8_t* data, int64_t rows, int64_t vocab_size,
                                          int64_t stride, int32_t is_bf16,
                                          const int64_t* scored_rows, const int64_t* tokens,
                                          int64_t count, int64_t num_best, float* own,
                                          int64_t* ranks, int64_t* best, float* values,
                                          int64_t* progress) {
  const memplus::Logits logits = {data, rows, vocab_size, stride};
  const memplus::Scores scores = {scored_rows, tokens, count, num_best, own, ranks, best, values};
  is_bf16 ? memplus::log_probabilities<memplus::Bf16Values>(logits, scores, {progress})
          : memplus::log_probabilities<memplus::Fp32Values>(logits, scores, {progress});
}
