// The tile kernels, written once with the compiler's vector types and compiled per instruction set. The including file defines
//   CELLFAST_KERNELS   namespace and name,  CELLFAST_VECTOR_BYTES   width of a vector,
//   CELLFAST_ROWS      rows of the logits' register tile (divides lanes for float and double),  CELLFAST_VECTORS  its vectors,
//   CELLFAST_OUT_ROWS  rows of the weights' register tile (divides kRowStep),
//   CELLFAST_PAIRS     0: numbers, 1: pairs of bfloat16 in a float's place (tile.h), multiplied as CELLFAST_PAIR_DOT(sum, a, b) does or,
//                      without that, by shifting them apart.
// HAZARD: no template or inline function of the standard library may be used here. It would be compiled for this instruction set, and the
// linker might keep that copy for the whole program, which then stops with an illegal instruction on an older processor.

#define CELLFAST_STRING_(x) #x
#define CELLFAST_STRING(x) CELLFAST_STRING_(x)

namespace cellfast::ntxent::cpu::CELLFAST_KERNELS {
namespace {

template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float vector __attribute__((vector_size(CELLFAST_VECTOR_BYTES)));
  typedef float loose __attribute__((vector_size(CELLFAST_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(CELLFAST_VECTOR_BYTES)));
  static constexpr int mantissa = 23;
  static constexpr float shifter = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the lowest bits
};

template <>
struct Lanes<double> {
  typedef double vector __attribute__((vector_size(CELLFAST_VECTOR_BYTES)));
  typedef double loose __attribute__((vector_size(CELLFAST_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t bits __attribute__((vector_size(CELLFAST_VECTOR_BYTES)));
  static constexpr int mantissa = 52;
  static constexpr double shifter = 6755399441055744.0;  // 1.5 * 2^52
};

template <typename T>
using Vector = typename Lanes<T>::vector;
template <typename T>
constexpr int kLanes = CELLFAST_VECTOR_BYTES / sizeof(T);

template <typename T>
__attribute__((always_inline)) inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::loose*>(p);
}
template <typename T>
__attribute__((always_inline)) inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename Lanes<T>::loose*>(p) = v;
}

// Coefficients of 2^f on [-1/2, 1/2], interpolated at Chebyshev points: 2.5e-9 off with 7 terms, 6e-20 with 13.
constexpr float kExp2Float[] = {1.0f, 0.69314720670283259577f, 0.24022650922288758071f, 0.055503272266703020589f, 0.0096180566785246380754f,
                                0.001340042817761583794f, 0.00015461444698569129083f};
constexpr double kExp2Double[] = {1.0,
                                  0.69314718055994530835,
                                  0.24022650695910071228,
                                  0.055504108664821698992,
                                  0.0096181291076284830543,
                                  0.0013333558146390352775,
                                  0.00015403530393362755291,
                                  0.000015252733856293466416,
                                  1.3215486815999976975e-6,
                                  1.017805119296064896e-7,
                                  7.0548943863483480445e-9,
                                  4.4566753410492058782e-10,
                                  2.5733568308756891235e-11};

// 2^max(x, -126) for x < 126: the caller's shift keeps x below that.
template <typename T>
__attribute__((always_inline)) inline Vector<T> exp2_of(Vector<T> x) {
  using Bits = typename Lanes<T>::bits;
  const Vector<T> lowest = Vector<T>{} - T(126);
  x = x > lowest ? x : lowest;
  const Vector<T> shifted = x + Lanes<T>::shifter;
  const Vector<T> f = x - (shifted - Lanes<T>::shifter);
  Vector<T> p;
  if constexpr (sizeof(T) == 4) {
    p = f * kExp2Float[6] + kExp2Float[5];
#pragma GCC unroll 8
    for (int i = 4; i >= 0; --i) {
      p = p * f + kExp2Float[i];
    }
  } else {
    p = f * kExp2Double[12] + kExp2Double[11];
#pragma GCC unroll 12
    for (int i = 10; i >= 0; --i) {
      p = p * f + kExp2Double[i];
    }
  }
  return reinterpret_cast<Vector<T>>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << Lanes<T>::mantissa));
}

// sum + (one number of a, in every lane) * b.
template <typename T>
__attribute__((always_inline)) inline Vector<T> multiply_add(Vector<T> sum, const T* a, Vector<T> b) {
#if CELLFAST_PAIRS
  // Loaded as an integer: as a float a pair might be a NaN or a denormal number, and be changed on the way.
  using Bits = typename Lanes<T>::bits;
  typedef int32_t loose_int __attribute__((may_alias));
  const Bits pairs = Bits{} + *reinterpret_cast<const loose_int*>(a);
#if defined(CELLFAST_PAIR_DOT)
  return CELLFAST_PAIR_DOT(sum, pairs, b);
#else
  const Bits high = Bits{} + static_cast<int32_t>(0xffff0000u), other = reinterpret_cast<Bits>(b);
  sum += reinterpret_cast<Vector<T>>(pairs << 16) * reinterpret_cast<Vector<T>>(other << 16);
  return sum + reinterpret_cast<Vector<T>>(pairs & high) * reinterpret_cast<Vector<T>>(other & high);
#endif
#else
  return sum + *a * b;
#endif
}

constexpr int kRows = CELLFAST_ROWS;
constexpr int kVectors = CELLFAST_VECTORS;
constexpr int kOutRows = CELLFAST_OUT_ROWS;

// acc[r][v] = sum_k a[k][r] * b[v][k][lane].
template <typename T>
__attribute__((always_inline)) inline void dot(const T* __restrict__ a, const T* __restrict__ b, int64_t dim, Vector<T> (&acc)[kRows][kVectors]) {
  constexpr int lanes = kLanes<T>;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = Vector<T>{};
    }
  }
  const int64_t panel = dim * lanes;
#pragma GCC unroll 2
  for (int64_t k = 0; k < dim; ++k) {
    Vector<T> column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      column[v] = load(b + v * panel + k * lanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = multiply_add<T>(acc[r][v], a + k * lanes + r, column[v]);
      }
    }
  }
}

// Whether rows [i, i + kRows) x columns [j, j + width) hold a self pair, a positive pair, or rows or columns past the end.
inline bool is_special(const Tile& t, int64_t i, int64_t j, int64_t width) {
  const int64_t half = t.num_rows / 2, last = i + kRows;
  const bool self = i < j + width && j < last;
  const bool later = i + half < j + width && j < last + half;
  const bool earlier = i - half < j + width && j < last - half;
  return self || later || earlier || last > t.i1 || j + width > t.j1;
}

inline bool is_dropped(const Tile& t, int64_t row, int64_t column) {
  const int64_t apart = row < column ? column - row : row - column;
  return row >= t.i1 || column >= t.j1 || apart == 0 || apart == t.num_rows / 2;
}

// Zero for pairs that do not count; rarely called.
template <typename T>
__attribute__((noinline)) void drop(const Tile& t, int64_t i, int64_t j, T (&values)[kRows][kVectors * kLanes<T>]) {
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVectors * kLanes<T>; ++c) {
      if (is_dropped(t, i + r, j + c)) {
        values[r][c] = T(0);
      }
    }
  }
}

// acc with the pairs that do not count set to zero.
template <typename T>
__attribute__((always_inline)) inline void drop_special(const Tile& t, int64_t i, int64_t j, Vector<T> (&acc)[kRows][kVectors]) {
  constexpr int lanes = kLanes<T>;
  alignas(64) T values[kRows][kVectors * lanes];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store(&values[r][v * lanes], acc[r][v]);
    }
  }
  drop(t, i, j, values);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = load(&values[r][v * lanes]);
    }
  }
}

template <typename T>
void forward(const T* a, const T* b, const Tile& t, T* row_sums, T* column_sums) {
  constexpr int lanes = kLanes<T>;
  constexpr int width = kVectors * lanes;
  const T shift = static_cast<T>(t.shift);
  for (int64_t j = t.j0; j < t.j1; j += width) {
    const T* columns = b + (j - t.j0) * t.dim;
    Vector<T> below[kVectors] = {};
    for (int64_t i = t.i0; i < t.i1; i += kRows) {
      const int64_t in_panel = (i - t.i0) % lanes;
      Vector<T> acc[kRows][kVectors];
      dot(a + (i - t.i0 - in_panel) * t.dim + in_panel, columns, t.dim, acc);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          acc[r][v] = exp2_of<T>(acc[r][v] - shift);
        }
      }
      if (__builtin_expect(is_special(t, i, j, width), 0)) {
        drop_special<T>(t, i, j, acc);
      }
      T* sums = row_sums + (i - t.i0) * lanes;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        Vector<T> across = acc[r][0];
        below[0] += acc[r][0];
#pragma GCC unroll 4
        for (int v = 1; v < kVectors; ++v) {
          across += acc[r][v];
          below[v] += acc[r][v];
        }
        store(sums + r * lanes, load(sums + r * lanes) + across);
      }
    }
    if (column_sums != nullptr) {
      for (int v = 0; v < kVectors; ++v) {
        T* sums = column_sums + (j - t.j0) + v * lanes;
        store(sums, load(sums) + below[v]);
      }
    }
  }
}

#if CELLFAST_PAIRS
// To bfloat16 by rounding to the nearest, in the upper half of each lane; the lower half is left over.
template <typename T>
__attribute__((always_inline)) inline typename Lanes<T>::bits rounded(Vector<T> x) {
  const auto bits = reinterpret_cast<typename Lanes<T>::bits>(x);
  return bits + 0x7fff + ((bits >> 16) & 1);
}

// Twice: pairs of columns, then, kTransposedWeights further, pairs of rows.
template <typename T>
__attribute__((always_inline)) inline void store_weights(const Vector<T> (&acc)[kRows][kVectors], int64_t row, int64_t column, T* out) {
  constexpr int lanes = kLanes<T>;
  using Bits = typename Lanes<T>::bits;
  typedef uint64_t wide __attribute__((vector_size(CELLFAST_VECTOR_BYTES)));
  typedef uint32_t narrow __attribute__((vector_size(CELLFAST_VECTOR_BYTES / 2), aligned(4), may_alias));
  typedef uint32_t narrow_value __attribute__((vector_size(CELLFAST_VECTOR_BYTES / 2)));
  const Bits high = Bits{} + static_cast<int32_t>(0xffff0000u), low = Bits{} + 0xffff;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r += 2) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Bits even = rounded<T>(acc[r][v]), odd = rounded<T>(acc[r + 1][v]);
      const Bits of_rows = ((even >> 16) & low) | (odd & high);
      store(out + kTransposedWeights + (row + r) / 2 * kWeightStride + column + v * lanes, reinterpret_cast<Vector<T>>(of_rows));
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side) {
        const wide two = reinterpret_cast<wide>(side ? odd : even);
        const wide of_columns = ((two & 0xffffffffu) >> 16) | ((two >> 32) & 0xffff0000u);
        T* target = out + (row + r + side) * kWeightStride + (column + v * lanes) / 2;
        *reinterpret_cast<narrow*>(target) = __builtin_convertvector(of_columns, narrow_value);
      }
    }
  }
}
#else
template <typename T>
__attribute__((always_inline)) inline void store_weights(const Vector<T> (&acc)[kRows][kVectors], int64_t row, int64_t column, T* out) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store(out + (row + r) * kWeightStride + column + v * kLanes<T>, acc[r][v]);
    }
  }
}
#endif

template <typename T>
void weights(const T* a, const T* b, const Tile& t, const T* inv_sum, T* out) {
  constexpr int lanes = kLanes<T>;
  constexpr int width = kVectors * lanes;
  const T shift = static_cast<T>(t.shift);
  for (int64_t j = t.j0; j < t.j1; j += width) {
    const T* columns = b + (j - t.j0) * t.dim;
    for (int64_t i = t.i0; i < t.i1; i += kRows) {
      const int64_t in_panel = (i - t.i0) % lanes;
      Vector<T> acc[kRows][kVectors];
      dot(a + (i - t.i0 - in_panel) * t.dim + in_panel, columns, t.dim, acc);
      Vector<T> of_column[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        of_column[v] = load(inv_sum + j + v * lanes);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const T of_row = inv_sum[i + r];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          acc[r][v] = exp2_of<T>(acc[r][v] - shift) * (of_column[v] + of_row);
        }
      }
      if (__builtin_expect(is_special(t, i, j, width), 0)) {
        drop_special<T>(t, i, j, acc);
      }
      store_weights<T>(acc, i - t.i0, j - t.j0, out);
    }
  }
}

template <typename T, bool Transposed>
void accumulate(const T* w, const T* values, int64_t rows, int64_t depth, T* out) {
#if CELLFAST_PAIRS
  depth /= 2;
  w += Transposed ? kTransposedWeights : 0;
#endif
  constexpr int lanes = kLanes<T>;
  constexpr int width = 2 * lanes;
  constexpr int64_t along_row = Transposed ? kWeightStride : 1, along_depth = Transposed ? 1 : kWeightStride;
  for (int64_t m = 0; m < rows; m += kOutRows) {
    Vector<T> acc[kOutRows][2];
    T* target = out + m * width;
#pragma GCC unroll 16
    for (int r = 0; r < kOutRows; ++r) {
      acc[r][0] = load(target + r * width);
      acc[r][1] = load(target + r * width + lanes);
    }
    const T* weight = w + m * along_depth;
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
      const Vector<T> v0 = load(values + k * width), v1 = load(values + k * width + lanes);
#pragma GCC unroll 16
      for (int r = 0; r < kOutRows; ++r) {
        acc[r][0] = multiply_add<T>(acc[r][0], weight + k * along_row + r * along_depth, v0);
        acc[r][1] = multiply_add<T>(acc[r][1], weight + k * along_row + r * along_depth, v1);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kOutRows; ++r) {
      store(target + r * width, acc[r][0]);
      store(target + r * width + lanes, acc[r][1]);
    }
  }
}

}  // namespace

#if CELLFAST_PAIRS
const TileKernels<float> kPairs = {CELLFAST_STRING(CELLFAST_KERNELS), kLanes<float>, true, forward<float>, weights<float>,
                                   accumulate<float, false>, accumulate<float, true>};
#else
const TileKernels<float> kFloat = {CELLFAST_STRING(CELLFAST_KERNELS), kLanes<float>, false, forward<float>, weights<float>,
                                   accumulate<float, false>, accumulate<float, true>};
const TileKernels<double> kDouble = {CELLFAST_STRING(CELLFAST_KERNELS), kLanes<double>, false, forward<double>, weights<double>,
                                     accumulate<double, false>, accumulate<double, true>};
#endif

}  // namespace cellfast::ntxent::cpu::CELLFAST_KERNELS
