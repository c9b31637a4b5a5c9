#include "decoder.hpp"

#include <utility>

#include "decoder_walk.hpp"
#include "isa.hpp"

namespace lilliput {
namespace {

const DenseLinearTiles& dense_tiles() {
#if defined(LILLIPUT_X86)
  if (isa() == Isa::avx512) return dense_linear_avx512;
  if (isa() == Isa::avx2) return dense_linear_avx2;
#endif
  return dense_linear_scalar;
}

/// Neighbours of one sequence, up to kQueries of them.
std::vector<Tile> tiles_of(const Place* places, int64_t tokens) {
  std::vector<Tile> tiles;
  for (int64_t t = 0; t < tokens; ++t) {
    const bool same = t > 0 && places[t].sequence == places[t - 1].sequence;
    if (same && tiles.back().count < kQueries) {
      ++tiles.back().count;
    } else {
      tiles.push_back({t, 1});
    }
  }
  return tiles;
}

}  // namespace

void multiply(const DenseMatrix& matrix, const float* x, int64_t tokens, int64_t first_block, int64_t last_block, float* y) {
  dense_tiles().multiply(matrix, x, tokens, first_block, last_block, y);
}

Decoder::Decoder(int64_t width, Norm norm, Linear head)
    : width_(width), norm_(norm), head_(std::move(head)), workspace_(new Workspace) {}

Decoder::~Decoder() = default;

void Decoder::add_block(Block block) { blocks_.push_back(std::move(block)); }

void Decoder::run(const Place* places, int64_t tokens, float* hidden, const Sequence* sequences, const Rotary* rotaries,
                  float* logits, int64_t first_logits, int threads) {
  const std::lock_guard<std::mutex> alone(busy_);
  int64_t keys = 0;
  for (int64_t t = 0; t < tokens; ++t) keys = std::max(keys, places[t].position + 1);
  workspace_->grow(*this, width_, head_, std::min(tokens, kTogether), keys, threads);
  const int64_t vocabulary = std::visit([](const auto& m) { return m.rows; }, head_.factors.back());
  for (int64_t start = 0; start < tokens; start += kTogether) {
    const int64_t count = std::min(kTogether, tokens - start);
    const int64_t wanted = std::max<int64_t>(first_logits - start, 0);
    const Call call{places + start, count, hidden + start * width_, sequences, rotaries,
                    logits + (start + wanted - first_logits) * vocabulary, wanted, tiles_of(places + start, count)};
    Steps steps(threads);
    struct Region {
      Decoder& decoder;
      const Call& call;
      Steps& steps;
    } region{*this, call, steps};
    run_on_threads(
        threads,
        [](void* context, int thread) {
          const Region& r = *static_cast<Region*>(context);
          Walk(r.decoder, r.call, r.steps, thread).go();
        },
        &region);
  }
}

}  // namespace lilliput
