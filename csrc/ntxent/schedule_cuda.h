// Index logic of the sm_90a kernels: which tiles a thread block visits, where a value lies in swizzled shared memory, how an operand descriptor
// is written and which (row, column) an accumulator register holds. Plain C++ for the host too: tests/test_ntxent_schedule.py compiles it and
// runs the kernels' dataflow on the CPU. Names of hardware layouts are those of the PTX ISA (wgmma.mma_async, cp.async.bulk.tensor).
#pragma once

#include <cstdint>

#include "ntxent/schedule.h"

namespace cellfast::ntxent::sm90 {

// A block of shared memory is [rows][64 values of 2 bytes]: rows of 128 bytes, the span of the 128-byte swizzle. Its base is a multiple of 1024.
constexpr int kChunk = 64;
constexpr int kChunkBytes = 128;
constexpr int kRowBox = 64;            // rows of the copy that loads row operands: the M of one wgmma
constexpr int kStep = 16;              // the K of one wgmma for 2-byte types
constexpr int kMaxDim = 512;
constexpr int kConsumerWarps = 8;      // two warpgroups
constexpr int kThreads = 384;          // and one that copies
constexpr int kSharedLimit = 232448;   // 227 KB, what one block of compute capability 9.0 may have
constexpr int kBarrierBytes = 1024;

// Offset of a byte of a block after CU_TENSOR_MAP_SWIZZLE_128B: bits 4..6 (the 16-byte unit) xor bits 7..9 (the row modulo 8).
CELLFAST_HD constexpr uint32_t swizzle_128(uint32_t offset) {
  return offset ^ ((offset >> 3) & 0x70);
}

// Shared-memory matrix descriptor with the 128-byte swizzle: address, leading and stride offset in units of 16 bytes; layout type 1 at bit 62.
CELLFAST_HD constexpr uint64_t descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | (static_cast<uint64_t>(leading_bytes >> 4) << 16) |
         (static_cast<uint64_t>(stride_bytes >> 4) << 32) | (uint64_t{1} << 62);
}

// The same operand `bytes` further: the address field is the lowest and does not overflow, shared memory being smaller than 2^18 bytes.
CELLFAST_HD constexpr uint64_t advance(uint64_t operand, uint32_t bytes) {
  return operand + (bytes >> 4);
}

// K-major operand (rows of zhat as rows of A, or as columns of B): 8 rows of 128 bytes, then the next 8. The leading offset is not used.
// One k-step is 32 bytes of every row.
constexpr uint32_t kStepBytesKMajor = kStep * 2;
CELLFAST_HD constexpr uint64_t k_major(uint32_t block_address) {
  return descriptor(block_address, 16, 8 * kChunkBytes);
}

// N-major operand B (rows of zhat as its K): 64 columns, the next 64 one block further (leading offset); 8 rows, then the next 8 (stride offset).
// One k-step is 16 rows.
constexpr uint32_t kStepBytesNMajor = kStep * kChunkBytes;
CELLFAST_HD constexpr uint64_t n_major(uint32_t block_address, uint32_t block_bytes) {
  return descriptor(block_address, block_bytes, 8 * kChunkBytes);
}

// Accumulator of wgmma m64nNk16: register `reg` of thread `thread` of a warpgroup. Registers 8s..8s+7 in pairs are also the A fragment of
// k-step s of a following product over these columns.
CELLFAST_HD constexpr int accumulator_row(int thread, int reg) {
  return 16 * (thread / 32) + (thread % 32) / 4 + 8 * ((reg >> 1) & 1);
}
CELLFAST_HD constexpr int accumulator_column(int thread, int reg) {
  return 8 * (reg >> 2) + 2 * (thread & 3) + (reg & 1);
}

// Column sums of a 128-column tile: 32 partial sums in each lane (index 2 * (column / 8) + column % 2), halved three times over the lanes that
// hold the same columns; lane `lane` ends with the four sums index 0..3 of these columns.
CELLFAST_HD constexpr int reduced_column(int lane, int index) {
  const int base = ((lane >> 4) & 1) * 16 + ((lane >> 3) & 1) * 8 + ((lane >> 2) & 1) * 4;
  return 8 * ((base + index) >> 1) + 2 * (lane & 3) + (index & 1);
}

// Row and column numbers are 32-bit inside the kernels (registers are what they are short of); sums of three of them must fit.
constexpr int64_t kMaxRows = int64_t{1} << 29;

// The local rows of a shard as blocks of `tile` rows that never hold rows of two views: a block is contiguous in zhat. One shard of one is a
// single range of rows; else the shard's first views are one range and its second views another.
struct RowBlocks {
  int num_rows, tile, num_ranges, range_rows, blocks_per_range;
  int first[2];  // global row at which each range begins
  CELLFAST_HD int count() const { return num_ranges * blocks_per_range; }
  CELLFAST_HD int local_rows() const { return num_ranges * range_rows; }
  CELLFAST_HD int range(int block) const { return block >= blocks_per_range ? 1 : 0; }
  CELLFAST_HD int in_range(int block) const { return (block - range(block) * blocks_per_range) * tile; }
  CELLFAST_HD int local(int block) const { return range(block) * range_rows + in_range(block); }
  CELLFAST_HD int global(int block) const { return first[range(block)] + in_range(block); }
  CELLFAST_HD int valid(int block) const { return range_rows - in_range(block) < tile ? range_rows - in_range(block) : tile; }
  // Where the sum of local row `row` lies when every block has `tile` places, and the row's global number.
  CELLFAST_HD int padded(int row) const { return row < range_rows ? row : row - range_rows + blocks_per_range * tile; }
  CELLFAST_HD int global_row(int row) const { return row < range_rows ? first[0] + row : first[1] + row - range_rows; }
  CELLFAST_HD int padded_rows() const { return count() * tile; }
};

inline RowBlocks row_blocks(int64_t num_rows, int64_t shard, int64_t num_shards, int tile) {
  RowBlocks rows{};
  rows.num_rows = static_cast<int>(num_rows);
  rows.tile = tile;
  rows.num_ranges = num_shards == 1 ? 1 : 2;
  rows.range_rows = static_cast<int>(num_rows / num_shards / rows.num_ranges);
  rows.blocks_per_range = static_cast<int>(ceil_div(rows.range_rows, tile));
  rows.first[0] = static_cast<int>(shard_row(0, shard, num_shards, num_rows));
  rows.first[1] = num_shards == 1 ? 0 : static_cast<int>(shard_row(rows.range_rows, shard, num_shards, num_rows));
  return rows;
}

constexpr int kForwardColumns = 128;

// The forward pass's tiles. `symmetric`: of a tile and its mirror image only the one with column block >= row block is visited, and its column
// sums are the other's row sums; the tiles of a block with itself are visited whole, for their row sums alone. Columns are taken in phases of
// `phase` blocks, small enough for the cache; within a phase every worker gets an equal run of the tiles, row block by row block.
struct ForwardTiles {
  int row_blocks, column_blocks;
  int ratio;  // row tile / column tile
  int phase;  // a multiple of ratio
  int workers;
  bool symmetric;

  CELLFAST_HD int num_phases() const { return (column_blocks + phase - 1) / phase; }
  CELLFAST_HD int phase_end(int p) const { return (p + 1) * phase < column_blocks ? (p + 1) * phase : column_blocks; }
  CELLFAST_HD int first_column(int p, int row_block) const {
    return symmetric && row_block * ratio > p * phase ? row_block * ratio : p * phase;
  }
  // Row blocks with a tile in phase p.
  CELLFAST_HD int rows_in_phase(int p) const {
    const int rows = (phase_end(p) + ratio - 1) / ratio;
    return symmetric && rows < row_blocks ? rows : row_blocks;
  }
  // Tiles of phase p in row blocks before `row_block`.
  CELLFAST_HD int64_t tiles_before(int p, int row_block) const {
    const int64_t width = phase_end(p) - p * phase;
    const int64_t full = p * phase / ratio + 1;  // these row blocks start at or before the phase
    if (!symmetric || row_block <= full) {
      return row_block * width;
    }
    const int64_t n = row_block - full;
    return full * width + n * phase_end(p) - ratio * ((full + row_block - 1) * n / 2);
  }
  CELLFAST_HD int64_t tiles_in_phase(int p) const { return tiles_before(p, rows_in_phase(p)); }
  // A tile whose elements count for their rows only.
  CELLFAST_HD bool rows_only(int row_block, int column_block) const { return !symmetric || column_block < (row_block + 1) * ratio; }
};

struct ForwardTile {
  int row_block, column_block;
  bool begins;  // the first of a run of tiles with one row block: its rows are loaded
  bool ends;    // the last: its row sums are handed over
};

// One worker's tiles in order; every warp role of a thread block walks the same list.
class ForwardWalk {
 public:
  CELLFAST_HD ForwardWalk(const ForwardTiles& tiles, int worker) : tiles_(tiles), worker_(worker) {}

  CELLFAST_HD bool next(ForwardTile& tile) {
    bool begins = false;
    while (left_ == 0) {
      if (++phase_ >= tiles_.num_phases()) {
        return false;
      }
      begins = start_phase();
    }
    if (column_ == end_) {
      ++row_;
      column_ = tiles_.first_column(phase_, row_);
      begins = true;
    }
    --left_;
    tile = {row_, column_, begins, left_ == 0 || column_ + 1 == end_};
    ++column_;
    return true;
  }

 private:
  // The worker's run within the phase; false when it has none. What does not divide evenly goes to other workers in every phase.
  CELLFAST_HD bool start_phase() {
    const int64_t total = tiles_.tiles_in_phase(phase_);
    const int64_t turn = (worker_ + static_cast<int64_t>(phase_) * 37) % tiles_.workers;
    const int64_t begin = total * turn / tiles_.workers;
    left_ = static_cast<int>(total * (turn + 1) / tiles_.workers - begin);
    end_ = tiles_.phase_end(phase_);
    int low = 0, high = tiles_.rows_in_phase(phase_);
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (tiles_.tiles_before(phase_, middle) <= begin) {
        low = middle;
      } else {
        high = middle;
      }
    }
    row_ = low;
    column_ = tiles_.first_column(phase_, low) + static_cast<int>(begin - tiles_.tiles_before(phase_, low));
    return left_ > 0;
  }

  const ForwardTiles& tiles_;
  int worker_;
  int phase_ = -1, left_ = 0, row_ = 0, column_ = 0, end_ = 0;
};

// Shared memory of the forward kernel, in bytes from a base that is a multiple of 1024: row operand, ring of column blocks (128 rows x 64
// values), ring of sums on their way to the warp that adds them up, barriers.
struct ForwardShape {
  int chunks;    // ceil(D / 64)
  int row_tile;  // 256 where the rows fit, else 128
  int stages;
  static constexpr int kStageBytes = kForwardColumns * kChunkBytes;
  static constexpr int kSumSlots = 2;
  static constexpr int kSumSlotBytes = kConsumerWarps * kForwardColumns * 4;
  // Warpgroups multiply in turns only where the ring holds a whole tile: one that waits for its turn releases no stage meanwhile.
  CELLFAST_HD bool takes_turns() const { return stages >= chunks; }
  CELLFAST_HD int row_bytes() const { return chunks * row_tile * kChunkBytes; }
  CELLFAST_HD int ring_offset() const { return row_bytes(); }
  CELLFAST_HD int sums_offset() const { return ring_offset() + stages * kStageBytes; }
  CELLFAST_HD int barrier_offset() const { return sums_offset() + kSumSlots * kSumSlotBytes; }
  CELLFAST_HD int bytes() const { return barrier_offset() + kBarrierBytes; }
};

CELLFAST_HD inline ForwardShape forward_shape(int64_t dim) {
  ForwardShape shape{static_cast<int>(ceil_div(dim, kChunk)), dim <= 256 ? 256 : 128, 8};
  while (shape.bytes() + 1024 > kSharedLimit) {  // 1024: to align the base
    --shape.stages;
  }
  return shape;
}

inline ForwardTiles forward_tiles(const RowBlocks& rows, int64_t dim, int multiprocessors) {
  ForwardTiles tiles{};
  tiles.row_blocks = rows.count();
  tiles.column_blocks = static_cast<int>(ceil_div(rows.num_rows, kForwardColumns));
  tiles.ratio = rows.tile / kForwardColumns;
  tiles.symmetric = rows.num_ranges == 1;
  // 12 MB of columns: well inside the cache beside the row operands.
  const int phase = static_cast<int>((12 << 20) / (ceil_div(dim, kChunk) * kForwardColumns * kChunkBytes));
  tiles.phase = (phase > 256 ? 256 : phase) / 2 * 2;
  int64_t total = 0;
  for (int p = 0; p < tiles.num_phases(); ++p) {
    total += tiles.tiles_in_phase(p);
  }
  tiles.workers = static_cast<int>(total < multiprocessors ? total : multiprocessors);
  return tiles;
}

// The backward kernel's shape by D: rows per block, columns per tile, ring depth and the width of one warpgroup's output. Up to D = 256 each
// warpgroup owns 64 rows of 128; beyond, both own the same 64 rows and half the output columns each, and each computes the weights for itself.
struct BackwardShape {
  int chunks;        // blocks of 64 values that are loaded
  int row_tile;      // 128 or 64
  int columns;       // of a tile
  int stages;
  int out_width;     // output columns of one warpgroup: the N of the second product
  bool split_width;  // the warpgroups share rows and split the width
  CELLFAST_HD constexpr int row_bytes() const { return chunks * row_tile * kChunkBytes; }
  CELLFAST_HD constexpr int block_bytes() const { return columns * kChunkBytes; }
  CELLFAST_HD constexpr int stage_bytes() const { return chunks * block_bytes(); }
  CELLFAST_HD constexpr int ring_offset() const { return row_bytes(); }
  CELLFAST_HD constexpr int factors_offset() const { return ring_offset() + stages * stage_bytes(); }
  CELLFAST_HD constexpr int factor_bytes() const { return columns * 8; }  // per column: factor, then (all columns later) lse
  CELLFAST_HD constexpr int barrier_offset() const { return factors_offset() + (stages * factor_bytes() + 1023) / 1024 * 1024; }
  CELLFAST_HD constexpr int bytes() const { return barrier_offset() + kBarrierBytes; }
};

CELLFAST_HD constexpr BackwardShape backward_shape(int64_t dim) {
  if (dim <= 64) {
    return {1, 128, 128, 6, 64, false};
  }
  if (dim <= 128) {
    return {2, 128, 128, 5, 128, false};
  }
  if (dim <= 256) {
    return {4, 128, 64, 4, 256, false};
  }
  return {8, 64, 48, 3, 256, true};
}

// Column ranges ("splits") so that few row blocks still fill the multiprocessors: the number that makes the longest worker shortest, and of
// nearly equals the smallest, because every split writes its own partial gradient. At most `most`.
inline int backward_splits(int64_t row_blocks, int64_t column_tiles, int64_t multiprocessors, int64_t most) {
  int64_t best = 1, shortest = ceil_div(row_blocks, multiprocessors) * column_tiles;
  for (int64_t splits = 2; splits <= most && splits <= column_tiles; ++splits) {
    const int64_t longest = ceil_div(row_blocks * splits, multiprocessors) * ceil_div(column_tiles, splits);
    if (longest * 20 < shortest * 19) {  // worth it from 5 % on
      best = splits;
      shortest = longest;
    }
  }
  return static_cast<int>(best);
}

// First tile of a split; that of the next one is its end.
CELLFAST_HD inline int split_begin(int tiles, int split, int splits) {
  return static_cast<int>(static_cast<int64_t>(tiles) * split / splits);
}

// True when a tile holds an element that needs its index looked at: a row with itself, a row with its positive, or a place beyond the last
// row or column.
CELLFAST_HD inline bool is_special(int first_row, int valid_rows, int row_tile, int first_column, int columns, int num_rows) {
  const int half = num_rows / 2, end_row = first_row + row_tile, end_column = first_column + columns;
  const bool on_diagonal = first_column < end_row && first_row < end_column;
  const bool above = first_column < end_row + half && first_row + half < end_column;
  const bool below = first_column < end_row - half && first_row - half < end_column;
  return on_diagonal || above || below || valid_rows < row_tile || end_column > num_rows;
}

}  // namespace cellfast::ntxent::sm90
