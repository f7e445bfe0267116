// The operators' schemas, declared here and nowhere else; ntxent/ntxent.h and augment/augment.h say what they compute.
// Backends register themselves: */cpu (in _C) and */cuda (in _C_cuda).
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
  // Chooses by name; "": asks which are chosen; "all", "supported": the names there are, and those this processor runs, with commas.
  m.def("ntxent_cpu_kernels(str instruction_set) -> str");
  // The CUDA kernels asked for in this process: "auto", "portable" or "sm90a"; "" asks without changing. Returns the one asked for.
  m.def("ntxent_cuda_kernel(str name) -> str");
  m.def(
      "augment_views(Tensor crops, Tensor low, Tensor inverse, Tensor matrix, Tensor? gain, Tensor? contrast, Tensor? offset,"
      " Tensor? elastic, Tensor? elastic_row, Tensor? elastic_basis, Tensor? blur_sigma, int blur_kernel, Tensor? noise_std,"
      " Tensor? noise_start, Tensor? noise_bank, int noise_step, int padding, bool inverted, Tensor(a!) out) -> ()");
}
