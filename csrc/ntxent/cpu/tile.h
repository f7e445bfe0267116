// What one tile of the similarity matrix is, and what an instruction set's kernels must offer. Nothing here is compiled for a
// particular instruction set: the kernels are in tile_kernels.h, compiled once per instruction set.
//
// Formats (T = float or double; P = lanes of a vector; rows padded with zeros to a multiple of kRowStep):
//   panels  [row / P][k][row % P]     zhat * sqrt(log2(e) / temperature): the product of two is an exponent of 2
//   slices  [k / S][row][k % S]       zhat (values) or its gradient, S = 2 P columns side by side
// Kernels of pairs have two bfloat16 in a float's place, the even one in its lower half: panels [row / P][k / 2][row % P] of columns
// k, k + 1 (dim is then half), values [k / S][row / 2][k % S] of rows row, row + 1. Sums, exponentials and gradients are float all the same.
#pragma once

#include <cstdint>
#include <string>

namespace cellfast::ntxent::cpu {

constexpr int64_t kRowStep = 48;    // every instruction set's register tile divides it
constexpr int64_t kLargestBlock = 192;
// Odd in cache lines of 64 bytes for float, so that a column of weights does not fall into a few sets of the cache.
constexpr int64_t kWeightStride = kLargestBlock + 16;
constexpr int64_t kTransposedWeights = kLargestBlock * kWeightStride;  // where kernels of pairs keep the weights in pairs of rows
constexpr int64_t kWeights = kTransposedWeights + kLargestBlock / 2 * kWeightStride;

// Rows [i0, i1) against columns [j0, j1) of the num_rows x num_rows similarities; i0 and j0 begin panels of `a` and `b`.
// Exponentials are taken of s - shift, so that the largest logit does not overflow; 2^-126 stands for anything smaller.
struct Tile {
  int64_t i0, i1, j0, j1, dim, num_rows;
  double shift;  // in powers of 2
};

template <typename T>
struct TileKernels {
  const char* name;
  int64_t lanes;
  bool pairs;
  // row_sums[r * lanes + l], column_sums[c]: sums of exp(s - shift) without self and positive pairs, added to what is there;
  // column_sums may be null.
  void (*forward)(const T* a, const T* b, const Tile& tile, T* row_sums, T* column_sums);
  // weights[r * kWeightStride + c] = exp(s - lse_i) + exp(s - lse_j), 0 for self and positive pairs;
  // inv_sum[i] = exp(shift - lse_i), by global index, zero-padded.
  void (*weights)(const T* a, const T* b, const Tile& tile, const T* inv_sum, T* weights);
  // out[m][:] += sum_k weights[m][k] values[k][:], or with weights[k][m]; one slice of 2 * lanes columns; m < rows, k < depth.
  void (*accumulate)(const T* weights, const T* values, int64_t rows, int64_t depth, T* out);
  void (*accumulate_transposed)(const T* weights, const T* values, int64_t rows, int64_t depth, T* out);
};

// The fastest kernels this processor runs, or those named by choose_kernels.
template <typename T>
const TileKernels<T>& tile_kernels();

// The kernels for bfloat16 rows, or null where this processor multiplies them no faster than float.
const TileKernels<float>* pair_kernels();

// "avx512_bf16", "avx512", "avx2", "portable", "emulated_bf16" (portable kernels of pairs, for tests), "auto" (the best this processor runs)
// or "" (no change): what is in use then. Null where this processor does not run what is asked for.
const char* choose_kernels(const char* instruction_set);

// The sets of kernels by name, separated by commas, slowest first: all there are, or those this processor runs.
std::string kernel_names(bool supported_only);

namespace avx512 {
extern const TileKernels<float> kFloat;
extern const TileKernels<double> kDouble;
}  // namespace avx512
namespace avx512_bf16 {
extern const TileKernels<float> kPairs;
}  // namespace avx512_bf16
namespace emulated_bf16 {
extern const TileKernels<float> kPairs;
}  // namespace emulated_bf16
namespace avx2 {
extern const TileKernels<float> kFloat;
extern const TileKernels<double> kDouble;
}  // namespace avx2
namespace portable {
extern const TileKernels<float> kFloat;
extern const TileKernels<double> kDouble;
}  // namespace portable

}  // namespace cellfast::ntxent::cpu
