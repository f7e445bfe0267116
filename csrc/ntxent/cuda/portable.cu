// Launches of the portable kernels.
#include "ntxent/cuda/portable.h"

#include "ntxent/cuda/portable.cuh"

namespace cellfast::ntxent::cuda::portable {

std::tuple<Tensor, Tensor> shard_forward(const Tensor& zhat, const Tensor& temperature, int64_t index, int64_t count) {
  const Shard shard{index, count, zhat.size(0)};
  Tensor row_loss = new_tensor(zhat, {shard.num_local()}, ScalarType::Double);
  Tensor lse = new_tensor(zhat, {shard.num_local()}, ScalarType::Double);
  dispatch(zhat.scalar_type(), [&](auto type) {
    using S = decltype(type);
    forward_kernel<S><<<blocks_of(shard.num_local(), kRows), kThreads, 0, current_stream(zhat)>>>(
        data<S>(zhat), zhat.size(1), data<double>(temperature), shard, data<double>(row_loss), data<double>(lse));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {row_loss, lse};
}

std::tuple<Tensor, Tensor> shard_backward(const Tensor& grad_loss, const Tensor& zhat, const Tensor& inv_norm, const Tensor& lse,
                                          const Tensor& temperature, bool normalize_rows, int64_t index, int64_t count) {
  const Shard shard{index, count, zhat.size(0)};
  Tensor grad = new_tensor(zhat, {shard.num_local(), zhat.size(1)}, accumulator_of(zhat.scalar_type()));
  Tensor alignment = new_tensor(zhat, {shard.num_local()}, ScalarType::Double);
  dispatch(zhat.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using T = typename Accumulator<S>::type;
    backward_kernel<S><<<blocks_of(shard.num_local(), kRows), kThreads, 0, current_stream(zhat)>>>(
        data<double>(grad_loss), data<S>(zhat), data<T>(inv_norm), data<double>(lse), zhat.size(1), data<double>(temperature), shard,
        normalize_rows, data<T>(grad), data<double>(alignment));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad, alignment};
}

}  // namespace cellfast::ntxent::cuda::portable
