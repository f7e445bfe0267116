// Which kernels serve a call: "auto", or what CELLFAST_NTXENT_CUDA or the operator ntxent_cuda_kernel ask for.
#pragma once

#include <string>

#include "ntxent/ntxent.h"

namespace cellfast::ntxent::cuda {

// True for the kernels of compute capability 9.0. Throws when they were asked for by name and cannot serve these rows.
bool use_sm90(const Tensor& zhat);

// Asks for "auto", "portable" or "sm90a" for this process from now on ("" changes nothing); returns what is asked for.
std::string choose_kernel(const std::string& name);

}  // namespace cellfast::ntxent::cuda
