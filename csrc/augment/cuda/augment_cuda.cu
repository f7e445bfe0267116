// The CUDA backend: one block makes one channel of one view in shared memory, one launch makes a minibatch. Contract: augment/augment.h.
//
// Nothing is read back and nothing waits: draws arrive in device memory, and the caller (cellfast.augment) has checked them.
#include <algorithm>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "augment/augment.h"

namespace cellfast::augment::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// A position along one axis → where it is read: inside the crop, or for zeros at most one pixel outside.
template <Padding padding>
__device__ inline float folded(float q, float crop) {
  q = fminf(fmaxf(q, -1e6f), 1e6f);
  if constexpr (padding == Padding::kReflection) {
    float t = fabsf(q + 0.5f);
    t -= 2.0f * crop * floorf(t * (0.5f / crop));
    q = fminf(t, 2.0f * crop - t) - 0.5f;
  }
  return padding == Padding::kZeros ? fminf(fmaxf(q, -1.0f), crop) : fminf(fmaxf(q, 0.0f), crop - 1.0f);
}

template <typename Pixel>
struct Crop {
  const Pixel* __restrict__ pixels;
  int size;
  float low, inverse;
  bool inverted;

  // 0 outside: with reflection or the border it has weight 0, with zeros that is what it means.
  __device__ float at(int y, int x) const {
    if (x < 0 || y < 0 || x >= size || y >= size) {
      return 0.0f;
    }
    float value = (static_cast<float>(pixels[static_cast<int64_t>(y) * size + x]) - low) * inverse;
    value = value < 0.0f ? 0.0f : (value > 1.0f ? 1.0f : value);  // a NaN stays one
    return !inverted ? value : (value < kHalfCount ? 0.0f : kInversion - value);
  }
};

__device__ inline float block_sum(float value, float* __restrict__ warps) {
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, step);
  }
  if (threadIdx.x % 32 == 0) {
    warps[threadIdx.x / 32] = value;
  }
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) {
    sum += warps[w];  // every thread in the same order
  }
  __syncthreads();
  return sum;
}

// Dynamic shared memory: plane [s, s], then other: [2, m, s] while displacing, [s, s] while blurring; both in `scratch` where they do
// not fit.
template <typename Pixel, Padding padding>
__global__ void __launch_bounds__(kThreads) views_kernel(const Arguments a, float* __restrict__ scratch, int64_t scratch_floats) {
  extern __shared__ float shared[];
  __shared__ float warps[kWarps];
  const int size = static_cast<int>(a.size), pixels = size * size, tid = static_cast<int>(threadIdx.x);
  const int channel = static_cast<int>(blockIdx.x % a.channels);
  const int64_t view = blockIdx.x / a.channels, cell = view % a.batch, at = view * a.channels + channel;
  float* plane = scratch ? scratch + blockIdx.x * scratch_floats : shared;
  float* other = plane + pixels;

  const int m = static_cast<int>(a.lattice);
  const bool displaced = a.row && a.row[view] >= 0;
  if (displaced) {
    const float* __restrict__ noise = a.noise + a.row[view] * 2 * m * m;
    for (int i = tid; i < 2 * m * size; i += kThreads) {  // other[axis, k, x] = (noise[axis] basis^T)[k, x]
      const int x = i % size;
      const float* __restrict__ weights = noise + static_cast<int64_t>(i / size) * m;
      float sum = 0.0f;
      for (int l = 0; l < m; ++l) {
        sum += weights[l] * a.basis[x * m + l];
      }
      other[i] = sum;
    }
    __syncthreads();
  }

  const Crop<Pixel> crop{static_cast<const Pixel*>(a.crops) + (cell * a.channels + channel) * a.crop * a.crop, static_cast<int>(a.crop),
                         a.low[cell * a.channels + channel], a.inverse[cell * a.channels + channel], a.inverted};
  const float* __restrict__ matrix = a.matrix + view * 6;
  const float centre = 0.5f * static_cast<float>(size - 1), middle = a.middle;
  const float xx = matrix[0], xy = matrix[1], x0 = matrix[2] + middle, yx = matrix[3], yy = matrix[4], y0 = matrix[5] + middle;
  for (int i = tid; i < pixels; i += kThreads) {
    const int y = i / size, x = i % size;
    const float px = static_cast<float>(x) - centre, py = static_cast<float>(y) - centre;
    float qx = xx * px + (xy * py + x0), qy = yx * px + (yy * py + y0);
    if (displaced) {
      float dx = 0.0f, dy = 0.0f;
      for (int k = 0; k < m; ++k) {
        const float weight = a.basis[y * m + k];
        dx += weight * other[k * size + x];
        dy += weight * other[(m + k) * size + x];
      }
      qx += dx;
      qy += dy;
    }
    qx = folded<padding>(qx, static_cast<float>(a.crop));
    qy = folded<padding>(qy, static_cast<float>(a.crop));
    const float left = floorf(qx), above = floorf(qy);
    const float fx = qx - left, fy = qy - above;
    const int ix = static_cast<int>(left), iy = static_cast<int>(above);
    const float v00 = crop.at(iy, ix), v01 = crop.at(iy, ix + 1), v10 = crop.at(iy + 1, ix), v11 = crop.at(iy + 1, ix + 1);
    const float top = v00 + fx * (v01 - v00), bottom = v10 + fx * (v11 - v10);
    plane[i] = top + fy * (bottom - top);
  }
  __syncthreads();

  const float sigma = a.sigma ? a.sigma[view] : 0.0f;
  if (sigma > 0.0f) {
    const int reach = static_cast<int>(a.kernel / 2);
    const float slope = -1.0f / (2.0f * sigma * sigma);
    float total = 1.0f;
    for (int k = 1; k <= reach; ++k) {
      total += 2.0f * expf(slope * static_cast<float>(k * k));
    }
    const float inverse_total = 1.0f / total;
    for (int pass = 0; pass < 2; ++pass) {  // columns into `other`, rows back
      const float* from = pass == 0 ? plane : other;
      float* to = pass == 0 ? other : plane;
      for (int i = tid; i < pixels; i += kThreads) {
        const int y = i / size, x = i % size, here = pass == 0 ? y : x;
        float sum = from[i];
        for (int k = 1; k <= reach; ++k) {
          const int before = abs(here - k), after = here + k < size ? here + k : 2 * (size - 1) - (here + k);
          const float pair = pass == 0 ? from[before * size + x] + from[after * size + x] : from[y * size + before] + from[y * size + after];
          sum += expf(slope * static_cast<float>(k * k)) * pair;
        }
        to[i] = sum * inverse_total;
      }
      __syncthreads();
    }
  }

  float scale = a.gain ? a.gain[at] : 1.0f, add = 0.0f;
  if (a.contrast) {  // the same for the whole block: all threads reach the barriers in block_sum
    float sum = 0.0f;
    for (int i = tid; i < pixels; i += kThreads) {
      sum += plane[i];
    }
    add = scale * (1.0f - a.contrast[at]) * (block_sum(sum, warps) / static_cast<float>(pixels));
    scale *= a.contrast[at];
  }
  if (a.offset) {
    add += a.offset[at];
  }
  const float std = a.noise_std ? a.noise_std[view] : 0.0f;
  const float* __restrict__ noise = std > 0.0f ? a.bank + a.start[at] * a.noise_step : nullptr;
  float* __restrict__ out = a.out + view * a.out_stride[0] + channel * a.out_stride[1];
  for (int i = tid; i < pixels; i += kThreads) {
    float value = plane[i] * scale + add;
    if (noise) {
      value += std * noise[i];
    }
    value = value < 0.0f ? 0.0f : (value > 1.0f ? 1.0f : value);
    out[(i / size) * a.out_stride[2] + (i % size) * a.out_stride[3]] = a.inverted ? kInversion - value : value;
  }
}

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename Pixel, Padding padding>
void launch(const Arguments& a, const Tensor& crops, int64_t other) {
  int limit = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, crops.get_device_index()));
  const int64_t floats = a.size * a.size + other, blocks = 2 * a.batch * a.channels;
  // The static part of shared memory counts too.
  const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
  const bool fits = bytes + 1024 <= limit;
  std::optional<Tensor> scratch;
  if (!fits) {
    const int64_t shape[] = {blocks * floats};
    scratch = torch::stable::new_empty(crops, torch::headeronly::IntHeaderOnlyArrayRef(shape, 1), ScalarType::Float);
  } else if (bytes > 48 * 1024) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(views_kernel<Pixel, padding>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  }
  views_kernel<Pixel, padding><<<static_cast<unsigned>(blocks), kThreads, fits ? bytes : 0, current_stream(crops)>>>(
      a, fits ? nullptr : static_cast<float*>(scratch->data_ptr()), floats);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Pixel>
void launch(const Arguments& a, const Tensor& crops, int64_t other) {
  switch (a.padding) {
    case Padding::kReflection:
      return launch<Pixel, Padding::kReflection>(a, crops, other);
    case Padding::kBorder:
      return launch<Pixel, Padding::kBorder>(a, crops, other);
    case Padding::kZeros:
      return launch<Pixel, Padding::kZeros>(a, crops, other);
  }
}

void augment_views(Tensor crops, Tensor low, Tensor inverse, Tensor matrix, MaybeTensor gain, MaybeTensor contrast, MaybeTensor offset,
                   MaybeTensor elastic, MaybeTensor elastic_row, MaybeTensor elastic_basis, MaybeTensor blur_sigma, int64_t blur_kernel,
                   MaybeTensor noise_std, MaybeTensor noise_start, MaybeTensor noise_bank, int64_t noise_step, int64_t padding,
                   bool inverted, Tensor out) {
  const Arguments a = checked(crops, low, inverse, matrix, gain, contrast, offset, elastic, elastic_row, elastic_basis, blur_sigma,
                              blur_kernel, noise_std, noise_start, noise_bank, noise_step, padding, inverted, out);
  if (a.batch == 0) {
    return;
  }
  if (a.crop > 32767 || 2 * a.batch * a.channels > (int64_t{1} << 31) - 1) {
    fail("crops of ", a.crop, " px or ", a.batch, " cells of ", a.channels, " channels are too many for one launch");
  }
  const torch::stable::accelerator::DeviceGuard guard(crops.get_device_index());
  const int64_t other = std::max(a.noise ? 2 * a.lattice * a.size : 0, a.sigma ? a.size * a.size : 0);
  if (a.pixel == ScalarType::UInt16) {
    launch<uint16_t>(a, crops, other);
  } else if (a.pixel == ScalarType::Byte) {
    launch<uint8_t>(a, crops, other);
  } else {
    launch<float>(a, crops, other);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellfast, CUDA, m) {
  m.impl("augment_views", TORCH_BOX(&augment_views));
}

}  // namespace cellfast::augment::cuda
