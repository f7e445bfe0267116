// NT-Xent in tiles: each tile of similarities is made, exponentiated and summed while it is in the cache, and never stored. One process meets
// the upper triangle only (0.5 + 1.5 products of M x M x D forward and backward); a shard meets all columns of its rows.
// Exponents are taken relative to one shift for all rows; where a row lies too far below it, tiles_* say so and rows.h serves instead.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>

#include "ntxent/cpu/rows.h"
#include "ntxent/cpu/tile.h"

namespace cellfast::ntxent::cpu {

// exp(60) summed over 10^7 columns is an ordinary float32 number.
constexpr double kLargestExponent = 60.0;
// A row's sum is exact to 1e-10 as long as it is above this: what is smaller than 2^-126 was counted as 2^-126.
constexpr double kSmallestSum = 0x1p-70;
// Beyond this the rounding of a logit in float32 is all that is left of it; it is also far from overflow.
constexpr double kLargestLogit = 1e4;
constexpr double kLn2 = 0.693147180559945309417;

// What the exponents are relative to, in nats, given a bound on |s|.
inline double shift_of(double largest_logit) {
  return std::max(0.0, largest_logit - kLargestExponent);
}

// Depends on the number of rows only: results do not depend on the number of threads.
inline int64_t block_of(int64_t num_rows) {
  return num_rows >= 4096 ? kLargestBlock : num_rows >= 1024 ? kLargestBlock / 2 : kRowStep;
}

inline int64_t padded(int64_t num_rows) {
  return ceil_div(num_rows, kRowStep) * kRowStep;
}

// Uninitialised memory, aligned to cache lines: large buffers are written by the threads that use them. Buffers of many pages ask for huge
// ones: the tiles walk through more 4 KB pages than a processor keeps translations for.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : alignment_(sizeof(T) * static_cast<size_t>(size) >= 2 * kHugePage ? kHugePage : 64) {
    const size_t bytes = sizeof(T) * static_cast<size_t>(size);
    data_ = static_cast<T*>(::operator new(bytes, std::align_val_t{alignment_}));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (alignment_ == kHugePage) {
      madvise(data_, bytes, MADV_HUGEPAGE);  // advice only: without it the result is the same
    }
#endif
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t{alignment_}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr size_t kHugePage = size_t{1} << 21;
  size_t alignment_;
  T* data_;
};

// Runs work(scratch of the worker, task) for every task below num_tasks, each worker taking the next when it is done with one.
template <typename Scratch, typename Work>
void share_out(int64_t num_tasks, std::vector<Scratch>& scratch, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(num_tasks, static_cast<int64_t>(scratch.size()));
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task = next.fetch_add(1); task < num_tasks; task = next.fetch_add(1)) {
        work(scratch[worker], task);
      }
    }
  });
}

// In double, in eight sums side by side: one sum waits for every addition.
template <typename T>
double dot_of(const T* a, const T* b, int64_t dim) {
  double lanes[8] = {};
  int64_t k = 0;
  for (; k + 8 <= dim; k += 8) {
    for (int l = 0; l < 8; ++l) {
      lanes[l] += static_cast<double>(a[k + l]) * static_cast<double>(b[k + l]);
    }
  }
  for (; k < dim; ++k) {
    lanes[0] += static_cast<double>(a[k]) * static_cast<double>(b[k]);
  }
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// s_{i,p(i)}, in double: the loss of a hard positive is the small rest of s and lse.
template <typename T>
double positive_logit(const T* zhat, int64_t i, int64_t num_rows, int64_t dim, double temperature) {
  return dot_of(zhat + i * dim, zhat + positive_of(i, num_rows) * dim, dim) / temperature;
}

// Row i's gradient gains the positive pair's: P + P - 2 of it, without the cancellation at P near 1, added last, where it is not
// rounded again with every other term.
template <typename T>
void add_positive(const T* zhat, const double* lse, int64_t i, int64_t num_rows, int64_t dim, double temperature, T* row) {
  const int64_t other = positive_of(i, num_rows);
  const double s = positive_logit(zhat, i, num_rows, dim, temperature);
  const T weight = T(std::expm1(s - lse[i]) + std::expm1(s - lse[other]));
  for (int64_t k = 0; k < dim; ++k) {
    row[k] += weight * zhat[other * dim + k];
  }
}

// Two numbers as bfloat16, rounded to the nearest, in a float's place.
inline float pair_of(float even, float odd) {
  const auto rounded = [](float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return bits + 0x7fff + ((bits >> 16) & 1);
  };
  return std::bit_cast<float>((rounded(even) >> 16) | (rounded(odd) & 0xffff0000u));
}

// Columns of a row in the kernels' format.
template <typename T>
int64_t packed_dim(const TileKernels<T>& kernels, int64_t dim) {
  return kernels.pairs ? ceil_div(dim, 2) : dim;
}

// Rows [first, last) of zhat as panels, scaled so that a product of two is the base-2 exponent of a pair.
template <typename T>
void pack_panels(const TileKernels<T>& kernels, const T* zhat, int64_t first, int64_t last, int64_t dim, double temperature, T* panels) {
  const T scale = T(std::sqrt(1.4426950408889634074 / temperature));
  const int64_t lanes = kernels.lanes, packed = packed_dim(kernels, dim);
  torch::stable::parallel_for(0, padded(last - first) / lanes, std::max<int64_t>(1, (1 << 14) / (lanes * dim)), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      T* panel = panels + p * lanes * packed;
      const int64_t row = first + p * lanes, valid = std::clamp<int64_t>(last - row, 0, lanes);
      if (valid < lanes) {
        std::fill_n(panel, lanes * packed, T(0));
      }
      if constexpr (std::is_same_v<T, float>) {
        if (kernels.pairs) {
          for (int64_t k = 0; k < packed; ++k) {
            for (int64_t l = 0; l < valid; ++l) {
              const float* pair = zhat + (row + l) * dim + 2 * k;
              panel[k * lanes + l] = pair_of(scale * pair[0], 2 * k + 1 < dim ? scale * pair[1] : 0.0f);
            }
          }
          continue;
        }
      }
      for (int64_t k = 0; k < dim; ++k) {
        for (int64_t l = 0; l < valid; ++l) {
          panel[k * lanes + l] = scale * zhat[(row + l) * dim + k];
        }
      }
    }
  });
}

// zhat as slices, rows padded.
template <typename T>
void pack_values(const TileKernels<T>& kernels, const T* zhat, int64_t num_rows, int64_t dim, T* values) {
  const int64_t per_row = kernels.pairs ? 2 : 1, rows = padded(num_rows) / per_row, width = 2 * kernels.lanes;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, (1 << 14) / dim), [&](int64_t begin, int64_t end) {
    for (int64_t s = 0; s * width < dim; ++s) {
      const int64_t valid = std::min(width, dim - s * width);
      for (int64_t i = begin; i < end; ++i) {
        T* out = values + (s * rows + i) * width;
        const T* in = zhat + i * per_row * dim + s * width;
        for (int64_t c = 0; c < width; ++c) {
          if (i * per_row >= num_rows || c >= valid) {
            out[c] = T(0);
          } else if (per_row == 1) {
            out[c] = in[c];
          } else if constexpr (std::is_same_v<T, float>) {
            out[c] = pair_of(in[c], in[dim + c]);  // num_rows is even
          }
        }
      }
    }
  });
}

// One contiguous range of global rows that a shard owns; a whole minibatch is one range.
struct Strip {
  int64_t first, last, local;  // local: the strip's first row within the shard
};

inline std::vector<Strip> strips_of(const Shard& shard) {
  if (shard.count == 1) {
    return {{0, shard.num_rows, 0}};
  }
  const int64_t per_view = shard.num_local() / 2, half = shard.num_rows / 2, begin = shard.index * per_view;
  return {{begin, begin + per_view, 0}, {half + begin, half + begin + per_view, per_view}};
}

template <typename T>
struct ForwardScratch {
  std::vector<T> row_sums, column_sums;
  explicit ForwardScratch(int64_t lanes) : row_sums(kLargestBlock * lanes), column_sums(kLargestBlock) {}
};

template <typename T>
void add_row_sums(const T* lanes_of_rows, int64_t rows, int64_t lanes, double* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    T even = 0, odd = 0;
    for (int64_t l = 0; l < lanes; l += 2) {
      even += lanes_of_rows[r * lanes + l];
      odd += lanes_of_rows[r * lanes + l + 1];
    }
    sums[r] += static_cast<double>(even) + static_cast<double>(odd);
  }
}

// row_loss and lse of the shard's rows; false where a row's sum is below what float32 holds relative to the shift.
template <typename T>
bool tiles_forward(const TileKernels<T>& kernels, const T* zhat, int64_t dim, double temperature, double shift, const Shard& shard,
                   double* row_loss, double* lse) {
  const int64_t num_rows = shard.num_rows, block = block_of(num_rows), num_blocks = ceil_div(num_rows, block), lanes = kernels.lanes;
  const int64_t packed = packed_dim(kernels, dim);
  Buffer<T> panels(padded(num_rows) * packed);
  pack_panels(kernels, zhat, 0, num_rows, dim, temperature, panels.get());
  std::vector<double> others(num_rows, 0.0);
  std::vector<ForwardScratch<T>> scratch(torch::stable::get_num_threads(), ForwardScratch<T>(lanes));
  const auto tile_of = [&](int64_t i0, int64_t i1, int64_t column_block) {
    return Tile{i0, i1, column_block * block, std::min((column_block + 1) * block, num_rows), packed, num_rows, shift / kLn2};
  };
  if (shard.count == 1) {
    for (int64_t round = 0; round < num_blocks; ++round) {
      share_out(pairs_in_round(num_blocks, round), scratch, [&](ForwardScratch<T>& mine, int64_t slot) {
        const BlockPair pair = pair_of_round(num_blocks, round, slot);
        const Tile tile = tile_of(pair.first * block, std::min((pair.first + 1) * block, num_rows), pair.second);
        const bool off_diagonal = pair.first != pair.second;
        std::fill(mine.row_sums.begin(), mine.row_sums.end(), T(0));
        std::fill(mine.column_sums.begin(), mine.column_sums.end(), T(0));
        kernels.forward(panels.get() + tile.i0 * packed, panels.get() + tile.j0 * packed, tile, mine.row_sums.data(),
                        off_diagonal ? mine.column_sums.data() : nullptr);
        add_row_sums(mine.row_sums.data(), tile.i1 - tile.i0, lanes, others.data() + tile.i0);
        if (off_diagonal) {
          for (int64_t c = 0; c < tile.j1 - tile.j0; ++c) {
            others[tile.j0 + c] += static_cast<double>(mine.column_sums[c]);
          }
        }
      });
    }
  } else {
    for (const Strip& strip : strips_of(shard)) {
      Buffer<T> own(padded(strip.last - strip.first) * packed);
      pack_panels(kernels, zhat, strip.first, strip.last, dim, temperature, own.get());
      share_out(ceil_div(strip.last - strip.first, block), scratch, [&](ForwardScratch<T>& mine, int64_t task) {
        const int64_t i0 = strip.first + task * block, i1 = std::min(i0 + block, strip.last);
        for (int64_t column_block = 0; column_block < num_blocks; ++column_block) {
          const Tile tile = tile_of(i0, i1, column_block);
          std::fill(mine.row_sums.begin(), mine.row_sums.end(), T(0));
          kernels.forward(own.get() + task * block * packed, panels.get() + tile.j0 * packed, tile, mine.row_sums.data(), nullptr);
          add_row_sums(mine.row_sums.data(), i1 - i0, lanes, others.data() + i0);
        }
      });
    }
  }
  for (const Strip& strip : strips_of(shard)) {
    for (int64_t i = strip.first; i < strip.last; ++i) {
      if (others[i] < kSmallestSum && num_rows > 2) {
        return false;
      }
      const double s = positive_logit(zhat, i, num_rows, dim, temperature), gap = shift - s;
      const double loss = gap > 30 && num_rows > 2 ? gap + std::log(others[i] + std::exp(-gap)) : std::log1p(others[i] * std::exp(gap));
      row_loss[strip.local + i - strip.first] = loss;
      lse[strip.local + i - strip.first] = s + loss;
    }
  }
  return true;
}

// The gradient before the Jacobian and without the positive pairs, as slices: [slice][row of the shard, each strip padded][2 * lanes].
template <typename T>
class SlicedGradient {
 public:
  SlicedGradient(const TileKernels<T>& kernels, const Shard& shard, int64_t dim)
      : dim_(dim), width_(2 * kernels.lanes), num_slices_(ceil_div(dim, width_)), per_strip_(strips_of(shard)[0].last - strips_of(shard)[0].first),
        rows_(padded(per_strip_) * static_cast<int64_t>(strips_of(shard).size())), values_(num_slices_ * rows_ * width_) {
    torch::stable::parallel_for(0, num_slices_ * rows_, 1 << 10, [&](int64_t begin, int64_t end) {
      std::fill(values_.get() + begin * width_, values_.get() + end * width_, T(0));
    });
  }
  int64_t num_slices() const { return num_slices_; }
  T* slice(int64_t s, int64_t padded_row) const { return values_.get() + (s * rows_ + padded_row) * width_; }
  void copy_row(int64_t local, T* out) const {
    const int64_t strip = local / per_strip_, row = strip * padded(per_strip_) + local - strip * per_strip_;
    for (int64_t s = 0; s < num_slices_; ++s) {
      std::copy_n(slice(s, row), std::min(width_, dim_ - s * width_), out + s * width_);
    }
  }

 private:
  int64_t dim_, width_, num_slices_, per_strip_, rows_;
  Buffer<T> values_;
};

// False where a row's lse is below what float32 holds relative to the shift.
template <typename T>
bool tiles_backward(const TileKernels<T>& kernels, const T* zhat, const double* lse, int64_t dim, double temperature, double shift,
                    const Shard& shard, const SlicedGradient<T>& out) {
  const int64_t num_rows = shard.num_rows, block = block_of(num_rows), num_blocks = ceil_div(num_rows, block), lanes = kernels.lanes;
  const int64_t rows = padded(num_rows), width = 2 * lanes, num_slices = ceil_div(dim, width), packed = packed_dim(kernels, dim);
  const int64_t per_row = kernels.pairs ? 2 : 1;
  Buffer<T> panels(rows * packed), values(num_slices * rows / per_row * width);
  pack_panels(kernels, zhat, 0, num_rows, dim, temperature, panels.get());
  pack_values(kernels, zhat, num_rows, dim, values.get());
  const auto value = [&](int64_t slice, int64_t row) { return values.get() + (slice * rows + row) / per_row * width; };
  // Register tiles may look a little past the last row.
  std::vector<T> inv_sum(rows + kRowStep, T(0));
  for (int64_t i = 0; i < num_rows; ++i) {
    if (std::exp(lse[i] - shift) < kSmallestSum && num_rows > 2) {
      return false;
    }
    inv_sum[i] = T(std::exp(shift - lse[i]));
  }
  std::vector<std::vector<T>> scratch(torch::stable::get_num_threads(), std::vector<T>(kWeights));
  const auto tile_of = [&](int64_t i0, int64_t i1, int64_t column_block) {
    return Tile{i0, i1, column_block * block, std::min((column_block + 1) * block, num_rows), packed, num_rows, shift / kLn2};
  };
  if (shard.count == 1) {
    for (int64_t round = 0; round < num_blocks; ++round) {
      share_out(pairs_in_round(num_blocks, round), scratch, [&](std::vector<T>& mine, int64_t slot) {
        const BlockPair pair = pair_of_round(num_blocks, round, slot);
        const Tile tile = tile_of(pair.first * block, std::min((pair.first + 1) * block, num_rows), pair.second);
        const int64_t height = tile.i1 - tile.i0, breadth = tile.j1 - tile.j0;
        kernels.weights(panels.get() + tile.i0 * packed, panels.get() + tile.j0 * packed, tile, inv_sum.data(), mine.data());
        for (int64_t s = 0; s < num_slices; ++s) {
          kernels.accumulate(mine.data(), value(s, tile.j0), height, breadth, out.slice(s, tile.i0));
          if (pair.first != pair.second) {
            kernels.accumulate_transposed(mine.data(), value(s, tile.i0), breadth, height, out.slice(s, tile.j0));
          }
        }
      });
    }
    return true;
  }
  int64_t out_first = 0;
  for (const Strip& strip : strips_of(shard)) {
    Buffer<T> own(padded(strip.last - strip.first) * packed);
    pack_panels(kernels, zhat, strip.first, strip.last, dim, temperature, own.get());
    share_out(ceil_div(strip.last - strip.first, block), scratch, [&](std::vector<T>& mine, int64_t task) {
      const int64_t i0 = strip.first + task * block, i1 = std::min(i0 + block, strip.last);
      for (int64_t column_block = 0; column_block < num_blocks; ++column_block) {
        const Tile tile = tile_of(i0, i1, column_block);
        kernels.weights(own.get() + task * block * packed, panels.get() + tile.j0 * packed, tile, inv_sum.data(), mine.data());
        for (int64_t s = 0; s < num_slices; ++s) {
          kernels.accumulate(mine.data(), value(s, tile.j0), i1 - i0, tile.j1 - tile.j0,
                             out.slice(s, out_first + task * block));
        }
      }
    });
    out_first += padded(strip.last - strip.first);
  }
  return true;
}

}  // namespace cellfast::ntxent::cpu
