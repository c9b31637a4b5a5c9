// seed_encode: which seed and which numbers come closest to each block of weights.
//
// With orthonormal columns Q(s) of U(s) the energy |Q^T w|^2 is what any t can hold of a block; only the seeds with the
// highest are tried with t as it will be stored. The scan of all seeds is tiled, so that a tile's bases stay in L2.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "isa.hpp"
#include "seed_linear.hpp"
#include "seed_search_tiles.hpp"
#include "thread_pool.hpp"

namespace lilliput {
namespace {

constexpr int kTileSeeds = 2048;
constexpr int64_t kTileUnits = 16;  // of 16 blocks, that go through a tile of seeds together
constexpr int kLargest = 7, kLeast = -8, kExponents = 16;

const SeedSearchTiles& tiles() {
#if defined(LILLIPUT_X86)
  if (isa() == Isa::avx512) return seed_search_avx512;
  if (isa() == Isa::avx2) return seed_search_avx2;
#endif
  return seed_search_scalar;
}

/// U(seed) (inputs, terms).
void fill_basis(uint32_t state, int inputs, int terms, double* u) {
  for (int i = 0; i < inputs * terms; ++i) {
    const uint32_t bit = (state ^ state >> 1 ^ state >> 3 ^ state >> 12) & 1;
    state = state >> 1 | bit << 15;
    u[i] = (static_cast<double>(state) - 32768.0) / 32767.0;
  }
}

/// Orthonormal columns of U for the seeds 0 .. 65535 (seed 0, which is none, holds no energy): (seeds, terms, inputs).
std::vector<float> orthonormal_bases(int inputs, int terms) {
  std::vector<float> bases((kSeedStates + 1) * inputs * terms);
  double u[kMostInputs * kMostTerms], q[kMostTerms][kMostInputs];
  for (int seed = 1; seed <= kSeedStates; ++seed) {
    fill_basis(seed, inputs, terms, u);
    for (int p = 0; p < terms; ++p) {
      for (int c = 0; c < inputs; ++c) q[p][c] = u[c * terms + p];
      for (int turn = 0; turn < 2; ++turn) {  // twice is enough
        for (int other = 0; other < p; ++other) {
          double dot = 0;
          for (int c = 0; c < inputs; ++c) dot += q[p][c] * q[other][c];
          for (int c = 0; c < inputs; ++c) q[p][c] -= dot * q[other][c];
        }
      }
      double norm = 0;
      for (int c = 0; c < inputs; ++c) norm += q[p][c] * q[p][c];
      const double scale = norm > 1e-12 ? 1 / std::sqrt(norm) : 0;
      for (int c = 0; c < inputs; ++c) {
        q[p][c] *= scale;
        bases[(seed * terms + p) * inputs + c] = static_cast<float>(q[p][c]);
      }
    }
  }
  return bases;
}

const std::vector<float>& bases_of(int bits) {
  static const std::vector<float> four = orthonormal_bases(8, 3), three = orthonormal_bases(12, 4);
  return bits == 4 ? four : three;
}

/// What is stored of a block, and its squared error less |w|^2.
struct Choice {
  double error = 0;  // that of t = 0
  int seed = 1, exponent = 0, t[kMostTerms] = {};
};

/// The normal equations of one seed and block: G = U^T U, b = U^T w, and the t that solves G t = b.
struct Fit {
  double g[kMostTerms][kMostTerms] = {}, b[kMostTerms] = {}, t[kMostTerms] = {};
  int terms;

  Fit(int seed, int inputs, int count, const float* w) : terms(count) {
    double u[kMostInputs * kMostTerms];
    fill_basis(seed, inputs, terms, u);
    for (int p = 0; p < terms; ++p) {
      b[p] = 0;
      for (int c = 0; c < inputs; ++c) b[p] += u[c * terms + p] * w[c];
      for (int q = 0; q < terms; ++q) {
        g[p][q] = 0;
        for (int c = 0; c < inputs; ++c) g[p][q] += u[c * terms + p] * u[c * terms + q];
      }
    }
    solve();
  }

  /// Gaussian elimination; G is positive, a vanishing pivot leaves its t at 0.
  void solve() {
    double a[kMostTerms][kMostTerms];
    std::memcpy(a, g, sizeof a);
    std::memcpy(t, b, sizeof t);
    for (int p = 0; p < terms; ++p) {
      for (int q = p + 1; q < terms && a[p][p] > 1e-12; ++q) {
        const double factor = a[q][p] / a[p][p];
        for (int r = p; r < terms; ++r) a[q][r] -= factor * a[p][r];
        t[q] -= factor * t[p];
      }
    }
    for (int p = terms - 1; p >= 0; --p) {
      for (int q = p + 1; q < terms; ++q) t[p] -= a[p][q] * t[q];
      t[p] = a[p][p] > 1e-12 ? t[p] / a[p][p] : 0;
    }
  }

  double error(const double* values) const {
    double sum = 0;
    for (int p = 0; p < terms; ++p) {
      double row = -2 * b[p];
      for (int q = 0; q < terms; ++q) row += g[p][q] * values[q];
      sum += row * values[p];
    }
    return sum;
  }
};

int within(double value) { return static_cast<int>(std::clamp(value, double(kLeast), double(kLargest))); }

/// Try t rounded at one exponent: to the nearest, or (pick) each to either neighbour.
void try_exponent(const Fit& fit, int seed, int exponent, int offset, bool pick, Choice& best) {
  const double step = std::ldexp(1.0, exponent + offset);
  for (int mask = 0; mask < (pick ? 1 << fit.terms : 1); ++mask) {
    int t[kMostTerms];
    double values[kMostTerms];
    for (int p = 0; p < fit.terms; ++p) {
      const double exact = fit.t[p] / step;
      t[p] = within(pick ? std::floor(exact) + (mask >> p & 1) : std::nearbyint(exact));
      values[p] = t[p] * step;
    }
    const double error = fit.error(values);
    if (error < best.error) {
      best.error = error, best.seed = seed, best.exponent = exponent;
      std::copy_n(t, fit.terms, best.t);
    }
  }
}

/// The least exponent at which the largest of t fits, and the one below, which cuts it off.
void try_seed(const float* w, const SeedMatrix& shape, int seed, bool pick, Choice& best) {
  const Fit fit(seed, shape.block_inputs(), shape.terms(), w);
  double largest = 0;
  for (int p = 0; p < fit.terms; ++p) largest = std::max(largest, std::abs(fit.t[p]));
  if (!(largest > 0)) return;
  const int needed = static_cast<int>(std::ceil(std::log2(largest / kLargest))) - shape.offset;
  for (int exponent = needed - 1; exponent <= needed; ++exponent) {
    try_exponent(fit, seed, std::clamp(exponent, 0, kExponents - 1), shape.offset, pick, best);
  }
}

void write(const SeedMatrix& shape, int lane, const Choice& choice, uint8_t* unit) {
  uint32_t word = choice.seed;
  for (int p = 0; p < shape.terms(); ++p) word |= static_cast<uint32_t>(choice.t[p] & 15) << (16 + 4 * p);
  if (shape.bits == 4) word |= static_cast<uint32_t>(choice.exponent) << 28;
  std::memcpy(unit + 4 * lane, &word, sizeof word);
  if (shape.bits == 3) unit[4 * kSeedRows + lane % 8] |= static_cast<uint8_t>(choice.exponent << (lane / 8 * 4));
}

/// A tile's worth of units: 16 rows' blocks each, next to each other in the layout.
class Units {
 public:
  Units(const SeedMatrix& shape, const float* w, int candidates, int64_t first, int64_t last)
      : shape_(shape), inputs_(shape.block_inputs()), candidates_(candidates), first_(first), last_(last) {
    const int64_t lanes = (last - first) * kSearchLanes;
    w_.resize(lanes * inputs_);
    energies_.resize(lanes * candidates);
    seeds_.resize(lanes * candidates);
    worst_.resize(lanes);
    for (int64_t unit = first; unit < last; ++unit) load(w, unit);
  }

  void scan() {
    const std::vector<float>& bases = bases_of(shape_.bits);
    for (int start = 1; start <= kSeedStates; start += kTileSeeds) {
      const int end = std::min(start + kTileSeeds, kSeedStates + 1);
      for (int64_t i = 0; i < last_ - first_; ++i) {
        const int64_t lanes = i * kSearchLanes;
        const Best best{&energies_[lanes * candidates_], &seeds_[lanes * candidates_], &worst_[lanes], candidates_};
        tiles().scan(&bases[start * inputs_ * shape_.terms()], inputs_, start, end, &w_[lanes * inputs_], best);
      }
    }
  }

  void choose(bool pick, uint8_t* codes) {
    for (int64_t unit = first_; unit < last_; ++unit) {
      for (int lane = 0; lane < kSearchLanes; ++lane) {
        const int64_t i = (unit - first_) * kSearchLanes + lane;
        float w[kMostInputs];
        for (int c = 0; c < inputs_; ++c) w[c] = w_[((unit - first_) * inputs_ + c) * kSearchLanes + lane];
        uint16_t* seeds = &seeds_[i * candidates_];
        std::sort(seeds, seeds + candidates_);
        Choice best;
        for (int k = 0; k < candidates_; ++k) {
          if (seeds[k]) try_seed(w, shape_, seeds[k], pick, best);
        }
        write(shape_, lane, best, codes + unit * shape_.unit_bytes());
      }
    }
  }

 private:
  void load(const float* w, int64_t unit) {
    const int64_t row = unit / shape_.row_blocks() * kSeedRows, start = unit % shape_.row_blocks() * inputs_;
    float* to = &w_[(unit - first_) * kSearchLanes * inputs_];
    for (int64_t lane = 0; lane < kSearchLanes && row + lane < shape_.rows; ++lane) {
      for (int64_t c = 0; c < inputs_ && start + c < shape_.columns; ++c) {
        to[c * kSearchLanes + lane] = w[(row + lane) * shape_.columns + start + c];
      }
    }
  }

  const SeedMatrix shape_;
  const int inputs_, candidates_;
  const int64_t first_, last_;
  std::vector<float> w_, energies_, worst_;
  std::vector<uint16_t> seeds_;
};

}  // namespace

void seed_encode(const SeedMatrix& shape, const float* w, int candidates, bool pick, uint8_t* codes, int threads) {
  std::fill_n(codes, shape.codes_bytes(), uint8_t{0});
  bases_of(shape.bits);
  parallel_for(shape.blocks() * shape.row_blocks(), kTileUnits, threads, [&](int64_t first, int64_t last) {
    for (; first < last; first += kTileUnits) {
      Units units(shape, w, candidates, first, std::min(first + kTileUnits, last));
      units.scan();
      units.choose(pick, codes);
    }
  });
}

}  // namespace lilliput
