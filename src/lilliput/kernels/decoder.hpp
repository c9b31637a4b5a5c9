// A decoder-only language model run natively: all blocks for some new tokens in one call, by threads that walk together.
//
// Nothing is copied: weights and the cache of keys and values stay where their owner keeps them. Activations are float32.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <variant>
#include <vector>

#include "codebook_linear.hpp"
#include "dense_linear.hpp"
#include "group_linear.hpp"
#include "lookup_linear.hpp"
#include "seed_linear.hpp"
#include "sparse_ffn.hpp"

namespace lilliput {

/// x / sqrt(mean(x^2) + epsilon) (offset + weight); there is none when weight is null.
struct Norm {
  const float* weight;
  float epsilon, offset;
};

using Matrix = std::variant<DenseMatrix, PackedMatrix, CodebookMatrix, LookupMatrix, SeedMatrix>;

/// y = factors.back() ... factors.front() x + bias (null: none).
struct Linear {
  std::vector<Matrix> factors;
  const float* bias;
};

enum class Activation { silu, gelu_tanh, relu };

/// One block; norms that a family lacks are null. With `sparse` the feed-forward part is the gate and that; up and down
/// have no factors then.
struct Block {
  Norm attention_norm, query_norm, key_norm, after_attention_norm, mlp_norm, after_mlp_norm;
  Linear q, k, v, o, gate, up, down;
  int64_t heads, kv_heads, head_dim;
  float scaling;   // of queries
  int64_t window;  // keys that a query may see
  int rotary;      // index of the table of its rotary embedding
  Activation activation;
  std::optional<SparseFfn> sparse;
};

/// Cosines and sines (positions, head_dim) of a rotary embedding.
struct Rotary {
  const float *cos, *sin;
};

/// Keys and values (kv_heads, length, head_dim) of one sequence in one block.
struct Cache {
  float *keys, *values;
};

/// A sequence: its caches, one a block, and their length.
struct Sequence {
  const Cache* caches;
  int64_t length;
};

/// Where a token stands.
struct Place {
  int64_t sequence, position;
};

class Workspace;

class Decoder {
 public:
  Decoder(int64_t width, Norm norm, Linear head);
  ~Decoder();

  void add_block(Block block);
  const std::vector<Block>& blocks() const { return blocks_; }

  /// Runs `tokens` tokens with hidden states (tokens, width), which are overwritten, and appends their keys and values to
  /// the caches. Tokens of one sequence stand one after another in ascending positions. logits (tokens -
  /// first_logits, vocabulary) are those of the last tokens.
  void run(const Place* places, int64_t tokens, float* hidden, const Sequence* sequences, const Rotary* rotaries,
           float* logits, int64_t first_logits, int threads);

 private:
  friend class Walk;
  int64_t width_;
  Norm norm_;
  Linear head_;
  std::vector<Block> blocks_;
  std::unique_ptr<Workspace> workspace_;
  std::mutex busy_;
};

}  // namespace lilliput
