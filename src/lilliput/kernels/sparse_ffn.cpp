#include "sparse_ffn.hpp"

#include <algorithm>
#include <vector>

#include "isa.hpp"
#include "sparse_ffn_tiles.hpp"

namespace lilliput {
namespace {

constexpr int64_t kTogether = 32;          // tokens that share the rows that a cache holds
constexpr int64_t kCacheBytes = 128 * 1024;  // of rows that all tokens go through before the next ones are read
constexpr int64_t kThreadBytes = 256 * 1024;  // of both matrices, times tokens: less is not worth another thread
constexpr int64_t kUnitsPerThread = 6;

const SparseFfnTiles& tiles() {
#if defined(LILLIPUT_X86)
  if (isa() == Isa::avx512) return sparse_ffn_avx512;
  if (isa() == Isa::avx2) return sparse_ffn_avx2;
#endif
  return sparse_ffn_scalar;
}

/// Where the neurons first .. last-1 stand in the list of a token.
struct Part {
  int64_t begin, count;
};

Part part_of(const int32_t* index, int64_t count, int64_t first, int64_t last) {
  const int32_t* begin = std::lower_bound(index, index + count, first);
  return {begin - index, std::lower_bound(begin, index + count, last) - begin};
}

/// Neurons whose rows go through all tokens at once; all of them when there is one token.
int64_t neurons_together(const RowMatrix& m, int64_t tokens) {
  return tokens == 1 ? std::max<int64_t>(1, m.rows) : std::max<int64_t>(16, kCacheBytes / std::max<int64_t>(1, m.row_bytes()));
}

int64_t grain(int64_t count, const Walker& walker, int64_t units_per_thread) {
  return std::max<int64_t>(1, count / (walker.threads() * units_per_thread));
}

}  // namespace

void sparse_ffn(const SparseFfn& ffn, const float* x, const float* gate, int64_t tokens, float* y, const Fired& fired,
                Walker& walker) {
  const int64_t neurons = ffn.neurons(), outputs = ffn.down.columns;
  walker.share(tokens, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t at = t * neurons;
      fired.count[t] = tiles().compact(gate + at, neurons, ffn.rectified, ffn.shift, fired.index + at, fired.value + at);
    }
  });
  if (ffn.up) {
    const int64_t together = std::min(neurons_together(*ffn.up, tokens), grain(neurons, walker, kUnitsPerThread));
    walker.share(neurons, together, [&](int64_t first, int64_t last) {
      for (int64_t start = first; start < last; start += together) {
        for (int64_t t = 0; t < tokens; ++t) {
          const int32_t* index = fired.index + t * neurons;
          const Part part = part_of(index, fired.count[t], start, std::min(last, start + together));
          tiles().dot(*ffn.up, index + part.begin, part.count, x + t * ffn.up->columns, ffn.up_bias,
                      fired.value + t * neurons + part.begin);
        }
      }
    });
  }
  const int64_t together = neurons_together(ffn.down, tokens);
  walker.share(ffn.down.chunks(), (ffn.down.chunks() + walker.threads() - 1) / walker.threads(), [&](int64_t first, int64_t last) {
    const int64_t from = first * kChunkColumns, end = std::min(outputs, last * kChunkColumns);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = from; c < end; ++c) y[t * outputs + c] = ffn.down_bias ? ffn.down_bias[c] : 0.0f;
    }
    for (int64_t start = 0; start < neurons; start += together) {
      for (int64_t t = 0; t < tokens; ++t) {
        const int32_t* index = fired.index + t * neurons;
        const Part part = part_of(index, fired.count[t], start, std::min(neurons, start + together));
        tiles().add(ffn.down, index + part.begin, fired.value + t * neurons + part.begin, part.count, first, last,
                    y + t * outputs);
      }
    }
  });
}

void sparse_ffn(const SparseFfn& ffn, const float* x, const float* gate, int64_t tokens, float* y, int threads) {
  const int64_t neurons = ffn.neurons(), room = std::min(tokens, kTogether) * neurons;
  thread_local std::vector<int32_t> index;
  thread_local std::vector<float> value;
  if (static_cast<int64_t>(index.size()) < room) index.resize(room), value.resize(room);
  int64_t count[kTogether];
  const int64_t bytes = neurons * (ffn.down.row_bytes() + (ffn.up ? ffn.up->row_bytes() : 0));
  for (int64_t start = 0; start < tokens; start += kTogether) {
    struct Region {
      const SparseFfn& ffn;
      const float *x, *gate;
      int64_t tokens;
      float* y;
      Fired fired;
      Steps steps;
    };
    const int64_t now = std::min(kTogether, tokens - start);
    const int used = static_cast<int>(std::clamp<int64_t>(bytes * now / kThreadBytes, 1, threads));
    Region region{ffn,
                  ffn.up ? x + start * ffn.up->columns : x,
                  gate + start * neurons,
                  now,
                  y + start * ffn.down.columns,
                  {index.data(), value.data(), count},
                  Steps(used)};
    run_on_threads(
        used,
        [](void* context, int thread) {
          Region& r = *static_cast<Region*>(context);
          Walker walker(r.steps, thread);
          sparse_ffn(r.ffn, r.x, r.gate, r.tokens, r.y, r.fired, walker);
        },
        &region);
  }
}

}  // namespace lilliput
