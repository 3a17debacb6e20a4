// Reads one head of one token for attention: normalised if the model has norms, and rotated.
#pragma once

#include "attention_call.h"
#include "rms_norm.h"
#include "rope.h"
#include "values.h"

namespace memplus {

// Reads head `head` (query heads, then keys, then values) into head_dim / LANES + 1 vectors.
template <class Values>
inline void read_head(const Attention& call, int64_t token, int64_t head, floats* to) {
  const uint8_t* from = call.qkv + call.qkv_place(token, head) * Values::bytes;
  by_vectors(call.head_dim, [&](int64_t v, int64_t at, int64_t lanes) {
    to[v] = Values::read(from + at * Values::bytes, lanes);
  });
}

// Reads a query or a key.
template <class Values>
inline void read_rotated(const Attention& call, int64_t token, int64_t head, floats* to) {
  if (call.norms) {
    const HeadNorms& norms = *call.norms;
    rms_norm<Values>(call.qkv + call.qkv_place(token, head) * Values::bytes,
                     head < call.num_heads ? norms.query : norms.key, norms.eps, call.head_dim,
                     [&](int64_t v, int64_t, int64_t, floats product) {
                       to[v] = Values::rounded(product);
                     });
  } else {
    read_head<Values>(call, token, head, to);
  }
  const int64_t half = call.head_dim / 2;
  rotate((float*)to, call.cosines + token * half, call.sines + token * half, half);
}

}  // namespace memplus
