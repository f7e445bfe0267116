// The kernels of csrc/ntxent/cuda/sm90 and their index logic, compiled for the CPU and reached from tests/test_ntxent_schedule.py by ctypes.
#include "ntxent/cuda/sm90/forward.cuh"
#include "ntxent/cuda/sm90/backward.cuh"

using namespace cellfast::ntxent::sm90;
namespace ntxent = cellfast::ntxent;

namespace {

CUtensorMap map_of(const uint16_t* zhat, int64_t rows, int64_t dim, int64_t stride, int box_rows) {
  return {zhat, rows, dim, stride, box_rows};
}

template <int kDim>
void run_backward(const uint16_t* zhat, int64_t dim, int64_t stride, BackwardArguments& a, int workers, unsigned int seed, bool eager) {
  const CUtensorMap row_map = map_of(zhat, a.rows.num_rows, dim, stride, kRowBox);
  const CUtensorMap column_map = map_of(zhat, a.rows.num_rows, dim, stride, backward_shape(kDim).columns);
  for (int w = 0; w < workers; ++w) {
    std::memset(raw, 0xFF, sizeof(raw));
    emulation::run_block(w, workers, seed, eager, [&] { backward_kernel<Bfloat16, kDim>(row_map, column_map, a); }, kThreads);
  }
}

}  // namespace

extern "C" {

// What went wrong since the last call of this function, or null.
const char* failure() {
  const char* what = emulation::failure;
  emulation::failure = nullptr;
  return what;
}

int forward_workers(int64_t num_rows, int64_t dim, int64_t shard, int64_t shards, int multiprocessors) {
  const RowBlocks rows = row_blocks(num_rows, shard, shards, forward_shape(dim).row_tile);
  return forward_tiles(rows, dim, multiprocessors).workers;
}

int64_t forward_places(int64_t num_rows, int64_t dim, int64_t shard, int64_t shards) {
  return row_blocks(num_rows, shard, shards, forward_shape(dim).row_tile).padded_rows();
}

// out: row tile, column tile, row blocks, column blocks, tiles of the longest and of the shortest worker, tiles with loaded rows; counts
// [row blocks, column blocks]: how often each tile is visited. `phase` 0 keeps the schedule's own.
void forward_visits(int64_t num_rows, int64_t dim, int64_t shard, int64_t shards, int multiprocessors, int phase, int64_t* out, uint8_t* counts) {
  const RowBlocks rows = row_blocks(num_rows, shard, shards, forward_shape(dim).row_tile);
  ForwardTiles tiles = forward_tiles(rows, dim, multiprocessors);
  if (phase > 0) {
    tiles.phase = phase;
  }
  int64_t longest = 0, shortest = INT64_MAX, loads = 0;
  for (int w = 0; w < tiles.workers; ++w) {
    ForwardWalk walk(tiles, w);
    ForwardTile tile;
    int64_t length = 0;
    int row_block = -1;
    bool ended = true;
    while (walk.next(tile)) {
      // A run has one row block, begins once and ends once.
      if (tile.begins != ended || (!tile.begins && tile.row_block != row_block)) {
        emulation::stop("a run of tiles is broken");
      }
      ended = tile.ends;
      row_block = tile.row_block;
      loads += tile.begins;
      ++length;
      if (counts != nullptr) {
        ++counts[static_cast<int64_t>(tile.row_block) * tiles.column_blocks + tile.column_block];
      }
    }
    if (!ended) {
      emulation::stop("a run of tiles does not end");
    }
    longest = length > longest ? length : longest;
    shortest = length < shortest ? length : shortest;
  }
  const int64_t values[] = {rows.tile, kForwardColumns, tiles.row_blocks, tiles.column_blocks, longest, shortest, loads};
  std::memcpy(out, values, sizeof(values));
}

void row_block_table(int64_t num_rows, int64_t shard, int64_t shards, int tile, int64_t* out) {  // [blocks, 3]: local, global, valid
  const RowBlocks rows = row_blocks(num_rows, shard, shards, tile);
  for (int b = 0; b < rows.count(); ++b) {
    out[3 * b] = rows.local(b);
    out[3 * b + 1] = rows.global(b);
    out[3 * b + 2] = rows.valid(b);
  }
}

int special(int first_row, int valid, int row_tile, int first_column, int columns, int num_rows) {
  return is_special(first_row, valid, row_tile, first_column, columns, num_rows);
}

void swizzled(uint32_t* out, int count) {
  for (int i = 0; i < count; ++i) {
    out[i] = swizzle_128(static_cast<uint32_t>(i));
  }
}

// [threads of a warpgroup, registers, 2] and, of a 128-column tile, the columns each lane ends up with [32, 4].
void accumulator_layout(int registers, int32_t* out) {
  for (int t = 0; t < 128; ++t) {
    for (int r = 0; r < registers; ++r) {
      *out++ = accumulator_row(t, r);
      *out++ = accumulator_column(t, r);
    }
  }
}
void reduced_columns(int32_t* out) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      *out++ = reduced_column(lane, i);
    }
  }
}

void shared_bytes(int64_t dim, int64_t* out) {  // forward, its ring depth, backward, its ring depth
  const ForwardShape forward = forward_shape(dim);
  const BackwardShape backward = backward_shape(dim);
  const int64_t values[] = {forward.bytes() + 1024, forward.stages, backward.bytes() + 1024, backward.stages};
  std::memcpy(out, values, sizeof(values));
}

int splits(int64_t row_blocks_count, int64_t tiles, int64_t multiprocessors, int64_t most, int64_t* begins) {
  const int count = backward_splits(row_blocks_count, tiles, multiprocessors, most);
  for (int s = 0; s <= count; ++s) {
    begins[s] = split_begin(static_cast<int>(tiles), s, count);
  }
  return count;
}

// sums [workers, places], zero at the start; positives [local rows]. Returns the two numbers of Exponent in `exponent`.
void forward(const uint16_t* zhat, int64_t num_rows, int64_t dim, int64_t stride, int64_t shard, int64_t shards, double temperature,
             int multiprocessors, int phase, unsigned int seed, int eager, float* sums, float* positives, float* exponent) {
  ForwardArguments a{};
  a.shape = forward_shape(dim);
  a.rows = row_blocks(num_rows, shard, shards, a.shape.row_tile);
  a.tiles = forward_tiles(a.rows, dim, multiprocessors);
  if (phase > 0) {
    a.tiles.phase = phase;
  }
  a.temperature = &temperature;
  a.sums = sums;
  a.sums_stride = a.rows.padded_rows();
  a.positives = positives;
  const CUtensorMap row_map = map_of(zhat, num_rows, dim, stride, kRowBox), column_map = map_of(zhat, num_rows, dim, stride, kForwardColumns);
  for (int w = 0; w < a.tiles.workers; ++w) {
    std::memset(raw, 0xFF, sizeof(raw));
    emulation::run_block(w, a.tiles.workers, seed, eager != 0, [&] {
      if (a.shape.row_tile == 256) {
        forward_kernel<Bfloat16, 2>(row_map, column_map, a);
      } else {
        forward_kernel<Bfloat16, 1>(row_map, column_map, a);
      }
    }, kThreads);
  }
  exponent[0] = exponent_of(temperature).scale;
  exponent[1] = exponent_of(temperature).shift;
}

int64_t padded_place(int64_t num_rows, int64_t dim, int64_t shard, int64_t shards, int64_t row) {
  return row_blocks(num_rows, shard, shards, forward_shape(dim).row_tile).padded(static_cast<int>(row));
}

double loss_of(double sum, double shift, double positive) {
  return row_loss_of(sum, shift, positive);
}
int repair_needed(double sum, double shift, double positive, int num_rows) {
  return needs_repair(sum, shift, positive, num_rows);
}

int backward_columns(int64_t dim) {
  return backward_shape(dim).columns;
}

// lse2 [M]: lse * log2(e) in float64. partial [splits, local rows, stride], the sum of which over splits is the result.
void backward(const uint16_t* zhat, int64_t num_rows, int64_t dim, int64_t stride, int64_t shard, int64_t shards, double temperature,
              const double* lse2, int force_wide, int splits, int workers, unsigned int seed, int eager, float* partial) {
  const BackwardShape shape = backward_shape(dim);
  BackwardArguments a{};
  a.rows = row_blocks(num_rows, shard, shards, shape.row_tile);
  a.column_tiles = static_cast<int>(ntxent::ceil_div(num_rows, shape.columns));
  a.splits = splits;
  a.width = static_cast<int>(stride);
  a.temperature = &temperature;
  a.gain = 1.0f;
  std::vector<float4> factor_storage(static_cast<size_t>(a.column_tiles) * shape.columns / 2);
  float* factors = &factor_storage[0].x;
  std::vector<float2> parts(num_rows);
  const float shift = static_cast<float>(lse2[0]);
  int wide = force_wide;
  for (int64_t j = 0; j < static_cast<int64_t>(a.column_tiles) * shape.columns; ++j) {
    const float high = j < num_rows ? static_cast<float>(lse2[j]) : 0.0f;
    if (j < num_rows) {
      parts[j] = {high, static_cast<float>(lse2[j] - high)};
      wide |= !(std::abs(shift - lse2[j]) <= kFactorRange);
    }
    const int64_t tile = j / shape.columns, column = j % shape.columns;
    factors[tile * 2 * shape.columns + column] = j < num_rows ? static_cast<float>(std::exp2(shift - lse2[j])) : 0.0f;
    factors[(tile * 2 + 1) * shape.columns + column] = high;
  }
  a.factors = factors;
  a.lse = parts.data();
  a.wide = &wide;
  a.partial = partial;
  if (dim <= 64) {
    run_backward<64>(zhat, dim, stride, a, workers, seed, eager != 0);
  } else if (dim <= 128) {
    run_backward<128>(zhat, dim, stride, a, workers, seed, eager != 0);
  } else if (dim <= 256) {
    run_backward<256>(zhat, dim, stride, a, workers, seed, eager != 0);
  } else {
    run_backward<512>(zhat, dim, stride, a, workers, seed, eager != 0);
  }
}

}  // extern "C"
