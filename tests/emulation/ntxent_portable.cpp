// The kernels of csrc/ntxent/cuda/portable.cuh compiled for the CPU and reached from tests/test_ntxent_schedule.py by ctypes.
#include "ntxent/cuda/portable.cuh"

using namespace cellfast::ntxent::cuda;
namespace {

template <typename S>
void run(const S* zhat, int64_t num_rows, int64_t dim, int64_t shard, int64_t shards, double temperature, const double* all_lse, const S* inv_norm,
         int normalize, double* row_loss, double* lse, S* grad, double* alignment) {
  const Shard rows{shard, shards, num_rows};
  const double one = 1.0;
  const int blocks = static_cast<int>((rows.num_local() + portable::kRows - 1) / portable::kRows);
  for (int b = 0; b < blocks; ++b) {
    emulation::run_block(b, blocks, 7, true, [&] { portable::forward_kernel<S>(zhat, dim, &temperature, rows, row_loss, lse); },
                         portable::kThreads);
    emulation::run_block(b, blocks, 7, true, [&] {
      portable::backward_kernel<S>(&one, zhat, inv_norm, all_lse, dim, &temperature, rows, normalize != 0, grad, alignment);
    }, portable::kThreads);
  }
}

}  // namespace

extern "C" {

const char* failure() {
  const char* what = emulation::failure;
  emulation::failure = nullptr;
  return what;
}

void run_float(const float* zhat, int64_t num_rows, int64_t dim, int64_t shard, int64_t shards, double temperature, const double* all_lse,
               const float* inv_norm, int normalize, double* row_loss, double* lse, float* grad, double* alignment) {
  run(zhat, num_rows, dim, shard, shards, temperature, all_lse, inv_norm, normalize, row_loss, lse, grad, alignment);
}

void run_double(const double* zhat, int64_t num_rows, int64_t dim, int64_t shard, int64_t shards, double temperature, const double* all_lse,
                const double* inv_norm, int normalize, double* row_loss, double* lse, double* grad, double* alignment) {
  run(zhat, num_rows, dim, shard, shards, temperature, all_lse, inv_norm, normalize, row_loss, lse, grad, alignment);
}
}
