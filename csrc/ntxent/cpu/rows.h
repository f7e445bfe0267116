// Row-owner NT-Xent: each row of a shard meets all rows. Twice the work of the symmetric tiles (tiles.h) but free of any bound on the logits,
// and the only form that serves a shard. Exponents are taken relative to a running maximum per row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "ntxent/schedule.h"

namespace cellfast::ntxent::cpu {

struct Shard {
  int64_t index = 0;
  int64_t count = 1;
  int64_t num_rows = 0;  // of all shards
  int64_t row(int64_t local) const { return shard_row(local, index, count, num_rows); }
  int64_t num_local() const { return num_rows / count; }
};

constexpr int64_t kRowsPerTask = 16;
constexpr int64_t kColumnsPerPanel = 64;

// panel[k][c] = zhat[first + c][k], zero beyond the last row: columns side by side so that the inner loop runs over them.
template <typename T>
void pack_columns(const T* zhat, int64_t num_rows, int64_t dim, int64_t first, T* panel) {
  const int64_t valid = std::min(kColumnsPerPanel, num_rows - first);
  for (int64_t c = 0; c < kColumnsPerPanel; ++c) {
    for (int64_t k = 0; k < dim; ++k) {
      panel[k * kColumnsPerPanel + c] = c < valid ? zhat[(first + c) * dim + k] : T(0);
    }
  }
}

template <typename T>
void dot_columns(const T* row, const T* panel, int64_t dim, T inv_temperature, T* logits) {
  T sum[kColumnsPerPanel] = {};
  for (int64_t k = 0; k < dim; ++k) {
    const T a = row[k];
    const T* b = panel + k * kColumnsPerPanel;
    for (int64_t c = 0; c < kColumnsPerPanel; ++c) {
      sum[c] += a * b[c];
    }
  }
  for (int64_t c = 0; c < kColumnsPerPanel; ++c) {
    logits[c] = sum[c] * inv_temperature;
  }
}

// Local rows [begin, end): row_loss = lse - positive logit, written as log1p so that it is never negative and never cancels.
template <typename T>
void rows_forward(const T* zhat, int64_t dim, double temperature, const Shard& shard, int64_t begin, int64_t end, double* row_loss,
                  double* lse) {
  const int64_t count = end - begin;
  std::vector<T> panel(dim * kColumnsPerPanel);
  std::vector<T> largest(count, -std::numeric_limits<T>::infinity());
  std::vector<double> others(count, 0.0);
  std::vector<T> positive(count, T(0));
  const T inv_temperature = T(1.0 / temperature);
  for (int64_t first = 0; first < shard.num_rows; first += kColumnsPerPanel) {
    pack_columns(zhat, shard.num_rows, dim, first, panel.data());
    const int64_t valid = std::min(kColumnsPerPanel, shard.num_rows - first);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = shard.row(begin + r);
      T s[kColumnsPerPanel];
      dot_columns(zhat + i * dim, panel.data(), dim, inv_temperature, s);
      const int64_t self = i - first;
      const int64_t pair = positive_of(i, shard.num_rows) - first;
      if (pair >= 0 && pair < valid) {
        positive[r] = s[pair];
        s[pair] = -std::numeric_limits<T>::infinity();
      }
      if (self >= 0 && self < valid) {
        s[self] = -std::numeric_limits<T>::infinity();
      }
      T top = largest[r];
      for (int64_t c = 0; c < valid; ++c) {
        top = std::max(top, s[c]);
      }
      if (top == -std::numeric_limits<T>::infinity()) {
        continue;
      }
      if (top > largest[r]) {
        others[r] *= std::exp(static_cast<double>(largest[r]) - static_cast<double>(top));
        largest[r] = top;
      }
      double sum = 0;
      for (int64_t c = 0; c < valid; ++c) {
        sum += std::exp(s[c] - top);
      }
      others[r] += sum;
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const double gap = static_cast<double>(largest[r]) - static_cast<double>(positive[r]);
    double loss = 0;  // no negatives at all: N = 1
    if (others[r] > 0) {
      loss = gap < 0 ? std::log1p(others[r] * std::exp(gap)) : gap + std::log(others[r] + std::exp(-gap));
    }
    row_loss[begin + r] = loss;
    lse[begin + r] = static_cast<double>(positive[r]) + loss;
  }
}

// grad [rows of the shard, dim]: dloss/dzhat times M * temperature for local rows [begin, end).
template <typename T>
void rows_backward(const T* zhat, const double* lse, int64_t dim, double temperature, const Shard& shard, int64_t begin, int64_t end, T* grad) {
  const int64_t count = end - begin;
  std::vector<T> panel(dim * kColumnsPerPanel);
  std::fill(grad + begin * dim, grad + end * dim, T(0));
  const T inv_temperature = T(1.0 / temperature);
  for (int64_t first = 0; first < shard.num_rows; first += kColumnsPerPanel) {
    pack_columns(zhat, shard.num_rows, dim, first, panel.data());
    const int64_t valid = std::min(kColumnsPerPanel, shard.num_rows - first);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = shard.row(begin + r);
      T s[kColumnsPerPanel];
      dot_columns(zhat + i * dim, panel.data(), dim, inv_temperature, s);
      const int64_t self = i - first;
      const int64_t pair = positive_of(i, shard.num_rows) - first;
      for (int64_t c = 0; c < valid; ++c) {
        const double row_part = static_cast<double>(s[c]) - lse[i];
        const double column_part = static_cast<double>(s[c]) - lse[first + c];
        T weight;
        if (c == self) {
          weight = T(0);
        } else if (c == pair) {
          // P + P - 2 without the cancellation at P near 1.
          weight = T(std::expm1(row_part) + std::expm1(column_part));
        } else {
          weight = std::exp(T(row_part)) + std::exp(T(column_part));
        }
        T* out = grad + (begin + r) * dim;
        const T* other = zhat + (first + c) * dim;
        for (int64_t k = 0; k < dim; ++k) {
          out[k] += weight * other[k];
        }
      }
    }
  }
}

}  // namespace cellfast::ntxent::cpu
