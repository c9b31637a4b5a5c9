// One thread's walk through all blocks, and the memory that the threads of a walk share.
#pragma once

#include <algorithm>
#include <array>

#include "decoder.hpp"
#include "decoder_tiles.hpp"
#include "steps.hpp"

namespace lilliput {

constexpr int64_t kTogether = 128;   // tokens of a prompt that go through the blocks together: their activations fit an L2
constexpr int64_t kOwnTokens = 2;    // up to which each thread prepares inputs for itself, which costs less than a step
constexpr int kProducts = 3;         // of one step: q, k and v

/// Grows and never shrinks; contents are lost when it grows.
template <class T>
class Room {
 public:
  T* of(int64_t count) {
    if (static_cast<int64_t>(memory_.size()) < count) memory_ = std::vector<T>(count);
    return memory_.data();
  }
  T* data() { return memory_.data(); }

 private:
  std::vector<T> memory_;
};

/// Rounded and normed inputs of the products of one step.
struct InputRoom {
  std::array<Room<float>, kProducts> floats;
  std::array<Room<Piece>, kProducts> pieces;
  std::array<Room<LookupPiece>, kProducts> tables;
};

class Workspace {
 public:
  struct Own {
    InputRoom inputs;
    Room<float> scores;
  };

  Room<float> q, k, v, attended, gate, up, summand, normed, hidden_values;
  Room<int32_t> hidden_index;
  Room<int64_t> hidden_count;
  std::array<std::array<Room<float>, 2>, kProducts> between;  // two factors of a chain
  InputRoom inputs;
  std::vector<Own> own;  // of each thread

  /// Room for `tokens` tokens at once that see up to `keys` keys.
  void grow(const Decoder& decoder, int64_t width, const Linear& head, int64_t tokens, int64_t keys, int threads);
};

/// Consecutive tokens of one sequence that attend together.
struct Tile {
  int64_t first;
  int count;
};

/// What all threads of a walk know.
struct Call {
  const Place* places;
  int64_t tokens;
  float* hidden;
  const Sequence* sequences;
  const Rotary* rotaries;
  float* logits;  // of the tokens from `first_logits` on
  int64_t first_logits;
  std::vector<Tile> tiles;
};

class Walk {
 public:
  Walk(Decoder& decoder, const Call& call, Steps& steps, int thread)
      : decoder_(decoder), room_(*decoder.workspace_), call_(call), walker_(steps, thread) {}

  void go();

 private:
  /// What a product reads: x, or norm(x), or activation(x) * up; rows of `width`.
  struct Source {
    const float* x;
    int64_t width;
    const Norm* norm = nullptr;
    const float* up = nullptr;
    Activation activation = Activation::silu;
  };
  struct Product {
    const Matrix* matrix;
    const float* bias;
    const Source* source;
    float* y;
    float* add_to;  // which y is added to, may be null
  };
  /// An input as floats and, where a product wants them, as the pieces of one matrix and the tables of another.
  struct Input {
    const Source* source;
    std::optional<PackedMatrix> like;
    const LookupMatrix* tables_like;
    const float* x;
    Piece* pieces;
    LookupPiece* tables;
  };

  void attention(const Block& block, size_t index);
  void feed_forward(const Block& block);
  void sparse_feed_forward(const Block& block);
  void place_token(const Block& block, size_t index, int64_t token);
  void attend(const Block& block, size_t index, int64_t head, const Tile& tile);
  /// outputs[i] = linears[i](source); with `add_to`, which takes one linear, it is added to that.
  void apply(std::initializer_list<const Linear*> linears, std::initializer_list<float*> outputs, const Source& source,
             int64_t tokens, float* add_to = nullptr);
  /// hidden += norm(linear(source))
  void add_output(const Linear& linear, const Norm& norm, const Source& source);
  /// hidden += norm(summand)
  void add_summand(const Norm& norm);
  void multiply_step(const Product* products, int count, int64_t tokens);
  void multiply_part(const Product& product, const Input& input, int64_t first, int64_t last, int64_t tokens);
  int collect_inputs(const Product* products, int count, Input* inputs, int* input_of) const;
  void fill(Input& input, InputRoom& room, int slot, int64_t first, int64_t last);

  Decoder& decoder_;
  Workspace& room_;
  const Call& call_;
  Walker walker_;
};

}  // namespace lilliput
