// What every CUDA file here needs of tensors: allocation, pointers, the current stream, dtypes and their arithmetic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "ntxent/ntxent.h"

namespace cellfast::ntxent::cuda {

// float64 is accumulated in float64, everything else in float32.
template <typename S>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// By name: torch compiles extensions with the implicit conversions of half types switched off.
__device__ inline float load(float value) { return value; }
__device__ inline double load(double value) { return value; }
__device__ inline float load(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float load(__half value) { return __half2float(value); }
__device__ inline void store(float value, float& out) { out = value; }
__device__ inline void store(double value, double& out) { out = value; }
__device__ inline void store(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
__device__ inline void store(float value, __half& out) { out = __float2half_rn(value); }

struct Shard {
  int64_t index, count, num_rows;
  CELLFAST_HD int64_t row(int64_t local) const { return shard_row(local, index, count, num_rows); }
  CELLFAST_HD int64_t num_local() const { return num_rows / count; }
};

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Calls f(S{}) with the CUDA type of a dtype.
template <typename F>
void dispatch(ScalarType stored, const F& f) {
  switch (stored) {
    case ScalarType::Double: f(double{}); break;
    case ScalarType::BFloat16: f(__nv_bfloat16{}); break;
    case ScalarType::Half: f(__half{}); break;
    default: f(float{});
  }
}

inline unsigned int blocks_of(int64_t rows, int64_t rows_per_block) {
  const int64_t blocks = ceil_div(rows, rows_per_block);
  if (blocks > 0x7fffffff) {
    fail("z has too many rows for one launch: ", rows);
  }
  return static_cast<unsigned int>(blocks);
}

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    fail(what, ": ", cudaGetErrorString(error));
  }
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace cellfast::ntxent::cuda
