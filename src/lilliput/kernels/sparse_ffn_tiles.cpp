// The inner loops of sparse_ffn; compiled once for each instruction set, with LILLIPUT_TILES its name.
#include "sparse_ffn_tiles.hpp"

#include <algorithm>
#include <type_traits>

#include "float_lanes.hpp"

namespace {

using namespace lilliput;

constexpr int kVectors = kChunkColumns / kWidth;                // of a chunk
constexpr int kRows = kWidth == 16 ? 4 : kWidth == 8 ? 2 : 1;  // that go through the columns together

int64_t compact(const float* gate, int64_t neurons, bool rectified, float shift, int32_t* index, float* value) {
  int64_t count = 0;
  for (int64_t j = 0; j < neurons; ++j) {
    const float activation = rectified ? gate[j] - shift : gate[j];
    index[count] = static_cast<int32_t>(j);
    value[count] = activation;
    count += rectified ? !(activation <= 0.0f) : activation != 0.0f;
  }
  return count;
}

// --- rows --------------------------------------------------------------------------------------------------------

/// kWidth signed or unsigned bytes as 32-bit lanes.
template <class Byte>
inline Ints widen(const void* from) {
#if defined(__AVX512VNNI__)
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(from));
  return std::is_signed_v<Byte> ? (Ints)_mm512_cvtepi8_epi32(bytes) : (Ints)_mm512_cvtepu8_epi32(bytes);
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(from));
  return std::is_signed_v<Byte> ? (Ints)_mm256_cvtepi8_epi32(bytes) : (Ints)_mm256_cvtepu8_epi32(bytes);
#else
  Byte bytes[kWidth];
  std::memcpy(bytes, from, sizeof bytes);
  return Ints{bytes[0], bytes[1], bytes[2], bytes[3]};
#endif
}

/// One row on its way through the columns; what it stands for is `factor` times what `decode` gives.
template <RowFormat Format>
struct Row {
  static constexpr int64_t kChunkBytes = Format == RowFormat::float32    ? 128
                                         : Format == RowFormat::bfloat16 ? 64
                                         : Format == RowFormat::int8     ? 32
                                                                         : 16;
  const uint8_t* values;
  const uint16_t* grid;
  float factor = 1.0f;
#if defined(__AVX512VNNI__)
  Floats table;  // of the 16 codes of a group
#else
  Floats scale, zero;
#endif

  void open(const RowMatrix& m, int64_t index) {
    values = static_cast<const uint8_t*>(m.values) + index * m.row_bytes();
    grid = m.grid + index * m.row_grid();
    if constexpr (Format == RowFormat::int8) {
      const uint32_t word = static_cast<uint32_t>(*grid) << 16;
      std::memcpy(&factor, &word, sizeof factor);
    }
  }

  void enter(int64_t group) {
    if constexpr (Format == RowFormat::int4) {
      uint32_t both;
      std::memcpy(&both, grid + 2 * group, sizeof both);
      const Words pair = both - Words{};
      const Floats step = (Floats)(pair << 16), middle = (Floats)(pair & 0xffff0000u);
#if defined(__AVX512VNNI__)
      table = fused(Floats{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7}, step, middle);
#else
      scale = step;
      zero = middle;
#endif
    }
  }

  /// The weights of the low half of each byte.
  Floats nibbles(Ints bytes) const {
#if defined(__AVX512VNNI__)
    return _mm512_permutexvar_ps((__m512i)bytes, table);
#else
    return fused(to_float((bytes & 15) - 8), scale, zero);
#endif
  }

  /// The weights of a chunk, of which `left` columns exist.
  template <bool Whole>
  void decode(int64_t chunk, int64_t left, Floats (&w)[kVectors]) const {
    const uint8_t* from = values + chunk * kChunkBytes;
    if constexpr (Format == RowFormat::int8) {
      for (int v = 0; v < kVectors; ++v) w[v] = to_float(widen<int8_t>(from + v * kWidth));
    } else if constexpr (Format == RowFormat::int4) {
      for (int v = 0; v < kVectors / 2; ++v) {
        const Ints bytes = widen<uint8_t>(from + v * kWidth);
        w[v] = nibbles(bytes);
        w[v + kVectors / 2] = nibbles(bytes >> 4);
      }
    } else {
      using Value = std::conditional_t<Format == RowFormat::float32, float, uint16_t>;
      const auto* typed = reinterpret_cast<const Value*>(from);
      for (int v = 0; v < kVectors; ++v) {
        const int64_t lanes = left - v * kWidth;
        w[v] = Whole ? load(typed + v * kWidth) : lanes > 0 ? load_part(typed + v * kWidth, lanes) : Floats{};
      }
    }
  }

  /// Rows are far apart: what is read next is asked for while this is computed.
  void prefetch(int64_t chunk) const {
    constexpr int64_t kEach = std::max<int64_t>(1, 64 / kChunkBytes);
    if (chunk % kEach) return;
    for (int64_t byte = 0; byte < kChunkBytes; byte += 64) __builtin_prefetch(values + chunk * kChunkBytes + byte);
  }
};

/// Calls `chunk(c, whole)` for the chunks first .. last-1 with the grids of `rows` in place.
template <RowFormat Format, int Rows, class Chunk>
inline void walk(const RowMatrix& m, Row<Format> (&rows)[Rows], int64_t first, int64_t last, const Chunk& chunk) {
  const int64_t each = m.group_chunks(), whole = m.columns / kChunkColumns;
  int64_t group = first / each;
  for (int64_t c = first; c < last; ++group) {
    const int64_t end = std::min(last, (group + 1) * each), fast = std::min(end, whole);
    for (Row<Format>& row : rows) row.enter(group);
    for (; c < fast; ++c) chunk(c, std::true_type());
    for (; c < end; ++c) chunk(c, std::false_type());
  }
}

/// Chunk `c` of a vector of `columns` floats; 0 behind its end.
template <bool Whole>
inline Floats part_of(const float* x, int64_t column, int64_t columns) {
  return Whole ? load(x + column) : column < columns ? load_part(x + column, columns - column) : Floats{};
}

template <RowFormat Format, int Rows>
inline void dot_rows(const RowMatrix& m, const int32_t* index, const int32_t* next, const float* x, float* sums) {
  Row<Format> rows[Rows], later[Rows];
  Floats parts[Rows][kVectors] = {};
  for (int r = 0; r < Rows; ++r) {
    rows[r].open(m, index[r]);
    later[r].open(m, next[r]);
  }
  walk(m, rows, 0, m.chunks(), [&](int64_t c, auto whole) {
    Floats inputs[kVectors], w[kVectors];
    for (int v = 0; v < kVectors; ++v) inputs[v] = part_of<whole.value>(x, c * kChunkColumns + v * kWidth, m.columns);
    for (int r = 0; r < Rows; ++r) {
      later[r].prefetch(c);
      rows[r].template decode<whole.value>(c, m.columns - c * kChunkColumns, w);
      for (int v = 0; v < kVectors; ++v) parts[r][v] = fused(w[v], inputs[v], parts[r][v]);
    }
  });
  for (int r = 0; r < Rows; ++r) {
    for (int v = 1; v < kVectors; ++v) parts[r][0] += parts[r][v];
    sums[r] = rows[r].factor * reduce<kWidth>(parts[r][0], [](auto a, auto b) { return a + b; });
  }
}

template <RowFormat Format, int Rows>
inline void add_rows(const RowMatrix& m, const int32_t* index, const int32_t* next, const float* value, int64_t first,
                     int64_t last, float* y) {
  Row<Format> rows[Rows], later[Rows];
  float factors[Rows];
  for (int r = 0; r < Rows; ++r) {
    rows[r].open(m, index[r]);
    later[r].open(m, next[r]);
    factors[r] = value[r] * rows[r].factor;
  }
  walk(m, rows, first, last, [&](int64_t c, auto whole) {
    Floats sums[kVectors], w[kVectors];
    const int64_t column = c * kChunkColumns;
    for (int v = 0; v < kVectors; ++v) sums[v] = part_of<whole.value>(y, column + v * kWidth, m.columns);
    for (int r = 0; r < Rows; ++r) {
      later[r].prefetch(c);
      rows[r].template decode<whole.value>(c, m.columns - column, w);
      for (int v = 0; v < kVectors; ++v) sums[v] = fused(w[v], factors[r], sums[v]);
    }
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = column + v * kWidth;
      if (whole.value) {
        store(sums[v], y + at);
      } else if (at < m.columns) {
        store_part(sums[v], m.columns - at, y + at);
      }
    }
  });
}

// --- all rows of a list --------------------------------------------------------------------------------------------

template <RowFormat Format>
void dot_list(const RowMatrix& m, const int32_t* index, int64_t count, const float* x, const float* bias, float* value) {
  const auto finish = [&](int64_t i, float sum) { value[i] *= bias ? sum + bias[index[i]] : sum; };
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) {
    float sums[kRows];
    dot_rows<Format, kRows>(m, index + i, i + 2 * kRows <= count ? index + i + kRows : index + i, x, sums);
    for (int r = 0; r < kRows; ++r) finish(i + r, sums[r]);
  }
  for (; i < count; ++i) {
    float sum;
    dot_rows<Format, 1>(m, index + i, index + i, x, &sum);
    finish(i, sum);
  }
}

template <RowFormat Format>
void add_list(const RowMatrix& m, const int32_t* index, const float* value, int64_t count, int64_t first, int64_t last,
              float* y) {
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) {
    const int32_t* next = i + 2 * kRows <= count ? index + i + kRows : index + i;
    add_rows<Format, kRows>(m, index + i, next, value + i, first, last, y);
  }
  for (; i < count; ++i) add_rows<Format, 1>(m, index + i, index + i, value + i, first, last, y);
}

void dot(const RowMatrix& m, const int32_t* index, int64_t count, const float* x, const float* bias, float* value) {
  switch (m.format) {
    case RowFormat::float32:
      return dot_list<RowFormat::float32>(m, index, count, x, bias, value);
    case RowFormat::bfloat16:
      return dot_list<RowFormat::bfloat16>(m, index, count, x, bias, value);
    case RowFormat::int8:
      return dot_list<RowFormat::int8>(m, index, count, x, bias, value);
    case RowFormat::int4:
      return dot_list<RowFormat::int4>(m, index, count, x, bias, value);
  }
}

void add(const RowMatrix& m, const int32_t* index, const float* value, int64_t count, int64_t first, int64_t last,
         float* y) {
  switch (m.format) {
    case RowFormat::float32:
      return add_list<RowFormat::float32>(m, index, value, count, first, last, y);
    case RowFormat::bfloat16:
      return add_list<RowFormat::bfloat16>(m, index, value, count, first, last, y);
    case RowFormat::int8:
      return add_list<RowFormat::int8>(m, index, value, count, first, last, y);
    case RowFormat::int4:
      return add_list<RowFormat::int4>(m, index, value, count, first, last, y);
  }
}

}  // namespace

namespace lilliput {

const SparseFfnTiles LILLIPUT_TILES{compact, dot, add};

}  // namespace lilliput
