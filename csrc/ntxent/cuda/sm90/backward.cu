// Launches the backward pass for compute capability 9.0 and finishes its rows: sum of the splits, Jacobian of the normalisation, scale.
#include "ntxent/cuda/sm90/backward.cuh"
#include "ntxent/cuda/sm90/tensor_map.cuh"

namespace cellfast::ntxent::sm90 {
namespace {

constexpr int kFinishThreads = 256;
// Half precision keeps weights from 2^-14 on at full precision; a row's are about 1 / M. None is above 2, so 2^13 cannot overflow.
constexpr float kHalfGain = 8192.0f;

// One thread per place of `factors`, and so at least one per row.
__global__ void factors_kernel(const double* __restrict__ lse, int num_rows, int columns, int64_t places, float gain, float* __restrict__ factors,
                               float2* __restrict__ parts, int* __restrict__ wide) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (j >= places) {
    return;
  }
  constexpr double kLog2E = 1.4426950408889634;
  const float shift = static_cast<float>(lse[0] * kLog2E);
  float factor = 0.0f, high = 0.0f;
  if (j < num_rows) {
    const double value = lse[j] * kLog2E;
    high = static_cast<float>(value);
    parts[j] = make_float2(high, static_cast<float>(value - high));
    const double distance = shift - value;
    factor = gain * static_cast<float>(exp2(distance));
    if (!(fabs(distance) <= kFactorRange)) {  // also where lse is no number
      atomicOr(wide, 1);
    }
  }
  const int64_t tile = j / columns, column = j - tile * columns;
  factors[tile * 2 * columns + column] = factor;
  factors[(tile * 2 + 1) * columns + column] = high;
}

struct FinishArguments {
  RowBlocks rows;
  int splits, width;
  int64_t dim;
  float gain;
  bool normalize;
  const float* partial;
  const float* inv_norm;
  const double* grad_loss;
  const double* temperature;
  double* alignment;
};

// One warp per row.
template <typename T, typename Out>
__global__ void finish_kernel(FinishArguments a, const T* __restrict__ zhat, Out* __restrict__ grad) {
  constexpr int kPerLane = kMaxDim / 32;
  const int lane = threadIdx.x % 32;
  const int64_t local = static_cast<int64_t>(blockIdx.x) * (kFinishThreads / 32) + threadIdx.x / 32;
  const int64_t num_local = a.rows.local_rows();
  if (local >= num_local) {
    return;
  }
  const T* unit = zhat + a.rows.global_row(static_cast<int>(local)) * a.dim;
  // N = 1: no negatives, so nothing to pull or push; what is left in the products is rounding.
  const float ungain = a.rows.num_rows == 2 ? 0.0f : 1.0f / a.gain;
  float g[kPerLane];
  double along = 0;
#pragma unroll
  for (int q = 0; q < kPerLane; ++q) {
    const int k = lane + 32 * q;
    g[q] = 0.0f;
    if (k < a.dim) {
      float sum = 0.0f;
      for (int split = 0; split < a.splits; ++split) {
        sum += a.partial[(split * num_local + local) * a.width + k];
      }
      g[q] = sum * ungain;
      along += static_cast<double>(g[q]) * static_cast<double>(cuda::load(unit[k]));
    }
  }
#pragma unroll
  for (int width = 16; width > 0; width /= 2) {
    along += __shfl_xor_sync(0xffffffff, along, width);
  }
  if (lane == 0) {
    a.alignment[local] = along;
  }
  const double tau = *a.temperature;
  const double factor = *a.grad_loss / (static_cast<double>(a.rows.num_rows) * (tau > 0 ? tau : static_cast<double>(NAN))) *
                        (a.normalize ? static_cast<double>(a.inv_norm[local]) : 1.0);
#pragma unroll
  for (int q = 0; q < kPerLane; ++q) {
    const int k = lane + 32 * q;
    if (k < a.dim) {
      const double value = a.normalize ? g[q] - along * static_cast<double>(cuda::load(unit[k])) : static_cast<double>(g[q]);
      cuda::store(static_cast<float>(factor * value), grad[local * a.dim + k]);
    }
  }
}

template <typename T, int kDim>
void launch_products(const AlignedRows& source, const BackwardArguments& arguments, int workers, cudaStream_t stream) {
  constexpr BackwardShape shape = backward_shape(kDim);
  static_assert(shape.bytes() + 1024 <= kSharedLimit);
  const CUtensorMap row_map = tensor_map(source, kRowBox), column_map = tensor_map(source, shape.columns);
  allow_shared(backward_kernel<T, kDim>, shape.bytes() + 1024);
  backward_kernel<T, kDim><<<workers, kThreads, shape.bytes() + 1024, stream>>>(row_map, column_map, arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void launch(const AlignedRows& source, const Tensor& zhat, const BackwardArguments& arguments, const FinishArguments& finish, const Tensor& grad,
            int workers, cudaStream_t stream) {
  if (source.dim <= 64) {
    launch_products<T, 64>(source, arguments, workers, stream);
  } else if (source.dim <= 128) {
    launch_products<T, 128>(source, arguments, workers, stream);
  } else if (source.dim <= 256) {
    launch_products<T, 256>(source, arguments, workers, stream);
  } else {
    launch_products<T, 512>(source, arguments, workers, stream);
  }
  const unsigned int blocks = cuda::blocks_of(finish.rows.local_rows(), kFinishThreads / 32);
  if (grad.scalar_type() == ScalarType::Float) {
    finish_kernel<T, float><<<blocks, kFinishThreads, 0, stream>>>(finish, cuda::data<T>(zhat), cuda::data<float>(grad));
  } else {
    finish_kernel<T, T><<<blocks, kFinishThreads, 0, stream>>>(finish, cuda::data<T>(zhat), cuda::data<T>(grad));
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

std::tuple<Tensor, Tensor> shard_backward(const Tensor& grad_loss, const Tensor& zhat, const Tensor& inv_norm, const Tensor& lse,
                                          const Tensor& temperature, bool normalize_rows, int64_t index, int64_t count, ScalarType dtype) {
  const int64_t num_rows = zhat.size(0), dim = zhat.size(1);
  const cudaStream_t stream = cuda::current_stream(zhat);
  const AlignedRows source = aligned_rows(zhat, stream);
  const BackwardShape shape = backward_shape(dim);
  BackwardArguments arguments{};
  arguments.rows = row_blocks(num_rows, index, count, shape.row_tile);
  arguments.column_tiles = static_cast<int>(ceil_div(num_rows, shape.columns));
  const int multiprocessors = cuda::device_attribute(cudaDevAttrMultiProcessorCount, zhat.get_device_index());
  // Up to 4 partial gradients; with few rows more, as they are small.
  const int64_t num_local = arguments.rows.local_rows();
  arguments.splits = backward_splits(arguments.rows.count(), arguments.column_tiles, multiprocessors, num_local <= 16384 ? 32 : 4);
  arguments.width = static_cast<int>(source.stride);
  arguments.gain = source.bfloat16 ? 1.0f : kHalfGain;
  const int64_t places = static_cast<int64_t>(arguments.column_tiles) * shape.columns;
  const Tensor factors = cuda::new_tensor(zhat, {2 * places}, ScalarType::Float);
  const Tensor parts = cuda::new_tensor(zhat, {num_rows, 2}, ScalarType::Float);
  const Tensor wide = cuda::new_tensor(zhat, {1}, ScalarType::Int);
  const Tensor partial = cuda::new_tensor(zhat, {arguments.splits, num_local, source.stride}, ScalarType::Float);
  arguments.temperature = cuda::data<double>(temperature);
  arguments.factors = cuda::data<float>(factors);
  arguments.lse = cuda::data<float2>(parts);
  arguments.wide = cuda::data<int>(wide);
  arguments.partial = cuda::data<float>(partial);
  cuda::check_cuda(cudaMemsetAsync(cuda::data<int>(wide), 0, sizeof(int), stream), "cudaMemsetAsync");
  factors_kernel<<<cuda::blocks_of(places, kFinishThreads), kFinishThreads, 0, stream>>>(
      cuda::data<double>(lse), static_cast<int>(num_rows), shape.columns, places, arguments.gain, cuda::data<float>(factors),
      cuda::data<float2>(parts), cuda::data<int>(wide));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  Tensor grad = cuda::new_tensor(zhat, {num_local, dim}, dtype);
  Tensor alignment = cuda::new_tensor(zhat, {num_local}, ScalarType::Double);
  const FinishArguments finish{arguments.rows,    arguments.splits,           arguments.width,
                               dim,               arguments.gain,             normalize_rows,
                               arguments.partial, cuda::data<float>(inv_norm), cuda::data<double>(grad_loss),
                               arguments.temperature, cuda::data<double>(alignment)};
  const int64_t units = static_cast<int64_t>(arguments.rows.count()) * arguments.splits;
  const int workers = static_cast<int>(units < multiprocessors ? units : multiprocessors);
  if (source.bfloat16) {
    launch<__nv_bfloat16>(source, zhat, arguments, finish, grad, workers, stream);
  } else {
    launch<__half>(source, zhat, arguments, finish, grad, workers, stream);
  }
  return {grad, alignment};
}

}  // namespace cellfast::ntxent::sm90
