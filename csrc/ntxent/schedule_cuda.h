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

// K-major operand (rows of zhat as rows of A, or as columns of B): 8 rows of 128 bytes, then the next 8. The leading offset is not used.
CELLFAST_HD constexpr uint64_t k_major(uint32_t block_address, int step) {
  return descriptor(block_address + static_cast<uint32_t>(step) * kStep * 2, 16, 8 * kChunkBytes);
}

// MN-major operand B (rows of zhat as its K): 64 columns, the next 64 one block further (leading offset); 8 rows, then the next 8 (stride offset).
CELLFAST_HD constexpr uint64_t n_major(uint32_t block_address, int step, uint32_t block_bytes) {
  return descriptor(block_address + static_cast<uint32_t>(step) * kStep * kChunkBytes, block_bytes, 8 * kChunkBytes);
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

// The local rows of a shard as blocks of `tile` rows that never hold rows of two views: a block is contiguous in zhat.
struct RowBlocks {
  int64_t num_rows, shard, num_shards;
  int tile;
  // One shard of one is a single range of rows; else the shard's first views are one range and its second views another.
  CELLFAST_HD int64_t num_ranges() const { return num_shards == 1 ? 1 : 2; }
  CELLFAST_HD int64_t range_rows() const { return num_rows / num_shards / num_ranges(); }
  CELLFAST_HD int64_t blocks_per_range() const { return ceil_div(range_rows(), tile); }
  CELLFAST_HD int64_t count() const { return num_ranges() * blocks_per_range(); }
  CELLFAST_HD int64_t local(int64_t block) const {
    const int64_t range = block / blocks_per_range();
    return range * range_rows() + (block - range * blocks_per_range()) * tile;
  }
  CELLFAST_HD int64_t global(int64_t block) const { return shard_row(local(block), shard, num_shards, num_rows); }
  CELLFAST_HD int valid(int64_t block) const {
    const int64_t left = range_rows() - block % blocks_per_range() * tile;
    return static_cast<int>(left < tile ? left : tile);
  }
  // Where the sum of local row `row` lies when every block has `tile` places.
  CELLFAST_HD int64_t padded(int64_t row) const {
    const int64_t range = row / range_rows();
    return range * blocks_per_range() * tile + (row - range * range_rows());
  }
};

constexpr int kForwardColumns = 128;

// The forward pass's tiles. `symmetric`: of a tile and its mirror image only the one with column block >= row block is visited, and its column
// sums are the other's row sums; the tiles of a block with itself are visited whole, for their row sums alone. Columns are taken in phases of
// `phase` blocks, small enough for the cache; within a phase every worker gets an equal run of the tiles, row block by row block.
struct ForwardTiles {
  int64_t row_blocks, column_blocks;
  int ratio;  // row tile / column tile
  bool symmetric;
  int64_t phase;  // a multiple of ratio
  int64_t workers;

  CELLFAST_HD int64_t num_phases() const { return ceil_div(column_blocks, phase); }
  CELLFAST_HD int64_t phase_end(int64_t p) const { return (p + 1) * phase < column_blocks ? (p + 1) * phase : column_blocks; }
  CELLFAST_HD int64_t first_column(int64_t p, int64_t row_block) const {
    return symmetric && row_block * ratio > p * phase ? row_block * ratio : p * phase;
  }
  // Row blocks with a tile in phase p.
  CELLFAST_HD int64_t rows_in_phase(int64_t p) const {
    const int64_t rows = ceil_div(phase_end(p), ratio);
    return symmetric && rows < row_blocks ? rows : row_blocks;
  }
  // Tiles of phase p in row blocks before `row_block`.
  CELLFAST_HD int64_t tiles_before(int64_t p, int64_t row_block) const {
    const int64_t width = phase_end(p) - p * phase;
    const int64_t full = p * phase / ratio + 1;  // these row blocks start at or before the phase
    if (!symmetric || row_block <= full) {
      return row_block * width;
    }
    const int64_t n = row_block - full;
    return full * width + n * phase_end(p) - ratio * ((full + row_block - 1) * n / 2);
  }
  CELLFAST_HD int64_t tiles_in_phase(int64_t p) const { return tiles_before(p, rows_in_phase(p)); }
  // A tile whose elements count for their rows only.
  CELLFAST_HD bool rows_only(int64_t row_block, int64_t column_block) const {
    return !symmetric || column_block < (row_block + 1) * ratio;
  }
};

struct ForwardTile {
  int64_t row_block, column_block;
  bool begins;  // the first of a run of tiles with one row block: its rows are loaded
  bool ends;    // the last: its row sums are handed over
};

// One worker's tiles in order; every warp role of a thread block walks the same list.
class ForwardWalk {
 public:
  CELLFAST_HD ForwardWalk(const ForwardTiles& tiles, int64_t worker) : tiles_(tiles), worker_(worker) {}

  CELLFAST_HD bool next(ForwardTile& tile) {
    bool begins = false;
    while (left_ == 0) {
      if (++phase_ >= tiles_.num_phases()) {
        return false;
      }
      const int64_t total = tiles_.tiles_in_phase(phase_);
      // The remainder goes to other workers in every phase.
      const int64_t turn = (worker_ + phase_ * 37) % tiles_.workers;
      const int64_t begin = total * turn / tiles_.workers;
      left_ = total * (turn + 1) / tiles_.workers - begin;
      if (left_ > 0) {
        seek(begin);
        begins = true;
      }
    }
    if (column_ == tiles_.phase_end(phase_)) {
      ++row_;
      column_ = tiles_.first_column(phase_, row_);
      begins = true;
    }
    --left_;
    tile = {row_, column_, begins, left_ == 0 || column_ + 1 == tiles_.phase_end(phase_)};
    ++column_;
    return true;
  }

 private:
  CELLFAST_HD void seek(int64_t index) {
    int64_t low = 0, high = tiles_.rows_in_phase(phase_);
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (tiles_.tiles_before(phase_, middle) <= index) {
        low = middle;
      } else {
        high = middle;
      }
    }
    row_ = low;
    column_ = tiles_.first_column(phase_, low) + index - tiles_.tiles_before(phase_, low);
  }

  ForwardTiles tiles_;
  int64_t worker_;
  int64_t phase_ = -1, left_ = 0, row_ = 0, column_ = 0;
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

inline ForwardTiles forward_tiles(const RowBlocks& rows, int64_t dim, int64_t multiprocessors) {
  ForwardTiles tiles{};
  tiles.row_blocks = rows.count();
  tiles.column_blocks = ceil_div(rows.num_rows, kForwardColumns);
  tiles.ratio = rows.tile / kForwardColumns;
  tiles.symmetric = rows.num_shards == 1;
  // 12 MB of columns: well inside the cache beside the row operands.
  int64_t phase = (12 << 20) / (ceil_div(dim, kChunk) * kForwardColumns * kChunkBytes);
  phase = phase > 256 ? 256 : phase;
  tiles.phase = phase - phase % 2;
  int64_t total = 0;
  for (int64_t p = 0; p < tiles.num_phases(); ++p) {
    total += tiles.tiles_in_phase(p);
  }
  tiles.workers = total < multiprocessors ? total : multiprocessors;
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
  CELLFAST_HD int row_bytes() const { return chunks * row_tile * kChunkBytes; }
  CELLFAST_HD int block_bytes() const { return columns * kChunkBytes; }
  CELLFAST_HD int stage_bytes() const { return chunks * block_bytes(); }
  CELLFAST_HD int ring_offset() const { return row_bytes(); }
  CELLFAST_HD int factors_offset() const { return ring_offset() + stages * stage_bytes(); }
  CELLFAST_HD int barrier_offset() const { return factors_offset() + (stages * columns * 4 + 1023) / 1024 * 1024; }
  CELLFAST_HD int bytes() const { return barrier_offset() + kBarrierBytes; }
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
// equals the smallest, because every split writes its own partial gradient. `blocks_that_fit`: at most this many splits.
inline int64_t backward_splits(int64_t row_blocks, int64_t column_tiles, int64_t multiprocessors, int64_t most) {
  int64_t best = 1, shortest = ceil_div(row_blocks, multiprocessors) * column_tiles;
  for (int64_t splits = 2; splits <= most && splits <= column_tiles; ++splits) {
    const int64_t longest = ceil_div(row_blocks * splits, multiprocessors) * ceil_div(column_tiles, splits);
    if (longest * 20 < shortest * 19) {  // worth it from 5 % on
      best = splits;
      shortest = longest;
    }
  }
  return best;
}

struct Range {
  int64_t begin, end;
};

CELLFAST_HD inline Range split_range(int64_t count, int64_t split, int64_t splits) {
  return {count * split / splits, count * (split + 1) / splits};
}

// True when a tile holds an element that needs its index looked at: a row with itself, a row with its positive, or a place beyond the last
// row or column.
CELLFAST_HD inline bool is_special(int64_t first_row, int rows, int row_tile, int64_t first_column, int columns, int64_t num_rows) {
  const int64_t half = num_rows / 2, end_row = first_row + row_tile, end_column = first_column + columns;
  const bool on_diagonal = first_column < end_row && first_row < end_column;
  const bool above = first_column < end_row + half && first_row + half < end_column;
  const bool below = first_column < end_row - half && first_row - half < end_column;
  return on_diagonal || above || below || rows < row_tile || end_column > num_rows;
}

}  // namespace cellfast::ntxent::sm90
