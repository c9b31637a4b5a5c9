// Feed-forward parts that read only the neurons that fired:
//
//   h_j = a_j (u_j x + b_j),   y = c + sum over a_j != 0 of h_j d_j,   a_j = max(0, g_j - shift)
//
// g are the pre-activations of the gate, which are all needed; the rows u_j of up and d_j of down (stored transposed, so
// that a neuron's weights stand together) are read for the neurons with a_j != 0 alone. Without up h_j is a_j, without the
// rectifier a_j is g_j: then y is the product of a sparse input with the rows of a transposed matrix.
#pragma once

#include <cstdint>
#include <optional>

#include "steps.hpp"

namespace lilliput {

enum class RowFormat { float32, bfloat16, int8, int4 };

constexpr int64_t kChunkColumns = 32;  // that are decoded together

/// A matrix whose rows are read one by one; the caller owns the memory. Rows of codes are filled up to whole chunks: int8
/// stands for code * scale, one scale a row; int4 for (code - 8) * scale + zero, both for each group of a row's columns:
/// byte l of a chunk of 16 bytes holds column l in its low and column 16 + l in its high half. The grid is bfloat16.
struct RowMatrix {
  RowFormat format;
  const void* values;
  const uint16_t* grid;
  int64_t rows, columns, group;  // a group is all columns, or whole chunks

  int64_t chunks() const { return (columns + kChunkColumns - 1) / kChunkColumns; }
  int64_t chunk_bytes() const {
    return format == RowFormat::float32 ? 128 : format == RowFormat::bfloat16 ? 64 : format == RowFormat::int8 ? 32 : 16;
  }
  bool dense() const { return format == RowFormat::float32 || format == RowFormat::bfloat16; }
  int64_t row_bytes() const { return dense() ? columns * chunk_bytes() / kChunkColumns : chunks() * chunk_bytes(); }
  int64_t group_chunks() const { return group == columns ? chunks() : group / kChunkColumns; }
  int64_t row_grid() const { return dense() ? 0 : format == RowFormat::int8 ? 1 : columns / group * 2; }
};

struct SparseFfn {
  std::optional<RowMatrix> up;  // (neurons, inputs)
  const float* up_bias;         // null: none
  RowMatrix down;               // (neurons, outputs)
  const float* down_bias;
  bool rectified;
  float shift;

  int64_t neurons() const { return down.rows; }
};

/// The neurons that fired in each token: room for `neurons` of each of the tokens that go together.
struct Fired {
  int32_t* index;   // (tokens, neurons), ascending
  float* value;     // (tokens, neurons): a, then h
  int64_t* count;   // (tokens)
};

/// The part of the thread of `walker`; all threads of a walk call it alike. x (tokens, inputs), gate (tokens, neurons),
/// y (tokens, outputs). A token's result depends on neither the other tokens nor the threads.
void sparse_ffn(const SparseFfn& ffn, const float* x, const float* gate, int64_t tokens, float* y, const Fired& fired,
                Walker& walker);

/// The whole of it on up to `threads` threads.
void sparse_ffn(const SparseFfn& ffn, const float* x, const float* gate, int64_t tokens, float* y, int threads);

}  // namespace lilliput
