// The CPU backend: checks, allocation and the parallel schedule. The arithmetic is in tiles.h and, for logits out of float32's reach, in rows.h.
// Contract: ntxent/ntxent.h.
#include "ntxent/ntxent.h"

#include <atomic>
#include <limits>
#include <string>
#include <vector>

#include "ntxent/cpu/rows.h"
#include "ntxent/cpu/tiles.h"

namespace cellfast::ntxent::cpu {
namespace {

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Calls f(T{}) with the type that tensors of this accumulator dtype hold.
template <typename F>
void dispatch(ScalarType accumulator, const F& f) {
  if (accumulator == ScalarType::Double) {
    f(double{});
  } else {
    f(float{});
  }
}

double temperature_of(const Tensor& temperature) {
  check_temperature(temperature);
  return positive_temperature(*data<double>(temperature));
}

Tensor in_accumulator(const Tensor& z) {
  const Tensor dense = torch::stable::contiguous(z);
  const ScalarType accumulator = accumulator_of(z.scalar_type());
  return dense.scalar_type() == accumulator ? dense : torch::stable::to(dense, accumulator);
}

double sum_of(const double* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += values[i];
  }
  return sum;
}

// max |zhat_i|^2 / temperature, an upper bound of |s|; NaN where a value is not finite.
template <typename T>
double largest_logit_of(const T* rows, int64_t num_rows, int64_t dim, double temperature) {
  const int64_t step = std::max<int64_t>(1, (1 << 15) / dim);
  std::vector<double> largest(ceil_div(num_rows, step), 0.0);
  torch::stable::parallel_for(0, static_cast<int64_t>(largest.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t i = part * step; i < std::min((part + 1) * step, num_rows); ++i) {
        const double squares = dot_of(rows + i * dim, rows + i * dim, dim);
        if (!(squares <= largest[part])) {
          largest[part] = std::isfinite(squares) ? squares : std::numeric_limits<double>::quiet_NaN();
          if (!std::isfinite(squares)) {
            break;
          }
        }
      }
    }
  });
  double bound = 0;
  for (const double part : largest) {
    if (std::isnan(part)) {
      return part;
    }
    bound = std::max(bound, part);
  }
  return bound / temperature;
}

std::tuple<Tensor, Tensor> normalize(Tensor z, bool normalize_rows) {
  check_rows(z, "z");
  const int64_t num_rows = z.size(0), dim = z.size(1);
  const Tensor source = in_accumulator(z);
  const ScalarType accumulator = source.scalar_type();
  Tensor zhat = new_tensor(z, {num_rows, dim}, accumulator);
  Tensor inv_norm = new_tensor(z, {num_rows}, accumulator);
  dispatch(accumulator, [&](auto type) {
    using T = decltype(type);
    const T* in = data<T>(source);
    T* out = data<T>(zhat);
    T* inv = data<T>(inv_norm);
    torch::stable::parallel_for(0, num_rows, std::max<int64_t>(1, (1 << 15) / dim), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double norm = std::sqrt(dot_of(in + i * dim, in + i * dim, dim));
        const T scale = normalize_rows ? T(1.0 / std::max(norm, kNormEps)) : T(1);
        inv[i] = normalize_rows && norm < kNormEps ? T(0) : scale;
        // A row with an infinity or a NaN is NaN throughout, as 0 * inf would not be everywhere.
        for (int64_t k = 0; k < dim; ++k) {
          out[i * dim + k] = std::isfinite(norm) ? in[i * dim + k] * scale : std::numeric_limits<T>::quiet_NaN();
        }
      }
    });
  });
  return {zhat, inv_norm};
}

// The kernels for rows that came as `dtype`: bfloat16 rows of one process are multiplied as such where the processor does that faster.
template <typename T>
const TileKernels<T>& kernels_for(ScalarType dtype) {
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == ScalarType::BFloat16 && pair_kernels() != nullptr) {
      return *pair_kernels();
    }
  }
  return tile_kernels<T>();
}

std::tuple<Tensor, Tensor> forward_of(Tensor zhat, Tensor temperature, int64_t index, int64_t count, ScalarType dtype) {
  check_rows(zhat, "zhat");
  const int64_t num_rows = zhat.size(0), dim = zhat.size(1);
  check_shard(num_rows, index, count);
  const double tau = temperature_of(temperature);
  const Tensor source = in_accumulator(zhat);
  const Shard shard{index, count, num_rows};
  Tensor row_loss = new_tensor(zhat, {shard.num_local()}, ScalarType::Double);
  Tensor lse = new_tensor(zhat, {shard.num_local()}, ScalarType::Double);
  dispatch(source.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* rows = data<T>(source);
    const double bound = largest_logit_of(rows, num_rows, dim, tau);
    if (std::isnan(bound)) {
      std::fill_n(data<double>(row_loss), shard.num_local(), std::numeric_limits<double>::quiet_NaN());
      std::fill_n(data<double>(lse), shard.num_local(), std::numeric_limits<double>::quiet_NaN());
      return;
    }
    if (bound <= kLargestLogit && tiles_forward(kernels_for<T>(dtype), rows, dim, tau, shift_of(bound), shard, data<double>(row_loss), data<double>(lse))) {
      return;
    }
    torch::stable::parallel_for(0, ceil_div(shard.num_local(), kRowsPerTask), 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * kRowsPerTask;
        rows_forward(rows, dim, tau, shard, first, std::min(first + kRowsPerTask, shard.num_local()), data<double>(row_loss), data<double>(lse));
      }
    });
  });
  return {row_loss, lse};
}

std::tuple<Tensor, Tensor> backward_of(Tensor grad_loss, Tensor zhat, Tensor inv_norm, Tensor lse, Tensor temperature, bool normalize_rows,
                                       int64_t index, int64_t count, ScalarType dtype, ScalarType kernels_dtype) {
  check_rows(zhat, "zhat");
  const int64_t num_rows = zhat.size(0), dim = zhat.size(1);
  check_shard(num_rows, index, count);
  const Shard shard{index, count, num_rows};
  const int64_t num_local = shard.num_local();
  const double tau = temperature_of(temperature);
  const Tensor source = in_accumulator(zhat);
  const ScalarType accumulator = source.scalar_type();
  check_vector(inv_norm, num_local, accumulator, "inv_norm");
  check_vector(lse, num_rows, ScalarType::Double, "lse");
  if (grad_loss.numel() != 1) {
    fail("grad_loss must be one number, got shape ", shape_of(grad_loss));
  }
  const Tensor inv = torch::stable::contiguous(inv_norm);
  const Tensor lse_dense = torch::stable::contiguous(lse);
  const Tensor upstream = torch::stable::to(grad_loss, ScalarType::Double);
  const double scale = *data<double>(upstream) / (static_cast<double>(num_rows) * tau);
  Tensor grad = new_tensor(zhat, {num_local, dim}, accumulator);
  Tensor grad_temperature = new_tensor(zhat, {}, ScalarType::Double);
  dispatch(accumulator, [&](auto type) {
    using T = decltype(type);
    const T* rows = data<T>(source);
    T* out = data<T>(grad);
    const double bound = largest_logit_of(rows, num_rows, dim, tau);
    if (std::isnan(bound) || !std::isfinite(sum_of(data<double>(lse_dense), num_rows))) {
      std::fill_n(out, num_local * dim, std::numeric_limits<T>::quiet_NaN());
      *data<double>(grad_temperature) = std::numeric_limits<double>::quiet_NaN();
      return;
    }
    const TileKernels<T>& kernels = kernels_for<T>(kernels_dtype);
    const SlicedGradient<T> sliced(kernels, shard, dim);
    const bool in_tiles = bound <= kLargestLogit && tiles_backward(kernels, rows, data<double>(lse_dense), dim, tau, shift_of(bound), shard, sliced);
    const int64_t num_tasks = ceil_div(num_local, kRowsPerTask);
    std::vector<double> alignment(num_tasks, 0.0);
    torch::stable::parallel_for(0, num_tasks, std::max<int64_t>(1, (1 << 14) / (dim * kRowsPerTask)), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * kRowsPerTask, last = std::min(first + kRowsPerTask, num_local);
        if (!in_tiles) {
          rows_backward(rows, data<double>(lse_dense), dim, tau, shard, first, last, out);
        }
        for (int64_t r = first; r < last; ++r) {
          T* row = out + r * dim;
          if (in_tiles) {
            sliced.copy_row(r, row);
            add_positive(rows, data<double>(lse_dense), shard.row(r), num_rows, dim, tau, row);
          }
          const T* unit = rows + shard.row(r) * dim;
          const double along = dot_of(unit, row, dim);
          alignment[task] += along;
          // Through the normalisation: (g - (g . zhat) zhat) / |z|.
          const T factor = T(scale * (normalize_rows ? static_cast<double>(data<T>(inv)[r]) : 1.0)), onto = normalize_rows ? T(along) : T(0);
          for (int64_t k = 0; k < dim; ++k) {
            row[k] = factor * (row[k] - onto * unit[k]);
          }
        }
      }
    });
    double total = 0;
    for (const double a : alignment) {
      total += a;
    }
    *data<double>(grad_temperature) = -scale * total / (2 * tau);
  });
  return {accumulator == dtype ? grad : torch::stable::to(grad, dtype), grad_temperature};
}

// Shards are multiplied as float: the forward pass does not know what their rows came as.
std::tuple<Tensor, Tensor> shard_forward(Tensor zhat, Tensor temperature, int64_t index, int64_t count) {
  return forward_of(zhat, temperature, index, count, ScalarType::Float);
}

std::tuple<Tensor, Tensor> shard_backward(Tensor grad_loss, Tensor zhat, Tensor inv_norm, Tensor lse, Tensor temperature, bool normalize_rows,
                                          int64_t index, int64_t count, ScalarType dtype) {
  return backward_of(grad_loss, zhat, inv_norm, lse, temperature, normalize_rows, index, count, dtype, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor z, Tensor temperature, bool normalize_rows) {
  check_rows(z, "z");
  auto [zhat, inv_norm] = normalize(z, normalize_rows);
  auto [row_loss, lse] = forward_of(zhat, temperature, 0, 1, z.scalar_type());
  Tensor loss = new_tensor(z, {}, zhat.scalar_type());
  double sum = 0;
  for (int64_t i = 0; i < z.size(0); ++i) {
    sum += data<double>(row_loss)[i];
  }
  dispatch(zhat.scalar_type(), [&](auto type) {
    using T = decltype(type);
    *data<T>(loss) = T(sum / static_cast<double>(z.size(0)));
  });
  return {loss, zhat, inv_norm, lse};
}

std::tuple<Tensor, Tensor> backward(Tensor grad_loss, Tensor zhat, Tensor inv_norm, Tensor lse, Tensor temperature, bool normalize_rows,
                                    ScalarType dtype) {
  return backward_of(grad_loss, zhat, inv_norm, lse, temperature, normalize_rows, 0, 1, dtype, dtype);
}

std::string kernels(std::string instruction_set) {
  if (instruction_set == "all" || instruction_set == "supported") {
    return kernel_names(instruction_set == "supported");
  }
  const char* const chosen = choose_kernels(instruction_set.c_str());
  if (chosen == nullptr) {
    fail("instruction_set must be auto, avx512_bf16, avx512, avx2, portable or emulated_bf16, as far as this processor has them, got ", instruction_set);
  }
  return chosen;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellfast, CompositeExplicitAutograd, m) {
  m.impl("ntxent_cpu_kernels", TORCH_BOX(&kernels));
}

STABLE_TORCH_LIBRARY_IMPL(cellfast, CPU, m) {
  m.impl("ntxent_normalize", TORCH_BOX(&normalize));
  m.impl("ntxent_forward", TORCH_BOX(&forward));
  m.impl("ntxent_backward", TORCH_BOX(&backward));
  m.impl("ntxent_shard_forward", TORCH_BOX(&shard_forward));
  m.impl("ntxent_shard_backward", TORCH_BOX(&shard_backward));
}

}  // namespace cellfast::ntxent::cpu
