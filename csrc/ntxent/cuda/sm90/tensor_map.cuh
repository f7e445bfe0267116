// Rows of zhat as the tensor copy engine wants them.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "ntxent/cuda/sm90/sm90.h"
#include "ntxent/cuda/tensors.cuh"
#include "ntxent/schedule_cuda.h"

namespace cellfast::ntxent::sm90 {

// zhat with a row stride of whole 16 bytes and a base address that is a multiple of 16, copied only where it is not so already.
struct AlignedRows {
  Tensor owner;
  const void* pointer;
  int64_t num_rows, dim, stride;  // stride in values
  bool bfloat16;
};

inline AlignedRows aligned_rows(const Tensor& zhat, cudaStream_t stream) {
  const int64_t num_rows = zhat.size(0), dim = zhat.size(1), stride = ceil_div(dim, 8) * 8;
  const bool bfloat16 = zhat.scalar_type() == ScalarType::BFloat16;
  if (stride == dim && reinterpret_cast<uintptr_t>(zhat.data_ptr()) % 16 == 0) {
    return {zhat, zhat.data_ptr(), num_rows, dim, stride, bfloat16};
  }
  // The places between dim and stride are never read: the tensor map ends at dim.
  Tensor padded = cuda::new_tensor(zhat, {num_rows, stride}, zhat.scalar_type());
  cuda::check_cuda(cudaMemcpy2DAsync(padded.data_ptr(), stride * 2, zhat.data_ptr(), dim * 2, dim * 2, num_rows, cudaMemcpyDeviceToDevice, stream),
                   "cudaMemcpy2DAsync");
  return {padded, padded.data_ptr(), num_rows, dim, stride, bfloat16};
}

// A map whose box is [box_rows][64 values] in the 128-byte swizzle; what lies beyond the rows or beyond D reads as 0.
inline CUtensorMap tensor_map(const AlignedRows& rows, int box_rows) {
  // By the runtime's entry point, so that nothing links to libcuda and the extension loads where there is no driver.
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                              const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
    cuda::check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status),
                     "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
#else
    cuda::check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &status),
                     "cudaGetDriverEntryPoint(cuTensorMapEncodeTiled)");
#endif
    if (status != cudaDriverEntryPointSuccess || function == nullptr) {
      fail("the CUDA driver has no cuTensorMapEncodeTiled: update it (525 or newer), or set CELLFAST_NTXENT_CUDA=portable");
    }
    return reinterpret_cast<Encode>(function);
  }();
  CUtensorMap map{};
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(rows.dim), static_cast<cuuint64_t>(rows.num_rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(rows.stride) * 2};  // bytes, of all dimensions but the first
  const cuuint32_t box[2] = {kChunk, static_cast<cuuint32_t>(box_rows)}, step[2] = {1, 1};
  const CUresult result =
      encode(&map, rows.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(rows.pointer), sizes,
             strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fail("cuTensorMapEncodeTiled failed with driver error ", static_cast<int>(result), " for ", rows.num_rows, " rows of ", rows.dim);
  }
  return map;
}

// Lets a kernel have this much shared memory; a block gets 48 KB without.
template <typename Kernel>
void allow_shared(Kernel* kernel, int bytes) {
  cuda::check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                   "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
}

}  // namespace cellfast::ntxent::sm90
