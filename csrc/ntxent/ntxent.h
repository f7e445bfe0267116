// NT-Xent: the contract of the five operators and the checks every backend makes before it touches memory.
//
//   zhat_i = z_i / max(|z_i|, 1e-12)                     (normalize; else zhat = z)
//   s_ij   = zhat_i . zhat_j / temperature
//   lse_i  = log sum_{j != i} exp(s_ij)
//   loss   = mean_i (lse_i - s_{i,p(i)}),  p(i) = (i + N) mod 2N
//   dloss/dzhat_i = 1/(M temperature) [ sum_{j != i} (exp(s_ij - lse_i) + exp(s_ij - lse_j)) zhat_j - 2 zhat_{p(i)} ]
//   dloss/dtemperature = - sum_i zhat_i . dloss/dzhat_i / (2 temperature)
//
// Nothing of size M x M is ever stored. Saved between forward and backward: zhat [M, D], inv_norm [M], lse [M].
// lse is float64: at temperature 0.01 it is near 100, where a float32 is 4e-6 off, more than plain PyTorch's own error.
// inv_norm of a row shorter than 1e-12 is 0, and so is its gradient: no direction of such a row can be improved.
#pragma once

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "ntxent/schedule.h"

namespace cellfast::ntxent {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kNormEps = 1e-12;

template <typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < t.dim(); ++d) {
    text << (d ? ", " : "") << t.size(d);
  }
  text << ']';
  return text.str();
}

inline bool is_half(ScalarType t) {
  return t == ScalarType::BFloat16 || t == ScalarType::Half;
}

inline void check_rows(const Tensor& z, const char* name) {
  if (z.dim() != 2 || z.size(0) % 2 != 0 || z.size(0) == 0 || z.size(1) == 0) {
    fail(name, " must have shape [2N, D] with an even row count, got ", shape_of(z));
  }
  const ScalarType t = z.scalar_type();
  if (t != ScalarType::Float && t != ScalarType::Double && !is_half(t)) {
    fail(name, " must be float64, float32, bfloat16 or float16, got ", torch::headeronly::toString(t));
  }
}

inline void check_temperature(const Tensor& temperature) {
  if (temperature.numel() != 1 || temperature.scalar_type() != ScalarType::Double) {
    fail("temperature must be one float64 number, got ", torch::headeronly::toString(temperature.scalar_type()), " of shape ",
         shape_of(temperature));
  }
}

inline void check_vector(const Tensor& t, int64_t size, ScalarType dtype, const char* name) {
  if (t.dim() != 1 || t.size(0) != size || t.scalar_type() != dtype) {
    fail(name, " must be ", torch::headeronly::toString(dtype), " of shape [", size, "], got ",
         torch::headeronly::toString(t.scalar_type()), " of shape ", shape_of(t));
  }
}

inline void check_shard(int64_t num_rows, int64_t shard, int64_t num_shards) {
  if (num_shards < 1 || shard < 0 || shard >= num_shards || num_rows % (2 * num_shards) != 0) {
    fail("shard must lie in [0, num_shards) and the row count be a multiple of 2 * num_shards, got shard ", shard, " of ", num_shards,
         " and ", num_rows, " rows");
  }
}

// float64 stays float64; everything else is accumulated, and on the CPU also stored, in float32.
inline ScalarType accumulator_of(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline double positive_temperature(double temperature) {
  if (!(temperature > 0) || std::isinf(temperature)) {
    fail("temperature must be a positive finite number, got ", temperature);
  }
  return temperature;
}

}  // namespace cellfast::ntxent
