// The arithmetic of one cell's two views on one thread, written so that compilers vectorise its inner loops (gathers included).
// Everything is inlined into the functions of augment_cpu.cpp that name an instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "augment/augment.h"

#if defined(__GNUC__)
#define CELLFAST_INLINE inline __attribute__((always_inline))
#define CELLFAST_RESTRICT __restrict__
#else
#define CELLFAST_RESTRICT
#define CELLFAST_INLINE inline
#endif

namespace cellfast::augment::cpu {

// Zeros around a scaled crop: one pixel before and two after, so that all four neighbours of any clipped position can be read.
constexpr int64_t kBefore = 1, kAfter = 2;

struct Scratch {
  std::vector<float> image;    // [C, S + 3, S + 3], the scaled crop with its frame of zeros
  std::vector<float> view;     // [C, s, s]
  std::vector<float> shift;    // [2, s, s], the elastic displacement
  std::vector<float> partial;  // [m, s], or [s, s + 2 r] for the blur
  std::vector<float> fx, fy, taps, bands, tilted;
  std::vector<int32_t> where;

  explicit Scratch(const Arguments& a)
      : image(a.channels * (a.crop + kBefore + kAfter) * (a.crop + kBefore + kAfter), 0.0f),
        view(a.channels * a.size * a.size),
        shift(a.noise ? 2 * a.size * a.size : 0),
        partial(std::max<int64_t>(a.noise ? a.lattice * a.size : 0, a.sigma ? a.size * (a.size + a.kernel) : 0)),
        fx(a.size),
        fy(a.size),
        taps(a.sigma ? a.kernel : 0),
        bands(a.noise ? a.size * a.lattice : 0),
        tilted(a.sigma ? a.size : 0),
        where(a.size) {
    if (a.noise) {  // [m, s]: the basis transposed
      for (int64_t i = 0; i < a.size; ++i) {
        for (int64_t k = 0; k < a.lattice; ++k) {
          bands[k * a.size + i] = a.basis[i * a.lattice + k];
        }
      }
    }
  }
};

template <typename Pixel>
CELLFAST_INLINE void scale_crop(const Arguments& a, int64_t cell, float* CELLFAST_RESTRICT image) {
  const int64_t side = a.crop + kBefore + kAfter;
  for (int64_t c = 0; c < a.channels; ++c) {
    const Pixel* CELLFAST_RESTRICT in = static_cast<const Pixel*>(a.crops) + (cell * a.channels + c) * a.crop * a.crop;
    const float low = a.low[cell * a.channels + c], inverse = a.inverse[cell * a.channels + c];
    for (int64_t y = 0; y < a.crop; ++y) {
      float* CELLFAST_RESTRICT row = image + (c * side + y + kBefore) * side + kBefore;
      for (int64_t x = 0; x < a.crop; ++x) {
        const float value = (static_cast<float>(in[y * a.crop + x]) - low) * inverse;
        // Not std::clamp: a NaN (float32 crops) must stay one, as torch's clamp keeps it.
        row[x] = value < 0.0f ? 0.0f : (value > 1.0f ? 1.0f : value);
      }
    }
  }
}

// A position along one axis → the position, at least 0, in the framed image from which the two neighbours are read.
template <Padding padding>
CELLFAST_INLINE float framed(float q, float crop, float inverse_period) {
  // Far positions (a zoom near zero) are brought into the integers' range first.
  q = std::min(std::max(q, -1e6f), 1e6f);
  if constexpr (padding == Padding::kReflection) {
    float t = std::fabs(q + 0.5f);
    t -= 2.0f * crop * static_cast<float>(static_cast<int32_t>(t * inverse_period));
    q = std::min(t, 2.0f * crop - t) - 0.5f;
  }
  if constexpr (padding == Padding::kZeros) {
    q = std::min(std::max(q, -1.0f), crop);
  } else {
    q = std::min(std::max(q, 0.0f), crop - 1.0f);
  }
  return q + static_cast<float>(kBefore);
}

// shift[axis] = basis noise[axis] basis^T; axis 0 is x.
CELLFAST_INLINE void displacement(const Arguments& a, const float* CELLFAST_RESTRICT noise, Scratch& s) {
  const int64_t size = a.size, m = a.lattice;
  const float* CELLFAST_RESTRICT bands = s.bands.data();
  float* CELLFAST_RESTRICT partial = s.partial.data();
  for (int64_t axis = 0; axis < 2; ++axis) {
    for (int64_t k = 0; k < m; ++k) {  // partial[k] = noise[axis][k] basis^T
      float* CELLFAST_RESTRICT row = partial + k * size;
      std::fill_n(row, size, 0.0f);
      for (int64_t l = 0; l < m; ++l) {
        const float weight = noise[(axis * m + k) * m + l];
        for (int64_t x = 0; x < size; ++x) {
          row[x] += weight * bands[l * size + x];
        }
      }
    }
    for (int64_t y = 0; y < size; ++y) {
      float* CELLFAST_RESTRICT row = s.shift.data() + (axis * size + y) * size;
      std::fill_n(row, size, 0.0f);
      for (int64_t k = 0; k < m; ++k) {
        const float weight = a.basis[y * m + k];
        for (int64_t x = 0; x < size; ++x) {
          row[x] += weight * partial[k * size + x];
        }
      }
    }
  }
}

template <Padding padding>
CELLFAST_INLINE void warp(const Arguments& a, const float* CELLFAST_RESTRICT matrix, bool displaced, Scratch& s) {
  const int32_t size = static_cast<int32_t>(a.size), side = static_cast<int32_t>(a.crop + kBefore + kAfter);
  const float crop = static_cast<float>(a.crop), inverse_period = 0.5f / crop, centre = 0.5f * static_cast<float>(size - 1);
  const float middle = static_cast<float>(a.middle());
  float* CELLFAST_RESTRICT fx = s.fx.data();
  float* CELLFAST_RESTRICT fy = s.fy.data();
  int32_t* CELLFAST_RESTRICT where = s.where.data();
  for (int32_t y = 0; y < size; ++y) {
    const float py = static_cast<float>(y) - centre;
    const float x0 = matrix[1] * py + matrix[2] + middle, y0 = matrix[4] * py + matrix[5] + middle;
    for (int32_t x = 0; x < size; ++x) {
      const float px = static_cast<float>(x) - centre;
      fx[x] = matrix[0] * px + x0;
      fy[x] = matrix[3] * px + y0;
    }
    if (displaced) {
      const float* CELLFAST_RESTRICT dx = s.shift.data() + static_cast<int64_t>(y) * size;
      const float* CELLFAST_RESTRICT dy = dx + a.size * a.size;
      for (int32_t x = 0; x < size; ++x) {
        fx[x] += dx[x];
        fy[x] += dy[x];
      }
    }
    for (int32_t x = 0; x < size; ++x) {
      const float qx = framed<padding>(fx[x], crop, inverse_period), qy = framed<padding>(fy[x], crop, inverse_period);
      const int32_t ix = static_cast<int32_t>(qx), iy = static_cast<int32_t>(qy);
      fx[x] = qx - static_cast<float>(ix);
      fy[x] = qy - static_cast<float>(iy);
      where[x] = iy * side + ix;
    }
    for (int64_t c = 0; c < a.channels; ++c) {
      const float* CELLFAST_RESTRICT image = s.image.data() + c * side * side;
      const float* CELLFAST_RESTRICT below = image + side;
      float* CELLFAST_RESTRICT out = s.view.data() + (c * size + y) * size;
      for (int32_t x = 0; x < size; ++x) {
        const int32_t w = where[x];
        const float top = image[w] + fx[x] * (image[w + 1] - image[w]);
        const float bottom = below[w] + fx[x] * (below[w + 1] - below[w]);
        out[x] = top + fy[x] * (bottom - top);
      }
    }
  }
}

// Blurs every plane of the view in place; the border is reflected without repeating its pixel.
CELLFAST_INLINE void blur(const Arguments& a, float sigma, Scratch& s) {
  const int64_t size = a.size, taps = a.kernel, reach = taps / 2, wide = size + 2 * reach;
  float* CELLFAST_RESTRICT kernel = s.taps.data();
  float total = 0.0f;
  for (int64_t k = 0; k < taps; ++k) {
    const float distance = static_cast<float>(k - reach);
    kernel[k] = std::exp(-distance * distance / (2.0f * sigma * sigma));
    total += kernel[k];
  }
  for (int64_t k = 0; k < taps; ++k) {
    kernel[k] /= total;
  }
  float* CELLFAST_RESTRICT padded = s.partial.data();  // [s, s + 2 reach]
  float* CELLFAST_RESTRICT sum = s.tilted.data();
  const auto mirror = [size](int64_t i) { return i < 0 ? -i : (i >= size ? 2 * (size - 1) - i : i); };
  for (int64_t c = 0; c < a.channels; ++c) {
    float* CELLFAST_RESTRICT plane = s.view.data() + c * size * size;
    for (int64_t y = 0; y < size; ++y) {  // along columns, into `padded`
      std::fill_n(sum, size, 0.0f);
      for (int64_t k = 0; k < taps; ++k) {
        const float* CELLFAST_RESTRICT row = plane + mirror(y + k - reach) * size;
        const float weight = kernel[k];
        for (int64_t x = 0; x < size; ++x) {
          sum[x] += weight * row[x];
        }
      }
      float* CELLFAST_RESTRICT line = padded + y * wide;
      for (int64_t x = 0; x < size; ++x) {
        line[reach + x] = sum[x];
      }
      for (int64_t k = 1; k <= reach; ++k) {
        line[reach - k] = sum[k];
        line[reach + size - 1 + k] = sum[size - 1 - k];
      }
    }
    for (int64_t y = 0; y < size; ++y) {
      const float* CELLFAST_RESTRICT line = padded + y * wide;
      float* CELLFAST_RESTRICT row = plane + y * size;
      std::fill_n(row, size, 0.0f);
      for (int64_t k = 0; k < taps; ++k) {
        const float weight = kernel[k];
        for (int64_t x = 0; x < size; ++x) {
          row[x] += weight * line[x + k];
        }
      }
    }
  }
}

CELLFAST_INLINE float mean(const float* CELLFAST_RESTRICT values, int64_t count) {
  // Lanes of partial sums: a sum of its own order, the same for every thread count.
  constexpr int64_t kLanes = 32;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      lanes[k] += values[i + k];
    }
  }
  double sum = 0;
  for (; i < count; ++i) {
    sum += static_cast<double>(values[i]);
  }
  for (const float lane : lanes) {
    sum += static_cast<double>(lane);
  }
  return static_cast<float>(sum / static_cast<double>(count));
}

// Intensities, noise, clamp; in place where `step` is 0, else to `out` with `step` floats between pixels.
CELLFAST_INLINE void finish(const Arguments& a, int64_t view, int64_t c, float* CELLFAST_RESTRICT plane) {
  const int64_t pixels = a.size * a.size, at = view * a.channels + c;
  float scale = 1.0f, add = 0.0f;
  if (a.gain) {
    scale = a.gain[at];
  }
  if (a.contrast) {
    const float contrast = a.contrast[at];
    add = scale * (1.0f - contrast) * mean(plane, pixels);
    scale *= contrast;
  }
  if (a.offset) {
    add += a.offset[at];
  }
  const float std = a.noise_std ? a.noise_std[view] : 0.0f;
  if (std > 0.0f) {
    const float* CELLFAST_RESTRICT noise = a.bank + a.start[at] * a.noise_step;
    for (int64_t i = 0; i < pixels; ++i) {
      const float value = plane[i] * scale + add + std * noise[i];
      plane[i] = value < 0.0f ? 0.0f : (value > 1.0f ? 1.0f : value);
    }
  } else {
    for (int64_t i = 0; i < pixels; ++i) {
      const float value = plane[i] * scale + add;
      plane[i] = value < 0.0f ? 0.0f : (value > 1.0f ? 1.0f : value);
    }
  }
}

CELLFAST_INLINE void write(const Arguments& a, int64_t view, const Scratch& s) {
  float* CELLFAST_RESTRICT out = a.out + view * a.out_stride[0];
  const int64_t size = a.size, channels = a.channels, pixels = size * size;
  const float* CELLFAST_RESTRICT in = s.view.data();
  const int64_t* stride = a.out_stride;
  if (stride[3] == 1 && stride[2] == size) {
    for (int64_t c = 0; c < channels; ++c) {
      std::copy_n(in + c * pixels, pixels, out + c * stride[1]);
    }
  } else if (channels == 3 && stride[1] == 1 && stride[3] == 3 && stride[2] == 3 * size) {
    for (int64_t i = 0; i < pixels; ++i) {  // the usual channels_last
      out[3 * i] = in[i];
      out[3 * i + 1] = in[pixels + i];
      out[3 * i + 2] = in[2 * pixels + i];
    }
  } else {
    for (int64_t y = 0; y < size; ++y) {
      for (int64_t x = 0; x < size; ++x) {
        for (int64_t c = 0; c < channels; ++c) {
          out[c * stride[1] + y * stride[2] + x * stride[3]] = in[(c * size + y) * size + x];
        }
      }
    }
  }
}

template <typename Pixel, Padding padding>
CELLFAST_INLINE void views_of_cell(const Arguments& a, int64_t cell, Scratch& s) {
  scale_crop<Pixel>(a, cell, s.image.data());
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t view = half * a.batch + cell;
    const bool displaced = a.row && a.row[view] >= 0;
    if (displaced) {
      displacement(a, a.noise + a.row[view] * 2 * a.lattice * a.lattice, s);
    }
    warp<padding>(a, a.matrix + view * 6, displaced, s);
    if (a.sigma && a.sigma[view] > 0.0f) {
      blur(a, a.sigma[view], s);
    }
    for (int64_t c = 0; c < a.channels; ++c) {
      finish(a, view, c, s.view.data() + c * a.size * a.size);
    }
    write(a, view, s);
  }
}

}  // namespace cellfast::augment::cpu
