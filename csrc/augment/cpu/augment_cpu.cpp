// The CPU backend: cells spread over threads, inner loops compiled for several instruction sets. Arithmetic: warp.h; contract: augment/augment.h.
//
// A view depends on its own draws alone, and is made by one thread: thread count and neighbours do not change a bit of it.
#include "augment/augment.h"

#include "augment/cpu/warp.h"

namespace cellfast::augment::cpu {
namespace {

template <typename Pixel>
CELLFAST_INLINE void cells(const Arguments& a, int64_t begin, int64_t end, Scratch& s) {
  for (int64_t cell = begin; cell < end; ++cell) {
    switch (a.padding) {
      case Padding::kReflection:
        views_of_cell<Pixel, Padding::kReflection>(a, cell, s);
        break;
      case Padding::kBorder:
        views_of_cell<Pixel, Padding::kBorder>(a, cell, s);
        break;
      case Padding::kZeros:
        views_of_cell<Pixel, Padding::kZeros>(a, cell, s);
        break;
    }
  }
}

CELLFAST_INLINE void any_pixel(const Arguments& a, int64_t begin, int64_t end, Scratch& s) {
  if (a.pixel == ScalarType::UInt16) {
    cells<uint16_t>(a, begin, end, s);
  } else if (a.pixel == ScalarType::Byte) {
    cells<uint8_t>(a, begin, end, s);
  } else {
    cells<float>(a, begin, end, s);
  }
}

using Range = void (*)(const Arguments&, int64_t, int64_t, Scratch&);

void range_baseline(const Arguments& a, int64_t begin, int64_t end, Scratch& s) {
  any_pixel(a, begin, end, s);
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) void range_avx2(const Arguments& a, int64_t begin, int64_t end, Scratch& s) {
  any_pixel(a, begin, end, s);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"))) void range_avx512(const Arguments& a, int64_t begin,
                                                                                                              int64_t end, Scratch& s) {
  any_pixel(a, begin, end, s);
}

Range choose() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return range_avx512;
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? range_avx2 : range_baseline;
}
#else
Range choose() { return range_baseline; }
#endif

void augment_views(Tensor crops, Tensor low, Tensor inverse, Tensor matrix, MaybeTensor gain, MaybeTensor contrast, MaybeTensor offset,
                   MaybeTensor elastic, MaybeTensor elastic_row, MaybeTensor elastic_basis, MaybeTensor blur_sigma, int64_t blur_kernel,
                   MaybeTensor noise_std, MaybeTensor noise_start, MaybeTensor noise_bank, int64_t noise_step, int64_t padding,
                   bool inverted, Tensor out) {
  const Arguments a = checked(crops, low, inverse, matrix, gain, contrast, offset, elastic, elastic_row, elastic_basis, blur_sigma,
                              blur_kernel, noise_std, noise_start, noise_bank, noise_step, padding, inverted, out);
  // Rows and places in the noise are used as addresses.
  for (int64_t view = 0; view < 2 * a.batch; ++view) {
    if (a.row && (a.row[view] < -1 || a.row[view] >= elastic->size(0))) {
      fail("elastic_row ", a.row[view], " is outside -1..", elastic->size(0) - 1);
    }
    for (int64_t c = 0; a.start && c < a.channels; ++c) {
      const int64_t first = a.start[view * a.channels + c];
      if (first < 0 || first * a.noise_step + a.size * a.size > noise_bank->size(0)) {
        fail("noise_start ", first, " reaches beyond the bank of ", noise_bank->size(0));
      }
    }
  }
  static const Range range = choose();
  torch::stable::parallel_for(0, a.batch, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(a);
    range(a, begin, end, scratch);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellfast, CPU, m) {
  m.impl("augment_views", TORCH_BOX(&augment_views));
}

}  // namespace cellfast::augment::cpu
