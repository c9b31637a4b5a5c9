// The inner loop of the search for seeds; compiled once for each instruction set, with LILLIPUT_TILES its name.
#include "seed_search_tiles.hpp"

#include "lanes.hpp"

namespace {

using namespace lilliput;

/// Whether a > b in any lane.
inline bool any_above(Floats a, Floats b) {
#if defined(__AVX512VNNI__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#else
  const Ints above = a > b;
  return (above[0] | above[1] | above[2] | above[3]) != 0;
#endif
}

/// Put a seed in the place of the worst of a block.
void take(Best best, int lane, float energy, uint16_t seed) {
  float* energies = best.energies + lane * best.count;
  int least = 0;
  for (int i = 1; i < best.count; ++i) {
    if (energies[i] < energies[least]) least = i;
  }
  energies[least] = energy;
  best.seeds[lane * best.count + least] = seed;
  float worst = energies[0];
  for (int i = 1; i < best.count; ++i) worst = energies[i] < worst ? energies[i] : worst;
  best.worst[lane] = worst;
}

template <int Inputs, int Terms>
void scan_vector(const float* bases, int first, int last, const float* w, int lane, Best best) {
  Floats x[Inputs], worst;
  for (int c = 0; c < Inputs; ++c) std::memcpy(&x[c], w + c * kSearchLanes + lane, sizeof x[c]);
  std::memcpy(&worst, best.worst + lane, sizeof worst);
  for (int seed = first; seed < last; ++seed, bases += Inputs * Terms) {
    Floats energy = {};
    for (int p = 0; p < Terms; ++p) {
      Floats sum = x[0] * bases[p * Inputs];
#pragma GCC unroll 12
      for (int c = 1; c < Inputs; ++c) sum = fused(x[c], bases[p * Inputs + c], sum);
      energy = fused(sum, sum, energy);
    }
    if (!any_above(energy, worst)) continue;
    for (int i = 0; i < kWidth; ++i) {
      if (energy[i] > worst[i]) take(best, lane + i, energy[i], static_cast<uint16_t>(seed));
    }
    std::memcpy(&worst, best.worst + lane, sizeof worst);
  }
}

void scan(const float* bases, int inputs, int first, int last, const float* w, Best best) {
  for (int lane = 0; lane < kSearchLanes; lane += kWidth) {
    if (inputs == 8) {
      scan_vector<8, 3>(bases, first, last, w, lane, best);
    } else {
      scan_vector<12, 4>(bases, first, last, w, lane, best);
    }
  }
}

}  // namespace

namespace lilliput {

const SeedSearchTiles LILLIPUT_TILES{scan};

}  // namespace lilliput
