// Launches the forward pass for compute capability 9.0 and turns its sums into losses.
#include "ntxent/cuda/sm90/forward.cuh"
#include "ntxent/cuda/sm90/tensor_map.cuh"

namespace cellfast::ntxent::sm90 {
namespace {

constexpr int kFinishThreads = 256;

struct FinishArguments {
  RowBlocks rows;
  int workers;
  int64_t dim;
  const double* temperature;
  const float* sums;
  int64_t sums_stride;
  const float* positives;
  double* row_loss;
  double* lse;
};

// One row against all others with a running maximum, by a whole block: for the few rows whose sums left float32's range.
template <typename T>
__device__ void repair_row(const FinishArguments& a, const T* zhat, float scale, int local) {
  constexpr int kWarps = kFinishThreads / 32, kPerLane = kMaxDim / 32;
  __shared__ float largest[kWarps];
  __shared__ double sums[kWarps];
  __shared__ float positive;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = a.rows.global_row(local), pair = positive_of(row, a.rows.num_rows);
  float own[kPerLane];
#pragma unroll
  for (int q = 0; q < kPerLane; ++q) {
    own[q] = lane + 32 * q < a.dim ? cuda::load(zhat[row * a.dim + lane + 32 * q]) : 0.0f;
  }
  float top = -INFINITY;
  double sum = 0;
  for (int64_t j = warp; j < a.rows.num_rows; j += kWarps) {
    float dot = 0.0f;
#pragma unroll
    for (int q = 0; q < kPerLane; ++q) {
      if (lane + 32 * q < a.dim) {
        dot = fmaf(own[q], cuda::load(zhat[j * a.dim + lane + 32 * q]), dot);
      }
    }
#pragma unroll
    for (int width = 16; width > 0; width /= 2) {
      dot += __shfl_xor_sync(0xffffffff, dot, width);
    }
    const float logit = dot * scale;
    if (j == pair) {
      positive = logit;  // every lane holds the same
    } else if (j != row) {
      if (logit > top) {
        sum *= exp2(static_cast<double>(top) - static_cast<double>(logit));
        top = logit;
      }
      sum += exp2(static_cast<double>(logit) - static_cast<double>(top));
    }
  }
  if (lane == 0) {
    largest[warp] = top;
    sums[warp] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) {
      top = largest[w] > top ? largest[w] : top;
    }
    sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (largest[w] > -INFINITY) {
        sum += sums[w] * exp2(static_cast<double>(largest[w]) - static_cast<double>(top));
      }
    }
    const double loss = row_loss_of(sum, top, positive);
    a.row_loss[local] = loss;
    a.lse[local] = positive * 0.6931471805599453 + loss;
  }
  __syncthreads();
}

template <typename T>
__global__ void finish_kernel(FinishArguments a, const T* __restrict__ zhat) {
  __shared__ int repairs[kFinishThreads];
  __shared__ int num_repairs;
  if (threadIdx.x == 0) {
    num_repairs = 0;
  }
  __syncthreads();
  const Exponent exponent = exponent_of(*a.temperature);
  const int local = blockIdx.x * kFinishThreads + threadIdx.x;
  if (local < a.rows.local_rows()) {
    const float* column = a.sums + a.rows.padded(local);
    double sum = 0;
#pragma unroll 16
    for (int worker = 0; worker < a.workers; ++worker) {
      sum += column[worker * a.sums_stride];
    }
    const double positive = static_cast<double>(a.positives[local]) * exponent.scale;
    const double loss = row_loss_of(sum, exponent.shift, positive);
    a.row_loss[local] = loss;
    a.lse[local] = positive * 0.6931471805599453 + loss;
    if (needs_repair(sum, exponent.shift, positive, a.rows.num_rows)) {
      repairs[atomicAdd(&num_repairs, 1)] = local;  // their order changes nothing: each writes its own row
    }
  }
  __syncthreads();
  for (int r = 0; r < num_repairs; ++r) {
    repair_row(a, zhat, exponent.scale, repairs[r]);
  }
}

template <typename T>
void launch(const AlignedRows& source, const Tensor& zhat, ForwardArguments& arguments, FinishArguments& finish, cudaStream_t stream) {
  const CUtensorMap row_map = tensor_map(source, kRowBox), column_map = tensor_map(source, kForwardColumns);
  const int bytes = arguments.shape.bytes() + 1024;
  const auto kernel = arguments.shape.row_tile == 256 ? forward_kernel<T, 2> : forward_kernel<T, 1>;
  allow_shared(kernel, bytes);
  kernel<<<arguments.tiles.workers, kThreads, bytes, stream>>>(row_map, column_map, arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  finish_kernel<T><<<cuda::blocks_of(finish.rows.local_rows(), kFinishThreads), kFinishThreads, 0, stream>>>(finish, cuda::data<T>(zhat));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

std::string unsuitable(const Tensor& zhat) {
#if !defined(CELLFAST_SM90A)
  return "this build has no code for sm_90a (build with 90a in CELLFAST_CUDA_ARCHS)";
#endif
  std::ostringstream why;
  const int device = zhat.get_device_index();
  const int major = cuda::device_attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = cuda::device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) {
    why << "a device of compute capability " << major << '.' << minor;
  } else if (!is_half(zhat.scalar_type())) {
    why << torch::headeronly::toString(zhat.scalar_type());
  } else if (zhat.size(1) > kMaxDim) {
    why << "D = " << zhat.size(1);
  } else if (zhat.size(0) > kMaxRows) {
    why << zhat.size(0) << " rows";
  } else {
    return "";
  }
  return "it needs compute capability 9.0, bfloat16 or float16, D <= 512 and at most 2^29 rows, got " + why.str();
}

std::tuple<Tensor, Tensor> shard_forward(const Tensor& zhat, const Tensor& temperature, int64_t index, int64_t count) {
  const int64_t num_rows = zhat.size(0), dim = zhat.size(1);
  const cudaStream_t stream = cuda::current_stream(zhat);
  const AlignedRows source = aligned_rows(zhat, stream);
  ForwardArguments arguments{};
  arguments.shape = forward_shape(dim);
  arguments.rows = row_blocks(num_rows, index, count, arguments.shape.row_tile);
  arguments.tiles = forward_tiles(arguments.rows, dim, cuda::device_attribute(cudaDevAttrMultiProcessorCount, zhat.get_device_index()));
  const int64_t num_local = arguments.rows.local_rows();
  arguments.temperature = cuda::data<double>(temperature);
  arguments.sums_stride = arguments.rows.padded_rows();
  const Tensor sums = cuda::new_tensor(zhat, {arguments.tiles.workers, arguments.sums_stride}, ScalarType::Float);
  const Tensor positives = cuda::new_tensor(zhat, {num_local}, ScalarType::Float);
  arguments.sums = cuda::data<float>(sums);
  arguments.positives = cuda::data<float>(positives);
  cuda::check_cuda(cudaMemsetAsync(arguments.sums, 0, sizeof(float) * arguments.tiles.workers * arguments.sums_stride, stream), "cudaMemsetAsync");
  Tensor row_loss = cuda::new_tensor(zhat, {num_local}, ScalarType::Double);
  Tensor lse = cuda::new_tensor(zhat, {num_local}, ScalarType::Double);
  FinishArguments finish{arguments.rows,        arguments.tiles.workers, dim, arguments.temperature, arguments.sums, arguments.sums_stride,
                         arguments.positives, cuda::data<double>(row_loss), cuda::data<double>(lse)};
  if (source.bfloat16) {
    launch<__nv_bfloat16>(source, zhat, arguments, finish, stream);
  } else {
    launch<__half>(source, zhat, arguments, finish, stream);
  }
  return {row_loss, lse};
}

}  // namespace cellfast::ntxent::sm90
