// The arithmetic of one cell's two views on one thread. Everything is inlined into the functions of augment_cpu.cpp that name an
// instruction set.
//
// Channels are handled four at a time, side by side: one vector is one pixel, one double vector is a pixel and its right neighbour, so
// that a bilinear sample is two unaligned loads. No gather instruction is used: many processors run them slowly since their microcode
// closes a leak in them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "augment/augment.h"

#define CELLFAST_INLINE inline __attribute__((always_inline))
#define CELLFAST_RESTRICT __restrict__

namespace cellfast::augment::cpu {

constexpr int64_t kGroup = 4;
// Zeros around a scaled crop: one pixel before and two after, so that all four neighbours of any clipped position can be read.
constexpr int64_t kBefore = 1, kAfter = 2;

typedef float Pixel4 __attribute__((vector_size(16)));
typedef float Pixel8 __attribute__((vector_size(32)));

template <typename V>
CELLFAST_INLINE V load(const float* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V>
CELLFAST_INLINE void store(const V& value, float* to) {
  std::memcpy(to, &value, sizeof(V));
}

struct Scratch {
  int64_t groups, side;
  std::vector<float> image;    // [groups, S + 3, S + 3, 4], the scaled crop with its frame of zeros
  std::vector<float> lines;    // [4, S], rows of the scaled crop before they are laid side by side
  std::vector<float> view;     // [s, s, 4], of one group
  std::vector<float> blurred;  // [s, s + 2 r, 4]
  std::vector<float> shift;    // [2, s, s], the elastic displacement
  std::vector<float> partial;  // [m, s]
  std::vector<float> bands;    // [m, s], the elastic basis transposed
  std::vector<float> fx, fy, taps;
  std::vector<int32_t> where;
  std::vector<const float*> rows;

  explicit Scratch(const Arguments& a)
      : groups((a.channels + kGroup - 1) / kGroup),
        side(a.crop + kBefore + kAfter),
        image(groups * side * side * kGroup, 0.0f),
        lines(kGroup * a.crop, 0.0f),
        view(a.size * a.size * kGroup),
        blurred(a.sigma ? a.size * (a.size + a.kernel) * kGroup : 0),
        shift(a.noise ? 2 * a.size * a.size : 0),
        partial(a.noise ? a.lattice * a.size : 0),
        bands(a.noise ? a.size * a.lattice : 0),
        fx(a.size * a.size),
        fy(a.size * a.size),
        taps(a.sigma ? a.kernel : 0),
        where(a.size * a.size),
        rows(std::max(a.noise ? a.lattice : 0, a.sigma ? a.kernel : 0)) {
    for (int64_t i = 0; a.noise && i < a.size; ++i) {
      for (int64_t k = 0; k < a.lattice; ++k) {
        bands[k * a.size + i] = a.basis[i * a.lattice + k];
      }
    }
  }
};

// In this order of operands a NaN (float32 crops) stays one, as torch's clamp keeps it.
CELLFAST_INLINE float unit(float value) { return std::min(std::max(value, 0.0f), 1.0f); }

template <typename Pixel>
CELLFAST_INLINE void scale_crop(const Arguments& a, int64_t cell, Scratch& s) {
  const int64_t crop = a.crop;
  float* CELLFAST_RESTRICT lines = s.lines.data();
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t first = g * kGroup, count = std::min(kGroup, a.channels - first);
    for (int64_t y = 0; y < crop; ++y) {
      for (int64_t c = 0; c < count; ++c) {
        const int64_t plane = cell * a.channels + first + c;
        const Pixel* CELLFAST_RESTRICT in = static_cast<const Pixel*>(a.crops) + (plane * crop + y) * crop;
        const float low = a.low[plane], inverse = a.inverse[plane];
        float* CELLFAST_RESTRICT line = lines + c * crop;
        for (int64_t x = 0; x < crop; ++x) {
          line[x] = unit((static_cast<float>(in[x]) - low) * inverse);
        }
        for (int64_t x = 0; a.inverted && x < crop; ++x) {
          line[x] = line[x] < kHalfCount ? 0.0f : kInversion - line[x];
        }
      }
      float* CELLFAST_RESTRICT row = s.image.data() + ((g * s.side + y + kBefore) * s.side + kBefore) * kGroup;
      for (int64_t x = 0; x < crop; ++x) {  // lines of channels that do not exist stay as they were: never used
        row[kGroup * x] = lines[x];
        row[kGroup * x + 1] = lines[crop + x];
        row[kGroup * x + 2] = lines[2 * crop + x];
        row[kGroup * x + 3] = lines[3 * crop + x];
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

// Where each pixel of a view is sampled: the same for all channels.
template <Padding padding>
CELLFAST_INLINE void positions(const Arguments& a, const float* CELLFAST_RESTRICT matrix, bool displaced, Scratch& s) {
  const int32_t size = static_cast<int32_t>(a.size), side = static_cast<int32_t>(s.side);
  const float crop = static_cast<float>(a.crop), inverse_period = 0.5f / crop, centre = 0.5f * static_cast<float>(size - 1);
  const float middle = a.middle;
  for (int32_t y = 0; y < size; ++y) {
    float* CELLFAST_RESTRICT fx = s.fx.data() + static_cast<int64_t>(y) * size;
    float* CELLFAST_RESTRICT fy = s.fy.data() + static_cast<int64_t>(y) * size;
    int32_t* CELLFAST_RESTRICT where = s.where.data() + static_cast<int64_t>(y) * size;
    const float py = static_cast<float>(y) - centre;
    const float x0 = matrix[1] * py + matrix[2] + middle, y0 = matrix[4] * py + matrix[5] + middle;
    const float xx = matrix[0], yx = matrix[3];
    for (int32_t x = 0; x < size; ++x) {
      const float px = static_cast<float>(x) - centre;
      fx[x] = xx * px + x0;
      fy[x] = yx * px + y0;
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
      where[x] = (iy * side + ix) * static_cast<int32_t>(kGroup);
    }
  }
}

CELLFAST_INLINE void sample(const Arguments& a, int64_t group, Scratch& s) {
  const float* CELLFAST_RESTRICT above = s.image.data() + group * s.side * s.side * kGroup;
  const float* CELLFAST_RESTRICT below = above + s.side * kGroup;
  const float* CELLFAST_RESTRICT fx = s.fx.data();
  const float* CELLFAST_RESTRICT fy = s.fy.data();
  const int32_t* CELLFAST_RESTRICT where = s.where.data();
  float* CELLFAST_RESTRICT out = s.view.data();
  for (int64_t i = 0; i < a.size * a.size; ++i) {
    const Pixel8 top = load<Pixel8>(above + where[i]);
    const Pixel8 both = top + fy[i] * (load<Pixel8>(below + where[i]) - top);
    const Pixel4 left = __builtin_shufflevector(both, both, 0, 1, 2, 3), right = __builtin_shufflevector(both, both, 4, 5, 6, 7);
    store<Pixel4>(left + fx[i] * (right - left), out + kGroup * i);
  }
}

CELLFAST_INLINE void gaussian(float sigma, int64_t taps, float* kernel) {
  float total = 0.0f;
  for (int64_t k = 0; k < taps; ++k) {
    const float distance = static_cast<float>(k - taps / 2);
    kernel[k] = std::exp(-distance * distance / (2.0f * sigma * sigma));
    total += kernel[k];
  }
  for (int64_t k = 0; k < taps; ++k) {
    kernel[k] /= total;
  }
}

// to[i] = sum_k kernel[k] rows[k][i], several vectors at a time so that the sums stay in registers.
CELLFAST_INLINE void weighted_sum(const float* const* rows, const float* CELLFAST_RESTRICT kernel, int64_t taps, int64_t width,
                                  float* to) {
  int64_t i = 0;
  for (; i + 32 <= width; i += 32) {
    Pixel8 s0 = {}, s1 = {}, s2 = {}, s3 = {};
    for (int64_t k = 0; k < taps; ++k) {
      const float* row = rows[k] + i;
      const float weight = kernel[k];
      s0 += weight * load<Pixel8>(row);
      s1 += weight * load<Pixel8>(row + 8);
      s2 += weight * load<Pixel8>(row + 16);
      s3 += weight * load<Pixel8>(row + 24);
    }
    store(s0, to + i);
    store(s1, to + i + 8);
    store(s2, to + i + 16);
    store(s3, to + i + 24);
  }
  for (; i < width; ++i) {
    float sum = 0.0f;
    for (int64_t k = 0; k < taps; ++k) {
      sum += kernel[k] * rows[k][i];
    }
    to[i] = sum;
  }
}

// shift[axis] = basis noise[axis] basis^T; axis 0 is x.
CELLFAST_INLINE void displacement(const Arguments& a, const float* CELLFAST_RESTRICT noise, Scratch& s) {
  const int64_t size = a.size, m = a.lattice;
  const float** rows = s.rows.data();
  for (int64_t axis = 0; axis < 2; ++axis) {
    for (int64_t k = 0; k < m; ++k) {
      rows[k] = s.bands.data() + k * size;
    }
    for (int64_t k = 0; k < m; ++k) {  // partial[k] = noise[axis][k] basis^T
      weighted_sum(rows, noise + (axis * m + k) * m, m, size, s.partial.data() + k * size);
    }
    for (int64_t k = 0; k < m; ++k) {
      rows[k] = s.partial.data() + k * size;
    }
    for (int64_t y = 0; y < size; ++y) {
      weighted_sum(rows, a.basis + y * m, m, size, s.shift.data() + (axis * size + y) * size);
    }
  }
}

// Blurs the group's view in place; the border is reflected without repeating its pixel.
CELLFAST_INLINE void blur(const Arguments& a, Scratch& s) {
  const int64_t size = a.size, taps = a.kernel, reach = taps / 2, wide = (size + 2 * reach) * kGroup;
  const float* kernel = s.taps.data();
  float* plane = s.view.data();
  const float** rows = s.rows.data();
  for (int64_t y = 0; y < size; ++y) {
    float* inner = s.blurred.data() + y * wide + reach * kGroup;
    for (int64_t k = 0; k < taps; ++k) {
      const int64_t at = std::abs(y + k - reach);
      rows[k] = plane + (at >= size ? 2 * (size - 1) - at : at) * size * kGroup;
    }
    weighted_sum(rows, kernel, taps, size * kGroup, inner);
    for (int64_t k = 1; k <= reach; ++k) {
      store(load<Pixel4>(inner + k * kGroup), inner - k * kGroup);
      store(load<Pixel4>(inner + (size - 1 - k) * kGroup), inner + (size - 1 + k) * kGroup);
    }
  }
  for (int64_t y = 0; y < size; ++y) {
    for (int64_t k = 0; k < taps; ++k) {
      rows[k] = s.blurred.data() + y * wide + k * kGroup;
    }
    weighted_sum(rows, kernel, taps, size * kGroup, plane + y * size * kGroup);
  }
}

// The mean of each channel of the group, summed in an order of its own: the same for every thread count.
CELLFAST_INLINE Pixel4 mean(const float* CELLFAST_RESTRICT pixels, int64_t count) {
  Pixel4 sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int64_t k = 0; k < 4; ++k) {
      sums[k] += load<Pixel4>(pixels + (i + k) * kGroup);
    }
  }
  for (; i < count; ++i) {
    sums[0] += load<Pixel4>(pixels + i * kGroup);
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(count);
}

CELLFAST_INLINE Pixel4 unit(Pixel4 value) {
  const Pixel4 zero = {}, one = {1.0f, 1.0f, 1.0f, 1.0f};
  value = value < zero ? zero : value;
  return value > one ? one : value;
}

// What is done last: add + sign value is the value itself, or the inverted one.
struct Turn {
  float add, sign;
};

// channels_last: pixel after pixel, straight from the vectors.
template <typename Noise>
CELLFAST_INLINE void pixels_out(const float* CELLFAST_RESTRICT in, float* CELLFAST_RESTRICT out, Pixel4 scale, Pixel4 add, Turn turn,
                                int64_t step, int64_t count, int64_t pixels, bool alone, const Noise& noise) {
  // A whole vector may be written where what it spills over is this view's and written later: not at the end, not beside other groups.
  const int64_t whole = count == kGroup ? pixels : (alone ? std::max<int64_t>(pixels - kGroup, 0) : 0);
  int64_t i = 0;
  for (; i < whole; ++i) {
    store(turn.add + turn.sign * unit(load<Pixel4>(in + kGroup * i) * scale + add + noise(i)), out + i * step);
  }
  for (; i < pixels; ++i) {
    const Pixel4 value = turn.add + turn.sign * unit(load<Pixel4>(in + kGroup * i) * scale + add + noise(i));
    for (int64_t c = 0; c < count; ++c) {
      out[i * step + c] = value[c];
    }
  }
}

// Intensities, noise and clamp of the group's view, into `out`.
CELLFAST_INLINE void finish(const Arguments& a, int64_t view, int64_t group, Scratch& s) {
  const int64_t size = a.size, pixels = size * size, first = group * kGroup, count = std::min(kGroup, a.channels - first);
  float* CELLFAST_RESTRICT in = s.view.data();
  Pixel4 scale = {1.0f, 1.0f, 1.0f, 1.0f}, add = {};
  const Pixel4 middle = a.contrast ? mean(in, pixels) : add;
  for (int64_t c = 0; c < count; ++c) {
    const int64_t at = view * a.channels + first + c;
    if (a.gain) {
      scale[c] = a.gain[at];
    }
    if (a.contrast) {
      add[c] = scale[c] * (1.0f - a.contrast[at]) * middle[c];
      scale[c] *= a.contrast[at];
    }
    if (a.offset) {
      add[c] += a.offset[at];
    }
  }
  const float std = a.noise_std ? a.noise_std[view] : 0.0f;
  const float* noise[kGroup];
  for (int64_t c = 0; c < kGroup; ++c) {
    noise[c] = std > 0.0f ? a.bank + a.start[view * a.channels + first + std::min(c, count - 1)] * a.noise_step : nullptr;
  }
  const Turn turn = a.inverted ? Turn{kInversion, -1.0f} : Turn{0.0f, 1.0f};
  const int64_t* stride = a.out_stride;
  float* CELLFAST_RESTRICT out = a.out + view * stride[0] + first * stride[1];
  if (stride[1] == 1 && stride[2] == size * stride[3]) {
    if (std > 0.0f) {
      const float *n0 = noise[0], *n1 = noise[1], *n2 = noise[2], *n3 = noise[3];
      pixels_out(in, out, scale, add, turn, stride[3], count, pixels, group == 0 && a.channels == count,
                 [=](int64_t i) { return std * Pixel4{n0[i], n1[i], n2[i], n3[i]}; });
    } else {
      pixels_out(in, out, scale, add, turn, stride[3], count, pixels, group == 0 && a.channels == count,
                 [](int64_t) { return Pixel4{}; });
    }
    return;
  }
  for (int64_t c = 0; c < count; ++c) {
    const float scale_c = scale[c], add_c = add[c];
    const float* CELLFAST_RESTRICT n = noise[c];
    for (int64_t y = 0; y < size; ++y) {
      float* CELLFAST_RESTRICT row = out + c * stride[1] + y * stride[2];
      const float* CELLFAST_RESTRICT from = in + y * size * kGroup + c;
      if (stride[3] == 1) {
        for (int64_t x = 0; x < size; ++x) {
          row[x] = from[kGroup * x] * scale_c + add_c;
        }
        for (int64_t x = 0; std > 0.0f && x < size; ++x) {
          row[x] += std * n[y * size + x];
        }
        for (int64_t x = 0; x < size; ++x) {
          row[x] = turn.add + turn.sign * unit(row[x]);
        }
      } else {
        for (int64_t x = 0; x < size; ++x) {
          const float value = unit(from[kGroup * x] * scale_c + add_c + (std > 0.0f ? std * n[y * size + x] : 0.0f));
          row[x * stride[3]] = turn.add + turn.sign * value;
        }
      }
    }
  }
}

template <typename Pixel, Padding padding>
CELLFAST_INLINE void views_of_cell(const Arguments& a, int64_t cell, Scratch& s) {
  scale_crop<Pixel>(a, cell, s);
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t view = half * a.batch + cell;
    const bool displaced = a.row && a.row[view] >= 0;
    if (displaced) {
      displacement(a, a.noise + a.row[view] * 2 * a.lattice * a.lattice, s);
    }
    positions<padding>(a, a.matrix + view * 6, displaced, s);
    const bool blurs = a.sigma && a.sigma[view] > 0.0f;
    if (blurs) {
      gaussian(a.sigma[view], a.kernel, s.taps.data());
    }
    for (int64_t group = 0; group < s.groups; ++group) {
      sample(a, group, s);
      if (blurs) {
        blur(a, s);
      }
      finish(a, view, group, s);
    }
  }
}

}  // namespace cellfast::augment::cpu
