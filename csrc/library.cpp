// The operators' schemas, declared here and nowhere else; csrc/ntxent/ntxent.h says what they compute.
// Backends register themselves: ntxent/cpu (in _C) and ntxent/cuda (in _C_cuda).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cellfast, m) {
  m.def("ntxent_normalize(Tensor z, bool normalize) -> (Tensor zhat, Tensor inv_norm)");
  m.def(
      "ntxent_forward(Tensor z, Tensor temperature, bool normalize)"
      " -> (Tensor loss, Tensor zhat, Tensor inv_norm, Tensor lse)");
  m.def(
      "ntxent_backward(Tensor grad_loss, Tensor zhat, Tensor inv_norm, Tensor lse, Tensor temperature,"
      " bool normalize, ScalarType dtype) -> (Tensor grad_z, Tensor grad_temperature)");
  m.def(
      "ntxent_shard_forward(Tensor zhat, Tensor temperature, int shard, int num_shards)"
      " -> (Tensor row_loss, Tensor lse)");
  m.def(
      "ntxent_shard_backward(Tensor grad_loss, Tensor zhat, Tensor inv_norm, Tensor lse, Tensor temperature,"
      " bool normalize, int shard, int num_shards, ScalarType dtype) -> (Tensor grad_z, Tensor grad_temperature)");
  m.def("ntxent_cpu_kernels(str instruction_set) -> str");
  // The CUDA kernels asked for in this process: "auto", "portable" or "sm90a"; "" asks without changing. Returns the one asked for.
  m.def("ntxent_cuda_kernel(str name) -> str");
}
