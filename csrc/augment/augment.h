// Two views of each cell in one pass: the contract of cellfast::augment_views and the checks every backend makes before it touches memory.
//
// For view v (rows v B .. v B + B - 1 of what has 2B rows) of cell b and channel c, all in float32:
//   x(p)   = clamp((crop[b, c, p] - low[b, c]) inverse[b, c], 0, 1); if inverted, x < 0.5 / 255 ? 0 : 256 / 255 - x
//   q(i,j) = A (j - m, i - m) + t + (S // 2 - s // 2 + m) + d(i, j),   [A | t] = matrix[view], m = (s - 1) / 2, in pixels of the crop
//   d      = basis noise basis^T for each axis, for a view whose elastic_row is not -1
//   y(i,j) = x at q, bilinear; outside the crop reflected about its outer edges, or its nearest edge pixel, or 0 (F.grid_sample,
//            align_corners=False)
//   y      = Gaussian of sigma blur_sigma[view] > 0, cut off at blur_kernel taps, normalised; borders reflected without the edge pixel
//   y      = gain (contrast y + (1 - contrast) mean(y)) + offset,   gain, contrast, offset [2B, C]
//   y      = clamp(y + noise_std[view] bank[noise_step noise_start[view, c] + (i s + j)], 0, 1); if inverted, 256 / 255 - y
//
// The order of the operations is the one cellfast.augment.views documents; that file's plain PyTorch form is what this equals to rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace cellfast::augment {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

enum class Padding : int64_t { kReflection = 0, kBorder = 1, kZeros = 2 };

// What an 8-bit pixel that was subtracted from 256 becomes in [0, 1], and the half count below which a pixel was 0 and stayed 0.
constexpr float kInversion = 256.0f / 255.0f, kHalfCount = 0.5f / 255.0f;

// Everything a backend needs, as plain pointers; null where an operation is off. Optional tensors are dense; `out` has its own strides.
struct Arguments {
  const void* crops;       // [B, C, S, S] of `pixel`
  ScalarType pixel;        // Byte, UInt16 or Float
  const float* low;        // [B, C]
  const float* inverse;    // [B, C]
  const float* matrix;     // [2B, 2, 3]
  const float* gain;       // [2B, C]
  const float* contrast;   // [2B, C]
  const float* offset;     // [2B, C]
  const float* noise;      // elastic [E, 2, m, m]
  const int64_t* row;      // elastic_row [2B]
  const float* basis;      // [s, m]
  const float* sigma;      // [2B]
  const float* noise_std;  // [2B]
  const int64_t* start;    // [2B, C]
  const float* bank;
  float* out;              // [2B, C, s, s], strides out_stride
  int64_t batch, channels, crop, size, lattice, kernel, noise_step;
  int64_t out_stride[4];
  Padding padding;
  bool inverted;
  float middle;  // the centre of the central window, whose first pixel is S // 2 - s // 2
};

template <typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "augment_views: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline void expect(const Tensor& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape, const Tensor& like) {
  bool ok = t.scalar_type() == dtype && t.dim() == static_cast<int64_t>(shape.size()) && t.is_contiguous();
  ok = ok && t.device() == like.device();
  int64_t d = 0;
  std::ostringstream wanted;
  for (const int64_t extent : shape) {
    ok = ok && t.size(d) == extent;
    wanted << (d++ ? ", " : "") << extent;
  }
  if (!ok) {
    std::ostringstream got;
    for (int64_t k = 0; k < t.dim(); ++k) {
      got << (k ? ", " : "") << t.size(k);
    }
    fail(name, " must be contiguous ", torch::headeronly::toString(dtype), " [", wanted.str(), "] on the crops' device, got ",
         torch::headeronly::toString(t.scalar_type()), " [", got.str(), "]");
  }
}

template <typename T>
const T* optional_data(const MaybeTensor& t) {
  return t.has_value() ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

inline Arguments checked(const Tensor& crops, const Tensor& low, const Tensor& inverse, const Tensor& matrix, const MaybeTensor& gain,
                         const MaybeTensor& contrast, const MaybeTensor& offset, const MaybeTensor& elastic,
                         const MaybeTensor& elastic_row, const MaybeTensor& elastic_basis, const MaybeTensor& blur_sigma,
                         int64_t blur_kernel, const MaybeTensor& noise_std, const MaybeTensor& noise_start, const MaybeTensor& noise_bank,
                         int64_t noise_step, int64_t padding, bool inverted, const Tensor& out) {
  const ScalarType pixel = crops.scalar_type();
  if (crops.dim() != 4 || crops.size(2) != crops.size(3) || !crops.is_contiguous() ||
      (pixel != ScalarType::Byte && pixel != ScalarType::UInt16 && pixel != ScalarType::Float)) {
    fail("crops must be contiguous uint8, uint16 or float32 [B, C, S, S]");
  }
  Arguments a{};
  a.pixel = pixel;
  a.batch = crops.size(0), a.channels = crops.size(1), a.crop = crops.size(2);
  const int64_t views = 2 * a.batch;
  if (out.dim() != 4 || out.scalar_type() != ScalarType::Float || out.size(0) != views || out.size(1) != a.channels ||
      out.size(2) != out.size(3) || out.size(2) < 1 || out.size(2) > a.crop || out.device() != crops.device()) {
    fail("out must be float32 [2B, C, s, s] with s <= S on the crops' device");
  }
  a.size = out.size(2);
  for (int64_t d = 0; d < 4; ++d) {
    a.out_stride[d] = out.stride(d);
  }
  expect(low, "low", ScalarType::Float, {a.batch, a.channels}, crops);
  expect(inverse, "inverse", ScalarType::Float, {a.batch, a.channels}, crops);
  expect(matrix, "matrix", ScalarType::Float, {views, 2, 3}, crops);
  for (const auto& [t, name] : {std::pair{&gain, "gain"}, std::pair{&contrast, "contrast"}, std::pair{&offset, "offset"}}) {
    if (t->has_value()) {
      expect(**t, name, ScalarType::Float, {views, a.channels}, crops);
    }
  }
  if (elastic.has_value()) {
    if (!elastic_row.has_value() || !elastic_basis.has_value() || elastic_basis->dim() != 2) {
      fail("elastic needs elastic_row and elastic_basis [s, m]");
    }
    a.lattice = elastic_basis->size(1);
    expect(*elastic, "elastic", ScalarType::Float, {elastic->size(0), 2, a.lattice, a.lattice}, crops);
    expect(*elastic_row, "elastic_row", ScalarType::Long, {views}, crops);
    expect(*elastic_basis, "elastic_basis", ScalarType::Float, {a.size, a.lattice}, crops);
  }
  if (blur_sigma.has_value()) {
    expect(*blur_sigma, "blur_sigma", ScalarType::Float, {views}, crops);
    if (blur_kernel < 1 || blur_kernel % 2 == 0 || blur_kernel / 2 >= a.size) {
      fail("blur_kernel must be odd and reach less than s, got ", blur_kernel);
    }
  }
  if (noise_std.has_value()) {
    if (!noise_start.has_value() || !noise_bank.has_value() || noise_bank->dim() != 1 || noise_step < 1) {
      fail("noise_std needs noise_start, noise_bank and a positive noise_step");
    }
    expect(*noise_std, "noise_std", ScalarType::Float, {views}, crops);
    expect(*noise_start, "noise_start", ScalarType::Long, {views, a.channels}, crops);
    expect(*noise_bank, "noise_bank", ScalarType::Float, {noise_bank->size(0)}, crops);
  }
  if (padding < 0 || padding > 2) {
    fail("padding must be 0 (reflection), 1 (border) or 2 (zeros), got ", padding);
  }
  a.crops = crops.data_ptr();
  a.low = static_cast<const float*>(low.data_ptr());
  a.inverse = static_cast<const float*>(inverse.data_ptr());
  a.matrix = static_cast<const float*>(matrix.data_ptr());
  a.gain = optional_data<float>(gain);
  a.contrast = optional_data<float>(contrast);
  a.offset = optional_data<float>(offset);
  a.noise = optional_data<float>(elastic);
  a.row = elastic.has_value() ? optional_data<int64_t>(elastic_row) : nullptr;
  a.basis = optional_data<float>(elastic_basis);
  a.sigma = optional_data<float>(blur_sigma);
  a.kernel = blur_kernel;
  a.noise_std = optional_data<float>(noise_std);
  a.start = noise_std.has_value() ? optional_data<int64_t>(noise_start) : nullptr;
  a.bank = optional_data<float>(noise_bank);
  a.noise_step = noise_step;
  a.padding = static_cast<Padding>(padding);
  a.inverted = inverted;
  a.middle = static_cast<float>(static_cast<double>(a.crop / 2 - a.size / 2) + 0.5 * static_cast<double>(a.size - 1));
  a.out = static_cast<float*>(out.data_ptr());
  return a;
}

}  // namespace cellfast::augment
