// The gated unit of SwiGLU (arXiv 2002.05202), elementwise.
#pragma once

#include "values.h"
#include "memory_ops/native/threads.h"

namespace memplus {

constexpr int64_t VALUES_A_THREAD = 1 << 14;  // fewer take less than a thread's start

template <class Values>
inline void silu_gate(const uint8_t* gate, const float* x, uint8_t* out, int64_t size) {
  in_parallel(size / VALUES_A_THREAD, [&](int64_t thread, int64_t threads) {
    const Span own = piece(size, thread, threads);
    by_vectors(own.last - own.first, [&](int64_t, int64_t at, int64_t lanes) {
      at += own.first;
      const floats factor = Fp32Values::read((const uint8_t*)(x + at), lanes);
      const floats value = silu(Values::read(gate + at * Values::bytes, lanes)) * factor;
      Values::write(out + at * Values::bytes, value, lanes);
    });
  });
}

}  // namespace memplus
