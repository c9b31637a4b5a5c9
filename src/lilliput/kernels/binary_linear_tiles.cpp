// The inner loops of binary_linear; compiled once for each instruction set, with LILLIPUT_TILES its name.
#include "binary_linear_tiles.hpp"

#include "lanes.hpp"

namespace {

using namespace lilliput;

constexpr int kVectors = kSignRows / kWidth;                        // of a block
constexpr int kMaxSums = kWidth == 16 ? 12 : kWidth == 8 ? 2 : 1;   // tokens times planes of a tile of kWideBlocks
constexpr int kWideBlocks = kWidth == 16 ? 2 : 1;
constexpr int kThinBlocks = kWidth == 16 ? 4 : kWidth == 8 ? 2 : 1;  // of a tile with one token

// --- counting bits -----------------------------------------------------------------------------------------------
// `ones` counts the bits of each lane, perhaps in four bytes that `widen` adds up; kRun of them can be added before.

#if defined(__AVX512VPOPCNTDQ__)
constexpr int64_t kRun = INT64_MAX;

inline Words ones(Words words) { return (Words)_mm512_popcnt_epi32((__m512i)words); }
inline Words widen(Words counts) { return counts; }
#elif defined(__AVX2__)
constexpr int64_t kRun = 31;  // of at most 8 in a byte

inline Words ones(Words words) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                         0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i nibble = _mm256_set1_epi8(15), w = (__m256i)words;
  const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(w, nibble));
  const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi32(w, 4), nibble));
  return (Words)_mm256_add_epi8(low, high);
}
inline Words widen(Words counts) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)counts, _mm256_set1_epi8(1));
  return (Words)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
constexpr int64_t kRun = 31;

inline Words ones(Words w) {
  w -= (w >> 1) & 0x55555555u;
  w = (w & 0x33333333u) + ((w >> 2) & 0x33333333u);
  return (w + (w >> 4)) & 0x0f0f0f0fu;
}
inline Words widen(Words counts) {
  Words w = counts;
  w = (w & 0x00ff00ffu) + ((w >> 8) & 0x00ff00ffu);
  return (w + (w >> 16)) & 0xffffu;
}
#endif

// --- products of signs -------------------------------------------------------------------------------------------

inline Words splat_word(uint32_t word) { return word - Words{}; }

/// counts[s][v]: bits in which the `Sums` rows of words at `bits` differ from the rows of `Blocks` blocks.
template <int Sums, int Blocks>
inline void count(const SignMatrix& matrix, const uint8_t* codes, const uint32_t* bits,
                  Words (&counts)[Sums][Blocks * kVectors]) {
  constexpr int kCount = Blocks * kVectors;
  const int64_t words = matrix.words(), block_bytes = matrix.block_bytes();
  for (int s = 0; s < Sums; ++s) {
    for (int v = 0; v < kCount; ++v) counts[s][v] = Words{};
  }
  for (int64_t start = 0; start < words;) {
    const int64_t end = words - start > kRun ? start + kRun : words;
    Words run[Sums][kCount] = {};
    for (int64_t i = start; i < end; ++i) {
      for (int v = 0; v < kCount; ++v) {
        const int64_t lanes = (v / kVectors) * block_bytes + (v % kVectors) * 4 * kWidth;
        const Words w = load_words(codes + lanes + i * kSignVectorBytes);
        for (int s = 0; s < Sums; ++s) run[s][v] += ones(w ^ splat_word(bits[s * words + i]));
      }
    }
    for (int s = 0; s < Sums; ++s) {
      for (int v = 0; v < kCount; ++v) counts[s][v] += widen(run[s][v]);
    }
    start = end;
  }
}

/// The scales of kWidth rows; 0 past the last one.
inline Floats scales_of(const SignMatrix& matrix, int64_t row) {
  Floats scale = {};
  const int64_t left = matrix.rows - row;
  if (left >= kWidth) std::memcpy(&scale, matrix.scale + row, sizeof scale);
  if (left > 0 && left < kWidth) std::memcpy(&scale, matrix.scale + row, left * sizeof(float));
  return scale;
}

/// y of `Tokens` tokens from `token` on and of `Blocks` blocks.
template <int Tokens, int Planes, int Blocks>
void tile(const SignMatrix& matrix, const SignTokens& tokens, int64_t token, int64_t block, float* y) {
  constexpr int kCount = Blocks * kVectors;
  Words counts[Tokens * Planes][kCount];
  count<Tokens * Planes, Blocks>(matrix, matrix.codes + block * matrix.block_bytes(),
                                 tokens.bits + token * Planes * matrix.words(), counts);
  const Ints inputs = splat(static_cast<int32_t>(matrix.inputs()));
  Floats scales[kCount];
  for (int v = 0; v < kCount; ++v) scales[v] = scales_of(matrix, block * kSignRows + v * kWidth);
#pragma GCC unroll 12  // or the counts would leave their registers
  for (int t = 0; t < Tokens; ++t) {
    const float factor = tokens.means ? tokens.means[token + t] : 1.0f;
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
      const int64_t row = block * kSignRows + v * kWidth;
      Ints base = inputs;
      if (tokens.corrections) base += (Ints)load_words(tokens.corrections[token + t] + row);
      Floats sum = {};
#pragma GCC unroll 3
      for (int p = 0; p < Planes; ++p) {
        sum += to_float(base - 2 * (Ints)counts[t * Planes + p][v]) * tokens.levels[p];
      }
      store_rows(sum * scales[v] * factor, row, matrix.rows, y + (token + t) * matrix.rows);
    }
  }
}

/// The tokens from `token` on, `Tokens` at a time, what is left over with smaller tiles.
template <int Planes, int Blocks, int Tokens>
void tiles(const SignMatrix& matrix, const SignTokens& tokens, int64_t token, int64_t block, float* y) {
  for (; token + Tokens <= tokens.count; token += Tokens) {
    tile<Tokens, Planes, Blocks>(matrix, tokens, token, block, y);
  }
  if constexpr (Tokens > 1) {
    if (token < tokens.count) tiles<Planes, Blocks, Tokens / 2>(matrix, tokens, token, block, y);
  }
}

template <int Planes, int Blocks, int Tokens>
int64_t blocks_of(const SignMatrix& matrix, const SignTokens& tokens, int64_t first, int64_t last, float* y) {
  for (; first + Blocks <= last; first += Blocks) tiles<Planes, Blocks, Tokens>(matrix, tokens, 0, first, y);
  return first;
}

template <int Planes>
void multiply_planes(const SignMatrix& matrix, const SignTokens& tokens, int64_t first, int64_t last, float* y) {
  constexpr int kTokens = kMaxSums >= Planes ? kMaxSums / Planes : 1;
  if (tokens.count == 1) first = blocks_of<Planes, kThinBlocks, 1>(matrix, tokens, first, last, y);
  first = blocks_of<Planes, kWideBlocks, kTokens>(matrix, tokens, first, last, y);
  blocks_of<Planes, 1, kTokens>(matrix, tokens, first, last, y);
}

void multiply(const SignMatrix& matrix, const SignTokens& tokens, int64_t first, int64_t last, float* y) {
  if (tokens.planes == 1) multiply_planes<1>(matrix, tokens, first, last, y);
  if (tokens.planes == 2) multiply_planes<2>(matrix, tokens, first, last, y);
  if (tokens.planes == 3) multiply_planes<3>(matrix, tokens, first, last, y);
}

void segment_sums(const SignMatrix& matrix, int32_t* sums) {
  const int64_t bytes = matrix.segment_bytes(), stride = matrix.blocks() * kSignRows;
  for (int64_t block = 0; block < matrix.blocks(); ++block) {
    const uint8_t* codes = matrix.codes + block * matrix.block_bytes();
    for (int64_t segment = 0; segment < matrix.segments; ++segment) {
      const int64_t begin = segment * bytes, end = begin + bytes;
      for (int v = 0; v < kVectors; ++v) {
        Words total = {};
        for (int64_t word = begin / 4; word * 4 < end; ++word) {
          const int64_t before = begin > word * 4 ? begin - word * 4 : 0;
          const int64_t after = word * 4 + 4 > end ? word * 4 + 4 - end : 0;
          const uint32_t mask = 0xffffffffu << (8 * before) & 0xffffffffu >> (8 * after);
          total += widen(ones(load_words(codes + word * kSignVectorBytes + 4 * kWidth * v) & mask));
        }
        const Ints sum = 2 * (Ints)total - splat(static_cast<int32_t>(matrix.segment_inputs));
        std::memcpy(sums + segment * stride + block * kSignRows + v * kWidth, &sum, sizeof sum);
      }
    }
  }
}

#if defined(__AVX512VPOPCNTDQ__)
#define KEEP(vector) __asm__ volatile("" : "+v"(vector))
#elif defined(__x86_64__)
#define KEEP(vector) __asm__ volatile("" : "+x"(vector))
#else
#define KEEP(vector) __asm__ volatile("" : "+m"(vector))
#endif

/// The three instructions of `count` alone, on operands that never leave the registers: what no product can exceed.
int64_t peak(int64_t rounds) {
  constexpr int kSums = kWidth == 16 ? 12 : 4;
  Words w = splat_word(0x12345678u), others[kSums], sums[kSums] = {};
  for (int s = 0; s < kSums; ++s) others[s] = splat_word(static_cast<uint32_t>(s));
  for (int64_t round = 0; round < rounds; ++round) {
    KEEP(w);  // or nothing would be left to do in later rounds
    for (int s = 0; s < kSums; ++s) sums[s] += ones(w ^ others[s]);
  }
  for (int s = 0; s < kSums; ++s) KEEP(sums[s]);
  return rounds * kSums * kWidth * 32;
}

// --- signs of activations ----------------------------------------------------------------------------------------

inline Floats splat_float(float value) { return value - Floats{}; }

inline Floats load_floats(const float* from) {
  Floats floats;
  std::memcpy(&floats, from, sizeof floats);
  return floats;
}

/// The sign bits of kWidth lanes that are all ones or zero, first lane lowest.
inline uint32_t mask_bits(Ints mask) {
#if defined(__AVX512VNNI__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  return (mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8);
#endif
}

/// Which planes there are; what is constant here costs nothing in the loops.
template <int Planes, bool Shifted, bool Mean>
struct Planned {
  static constexpr int kPlanes = Planes;
  Floats levels[Planes];

  explicit Planned(const Binarizer& how) {
    for (int p = 0; p < Planes; ++p) levels[p] = splat_float(how.levels[p]);
  }

  /// Masks of the signs of x; the sum takes |x - shift|.
  inline void binarize(Floats x, Floats shift, Ints (&positive)[Planes], Floats& sum) const {
    Floats r = Shifted ? x - shift : x;
    if constexpr (Mean) sum += (Floats)((Words)r & 0x7fffffffu);
    for (int p = 0; p < Planes; ++p) {
      positive[p] = r >= 0.0f;
      // r - level where positive, r + level elsewhere: the level's sign is flipped there.
      if (p + 1 < Planes) r += (Floats)((Words)levels[p] ^ ((Words)positive[p] & 0x80000000u));
    }
  }
};

/// Calls `run` with the Planned that `how` asks for.
template <int Planes = kMaxPlanes, class Run>
void with_plan(const Binarizer& how, const Run& run) {
  if constexpr (Planes > 1) {
    if (how.planes < Planes) return with_plan<Planes - 1>(how, run);
  }
  if (how.shift) return how.by_mean ? run(Planned<Planes, true, true>(how)) : run(Planned<Planes, true, false>(how));
  return how.by_mean ? run(Planned<Planes, false, true>(how)) : run(Planned<Planes, false, false>(how));
}

constexpr int64_t kStrip = 32;  // inputs that fill a word

/// One strip of a row: a word for each plane.
template <class Plan>
inline void pack_strip(const Plan& plan, const float* x, const float* shift, uint32_t* words, Floats& sum) {
  for (int p = 0; p < Plan::kPlanes; ++p) words[p] = 0;
  for (int i = 0; i < kStrip; i += kWidth) {
    Ints positive[Plan::kPlanes];
    plan.binarize(load_floats(x + i), shift ? load_floats(shift + i) : Floats{}, positive, sum);
    for (int p = 0; p < Plan::kPlanes; ++p) words[p] |= mask_bits(positive[p]) << i;
  }
}

template <class Plan>
inline void pack_row(const Plan& plan, const float* x, const float* shift, int64_t inputs, uint8_t* bits,
                     int64_t plane_bytes, Floats& sum) {
  uint32_t words[Plan::kPlanes];
  int64_t k = 0;
  for (; k + kStrip <= inputs; k += kStrip) {
    pack_strip(plan, x + k, shift ? shift + k : nullptr, words, sum);
    for (int p = 0; p < Plan::kPlanes; ++p) std::memcpy(bits + p * plane_bytes + k / 8, words + p, kSignWordBytes);
  }
  const int64_t left = inputs - k;
  if (left == 0) return;
  float last[kStrip] = {}, shifts[kStrip] = {};
  std::memcpy(last, x + k, left * sizeof(float));
  if (shift) std::memcpy(shifts, shift + k, left * sizeof(float));
  pack_strip(plan, last, shift ? shifts : nullptr, words, sum);
  for (int p = 0; p < Plan::kPlanes; ++p) {
    words[p] &= ~(0xffffffffu << left);
    std::memcpy(bits + p * plane_bytes + k / 8, words + p, (left + 7) / 8);
  }
}

void pack_rows(const Binarizer& how, const float* x, int64_t rows, int64_t inputs, SignTarget to) {
  with_plan(how, [&](const auto& plan) {
    for (int64_t row = 0; row < rows; ++row) {
      Floats sum = {};
      pack_row(plan, x + row * inputs, how.shift, inputs, to.bits + row * to.row_bytes, to.plane_bytes, sum);
      if (!to.means) continue;
      to.means[row] = reduce<kWidth>(sum, [](auto a, auto b) { return a + b; }) / static_cast<float>(inputs);
    }
  });
}

/// The signs of kWidth columns from x on, of which `count` are used, for up to kStrip inputs.
template <class Plan>
inline void pack_lanes(const Plan& plan, const float* x, const float* shift, int64_t inputs, int64_t stride,
                       int64_t count, uint8_t* bits, const SignTarget& to, Floats& sum) {
  Words words[Plan::kPlanes] = {};
  for (int64_t i = 0; i < inputs; ++i) {
    Ints positive[Plan::kPlanes];
    plan.binarize(load_floats(x + i * stride), splat_float(shift ? shift[i] : 0.0f), positive, sum);
    for (int p = 0; p < Plan::kPlanes; ++p) words[p] |= (Words)positive[p] & (1u << i);
  }
  for (int p = 0; p < Plan::kPlanes; ++p) {
    uint32_t lanes[kWidth];
    std::memcpy(lanes, &words[p], sizeof lanes);
    uint8_t* at = bits + p * to.plane_bytes;
    if (inputs == kStrip && count == kWidth) {
      for (int c = 0; c < kWidth; ++c) std::memcpy(at + c * to.row_bytes, lanes + c, kSignWordBytes);
    } else {
      for (int64_t c = 0; c < count; ++c) std::memcpy(at + c * to.row_bytes, lanes + c, (inputs + 7) / 8);
    }
  }
}

void pack_columns(const Binarizer& how, const float* x, int64_t inputs, int64_t columns, int64_t first, int64_t last,
                  SignTarget to) {
  with_plan(how, [&](const auto& plan) {
    for (int64_t c = first; c < last; c += kWidth) {
      const int64_t count = last - c < kWidth ? last - c : kWidth;
      Floats sum = {};
      for (int64_t k = 0; k < inputs; k += kStrip) {
        const int64_t left = inputs - k < kStrip ? inputs - k : kStrip;
        const float* from = x + k * columns + c;
        const float* shift = how.shift ? how.shift + k : nullptr;
        uint8_t* bits = to.bits + c * to.row_bytes + k / 8;
        if (count == kWidth) {
          pack_lanes(plan, from, shift, left, columns, count, bits, to, sum);
          continue;
        }
        float lanes[kStrip * kWidth] = {};  // the end of x must not be passed
        for (int64_t i = 0; i < left; ++i) std::memcpy(lanes + i * kWidth, from + i * columns, count * sizeof(float));
        pack_lanes(plan, lanes, shift, left, kWidth, count, bits, to, sum);
      }
      const Floats means = sum / static_cast<float>(inputs);
      if (to.means) std::memcpy(to.means + c, &means, count * sizeof(float));
    }
  });
}

// --- products with real activations ------------------------------------------------------------------------------

/// +1.0 or -1.0 by bit `i` of each lane; `flipped` are the inverted codes.
inline Floats sign_of(Words flipped, int i) {
  return (Floats)(((flipped << (31 - i)) & 0x80000000u) | 0x3f800000u);
}

template <int Tokens, int Blocks>
void float_tile(const SignMatrix& matrix, const float* x, int64_t block, float* y) {
  constexpr int kCount = Blocks * kVectors;
  const int64_t inputs = matrix.inputs();
  const uint8_t* codes = matrix.codes + block * matrix.block_bytes();
  Floats sums[Tokens][kCount] = {};
  for (int64_t k = 0; k < inputs; k += kStrip, codes += kSignVectorBytes) {
    const int left = static_cast<int>(inputs - k < kStrip ? inputs - k : kStrip);
    Words flipped[kCount];
    for (int v = 0; v < kCount; ++v) {
      flipped[v] = ~load_words(codes + (v / kVectors) * matrix.block_bytes() + (v % kVectors) * 4 * kWidth);
    }
    for (int i = 0; i < left; ++i) {
      for (int v = 0; v < kCount; ++v) {
        const Floats sign = sign_of(flipped[v], i);
        for (int t = 0; t < Tokens; ++t) sums[t][v] = fused(sign, x[t * inputs + k + i], sums[t][v]);
      }
    }
  }
  for (int t = 0; t < Tokens; ++t) {
    for (int v = 0; v < kCount; ++v) {
      const int64_t row = block * kSignRows + v * kWidth;
      store_rows(sums[t][v] * scales_of(matrix, row), row, matrix.rows, y + t * matrix.rows);
    }
  }
}

template <int Blocks, int Tokens>
void float_tiles(const SignMatrix& matrix, const float* x, int64_t tokens, int64_t block, float* y) {
  for (; tokens >= Tokens; tokens -= Tokens, x += Tokens * matrix.inputs(), y += Tokens * matrix.rows) {
    float_tile<Tokens, Blocks>(matrix, x, block, y);
  }
  if constexpr (Tokens > 1) {
    if (tokens) float_tiles<Blocks, Tokens / 2>(matrix, x, tokens, block, y);
  }
}

void multiply_floats(const SignMatrix& matrix, const float* x, int64_t tokens, int64_t first, int64_t last, float* y) {
  constexpr int kTokens = kWidth == 16 ? 8 : kWidth == 8 ? 4 : 1, kBlocks = kWidth == 16 ? 2 : 1;
  if (tokens == 1) {
    for (; first + kThinBlocks <= last; first += kThinBlocks) float_tiles<kThinBlocks, 1>(matrix, x, 1, first, y);
  }
  for (; first + kBlocks <= last; first += kBlocks) float_tiles<kBlocks, kTokens>(matrix, x, tokens, first, y);
  for (; first < last; ++first) float_tiles<1, kTokens>(matrix, x, tokens, first, y);
}

}  // namespace

namespace lilliput {

const BinaryLinearTiles LILLIPUT_TILES{pack_rows, pack_columns, multiply, segment_sums, multiply_floats, peak};

}  // namespace lilliput
