#include "decoder_walk.hpp"

#include <cstring>

#include "isa.hpp"

namespace lilliput {
namespace {

constexpr int64_t kStepsPerThread = 6;

const DecoderTiles& tiles() { return decoder_tiles(); }

int64_t blocks_of(const Matrix& matrix) {
  return std::visit([](const auto& m) { return m.blocks(); }, matrix);
}

int64_t rows_of(const Matrix& matrix) {
  return std::visit([](const auto& m) { return m.rows; }, matrix);
}

int64_t columns_of(const Matrix& matrix) {
  return std::visit([](const auto& m) { return m.columns; }, matrix);
}

/// A function for each kind of matrix.
template <class... Cases>
struct ByInput : Cases... {
  using Cases::operator()...;
};
template <class... Cases>
ByInput(Cases...) -> ByInput<Cases...>;

int64_t block_rows_of(const Matrix& matrix) {
  return std::visit([](const auto& m) { return m.block_rows; }, matrix);
}

/// The matrix whose pieces of activations a product reads, if any.
std::optional<PackedMatrix> like_of(const Matrix& matrix) {
  if (const auto* packed = std::get_if<PackedMatrix>(&matrix)) return *packed;
  if (const auto* codebook = std::get_if<CodebookMatrix>(&matrix)) return codebook->packed();
  return std::nullopt;
}

}  // namespace

const DecoderTiles& decoder_tiles() {
#if defined(LILLIPUT_X86)
  if (isa() == Isa::avx512) return decoder_avx512;
  if (isa() == Isa::avx2) return decoder_avx2;
#endif
  return decoder_scalar;
}

// --- memory ------------------------------------------------------------------------------------------------------

namespace {

/// The largest sizes that any step needs, per token.
struct Sizes {
  int64_t q = 0, kv = 0, head_dim = 0, middle = 0, between = 0, input = 0, pieces = 0, tables = 0, sparse = 0;

  void see(const Linear& linear) {
    for (const Matrix& m : linear.factors) {
      input = std::max(input, columns_of(m));
      if (const auto like = like_of(m)) pieces = std::max(pieces, like->pieces());
      if (const auto* lookup = std::get_if<LookupMatrix>(&m)) tables = std::max(tables, lookup->pieces());
      if (&m != &linear.factors.back()) between = std::max(between, rows_of(m));
    }
  }

  void see(const Block& b) {
    for (const Linear* l : {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down}) see(*l);
    q = std::max(q, b.heads * b.head_dim);
    kv = std::max(kv, b.kv_heads * b.head_dim);
    head_dim = std::max(head_dim, b.head_dim);
    middle = std::max(middle, rows_of(b.gate.factors.back()));
    if (b.sparse) sparse = std::max(sparse, b.sparse->neurons());
  }
};

void grow_inputs(InputRoom& room, const Sizes& sizes, int64_t tokens) {
  for (int i = 0; i < kProducts; ++i) {
    room.floats[i].of(tokens * sizes.input);
    room.pieces[i].of(tokens * sizes.pieces);
    room.tables[i].of(tokens * sizes.tables);
  }
}

}  // namespace

void Workspace::grow(const Decoder& decoder, int64_t width, const Linear& head, int64_t tokens, int64_t keys,
                     int threads) {
  Sizes sizes;
  sizes.see(head);
  for (const Block& block : decoder.blocks()) sizes.see(block);
  for (Room<float>* room : {&q, &attended}) room->of(tokens * sizes.q);
  for (Room<float>* room : {&k, &v}) room->of(tokens * sizes.kv);
  for (Room<float>* room : {&gate, &up}) room->of(tokens * sizes.middle);
  for (auto& pair : between) {
    for (Room<float>& room : pair) room.of(tokens * sizes.between);
  }
  for (Room<float>* room : {&summand, &normed}) room->of(tokens * width);
  hidden_values.of(tokens * sizes.sparse);
  hidden_index.of(tokens * sizes.sparse);
  hidden_count.of(tokens);
  if (tokens > kOwnTokens) grow_inputs(inputs, sizes, tokens);
  if (static_cast<int>(own.size()) < threads) own.resize(threads);
  for (Own& each : own) {
    grow_inputs(each.inputs, sizes, std::min(tokens, kOwnTokens));  // also of the head of a prompt
    each.scores.of(std::min<int64_t>(tokens, kQueries) * (score_room(keys) + sizes.head_dim));
  }
}

// --- products ----------------------------------------------------------------------------------------------------

/// The distinct inputs of a step; input_of[i] is the one that product i reads.
int Walk::collect_inputs(const Product* products, int count, Input* inputs, int* input_of) const {
  int found = 0;
  for (int i = 0; i < count; ++i) {
    const auto like = like_of(*products[i].matrix);
    const auto* tables_like = std::get_if<LookupMatrix>(products[i].matrix);
    const auto serves = [&](const Input& input) {
      return input.source == products[i].source && (!like || !input.like || same_pieces(*input.like, *like)) &&
             (!tables_like || !input.tables_like || same_pieces(*input.tables_like, *tables_like));
    };
    int j = 0;
    while (j < found && !serves(inputs[j])) ++j;
    if (j == found) inputs[found++] = {products[i].source, std::nullopt, nullptr, nullptr, nullptr, nullptr};
    if (like && !inputs[j].like) inputs[j].like = like;
    if (tables_like && !inputs[j].tables_like) inputs[j].tables_like = tables_like;
    input_of[i] = j;
  }
  return found;
}

/// Computes an input for the tokens first .. last-1 into slot `slot` of a room.
void Walk::fill(Input& input, InputRoom& room, int slot, int64_t first, int64_t last) {
  const Source& source = *input.source;
  const bool plain = !source.norm && !source.up;
  float* floats = room.floats[slot].data();
  for (int64_t t = first; t < last; ++t) {
    const float* x = source.x + t * source.width;
    float* y = floats + t * source.width;
    if (source.norm) tiles().rms_norm(x, *source.norm, source.width, y);
    if (source.up) tiles().gate(source.activation, x, source.up + t * source.width, source.width, y);
    const float* ready = plain ? x : y;
    if (input.like) prepare(*input.like, ready, 1, room.pieces[slot].data() + t * input.like->pieces());
    if (input.tables_like) {
      prepare(*input.tables_like, ready, 1, room.tables[slot].data() + t * input.tables_like->pieces());
    }
  }
  input.x = plain ? source.x : floats;
  input.pieces = room.pieces[slot].data();
  input.tables = room.tables[slot].data();
}

void Walk::multiply_part(const Product& product, const Input& input, int64_t first, int64_t last, int64_t tokens) {
  const auto with = [&](const auto& matrix, const auto* x) { multiply(matrix, x, tokens, first, last, product.y); };
  std::visit(ByInput{
                 [&](const DenseMatrix& m) { with(m, input.x); },
                 [&](const SeedMatrix& m) { with(m, input.x); },
                 [&](const PackedMatrix& m) { with(m, input.pieces); },
                 [&](const CodebookMatrix& m) { with(m, input.pieces); },
                 [&](const LookupMatrix& m) { with(m, input.tables); },
             },
             *product.matrix);
  const int64_t rows = rows_of(*product.matrix), size = block_rows_of(*product.matrix);
  const int64_t start = first * size, end = std::min(rows, last * size);
  for (int64_t t = 0; t < tokens && (product.bias || product.add_to); ++t) {
    float* y = product.y + t * rows;
    for (int64_t r = start; r < end && product.bias; ++r) y[r] += product.bias[r];
    for (int64_t r = start; r < end && product.add_to; ++r) product.add_to[t * rows + r] += y[r];
  }
}

void Walk::multiply_step(const Product* products, int count, int64_t tokens) {
  Input inputs[kProducts];
  int input_of[kProducts];
  const int distinct = collect_inputs(products, count, inputs, input_of);
  const bool own = tokens <= kOwnTokens;  // each thread fills its own inputs when it gets its first unit
  InputRoom& room = own ? room_.own[walker_.thread()].inputs : room_.inputs;
  const auto fill_all = [&](int64_t first, int64_t last) {
    for (int i = 0; i < distinct; ++i) fill(inputs[i], room, i, first, last);
  };
  if (!own) {
    walker_.share(tokens, 4, fill_all);
    fill_all(0, 0);  // a thread that prepared nothing learns where the others wrote
  }
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) blocks += blocks_of(*products[i].matrix);
  const int64_t grain = (blocks / (walker_.threads() * kStepsPerThread) + 2) / 2 * 2;
  bool filled = !own;
  walker_.share(blocks, grain, [&](int64_t first, int64_t last) {
    if (!filled) fill_all(0, tokens);
    filled = true;
    int64_t start = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t size = blocks_of(*products[i].matrix);
      const int64_t from = std::max<int64_t>(first - start, 0), to = std::min(last - start, size);
      if (from < to) multiply_part(products[i], inputs[input_of[i]], from, to, tokens);
      start += size;
    }
  });
}

void Walk::apply(std::initializer_list<const Linear*> linears, std::initializer_list<float*> outputs,
                 const Source& source, int64_t tokens, float* add_to) {
  Source between[kProducts][2];
  const Source* reads[kProducts] = {&source, &source, &source};
  size_t longest = 1;
  for (const Linear* linear : linears) longest = std::max(longest, linear->factors.size());
  for (size_t left = longest; left-- > 0;) {  // factors that come after this step
    Product products[kProducts];
    int count = 0, i = 0;
    for (const Linear* linear : linears) {
      if (left < linear->factors.size()) {
        const Matrix& matrix = linear->factors[linear->factors.size() - 1 - left];
        float* y = left ? room_.between[i][left % 2].data() : outputs.begin()[i];
        products[count++] = {&matrix, left ? nullptr : linear->bias, reads[i], y, left ? nullptr : add_to};
        between[i][left % 2] = {y, rows_of(matrix)};
        reads[i] = &between[i][left % 2];
      }
      ++i;
    }
    multiply_step(products, count, tokens);
  }
}

void Walk::add_output(const Linear& linear, const Norm& norm, const Source& source) {
  apply({&linear}, {room_.summand.data()}, source, call_.tokens, norm.weight ? nullptr : call_.hidden);
  if (norm.weight) add_summand(norm);
}

void Walk::add_summand(const Norm& norm) {
  float *y = room_.summand.data(), *hidden = call_.hidden;
  const int64_t width = decoder_.width_;
  walker_.share(call_.tokens, 4, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      if (norm.weight) tiles().rms_norm(y + t * width, norm, width, y + t * width);
    }
    for (int64_t i = first * width; i < last * width; ++i) hidden[i] += y[i];
  });
}

// --- blocks ------------------------------------------------------------------------------------------------------

/// Norms and rotates the queries and keys of a token; its keys and values go to the cache.
void Walk::place_token(const Block& block, size_t index, int64_t token) {
  const int64_t dim = block.head_dim, width = block.kv_heads * dim;
  const Place& place = call_.places[token];
  const Sequence& sequence = call_.sequences[place.sequence];
  const Rotary& rotary = call_.rotaries[block.rotary];
  const float *cos = rotary.cos + place.position * dim, *sin = rotary.sin + place.position * dim;
  const auto turn = [&](float* x, const Norm& norm, float scaling) {
    if (norm.weight) tiles().rms_norm(x, norm, dim, x);
    tiles().rotate(x, cos, sin, dim, scaling);
  };
  float *q = room_.q.data() + token * block.heads * dim, *k = room_.k.data() + token * width;
  const float* v = room_.v.data() + token * width;
  for (int64_t h = 0; h < block.heads; ++h) turn(q + h * dim, block.query_norm, block.scaling);
  for (int64_t h = 0; h < block.kv_heads; ++h) {
    turn(k + h * dim, block.key_norm, 1.0f);
    const int64_t to = (h * sequence.length + place.position) * dim;
    std::memcpy(sequence.caches[index].keys + to, k + h * dim, dim * sizeof(float));
    std::memcpy(sequence.caches[index].values + to, v + h * dim, dim * sizeof(float));
  }
}

void Walk::attend(const Block& block, size_t index, int64_t head, const Tile& tile) {
  const Place& place = call_.places[tile.first];
  const Sequence& sequence = call_.sequences[place.sequence];
  const int64_t width = block.heads * block.head_dim, at = tile.first * width + head * block.head_dim;
  const int64_t kv = head / (block.heads / block.kv_heads) * sequence.length * block.head_dim;
  const Cache& cache = sequence.caches[index];
  tiles().attend({room_.q.data() + at, width, tile.count, place.position, cache.keys + kv, cache.values + kv,
                  block.head_dim, block.window, room_.attended.data() + at},
                 room_.own[walker_.thread()].scores.data());
}

void Walk::attention(const Block& block, size_t index) {
  const Source normed{call_.hidden, decoder_.width_, &block.attention_norm};
  apply({&block.q, &block.k, &block.v}, {room_.q.data(), room_.k.data(), room_.v.data()}, normed, call_.tokens);
  walker_.share(call_.tokens, 4, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) place_token(block, index, t);
  });
  const int64_t count = static_cast<int64_t>(call_.tiles.size());
  walker_.share(block.heads * count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) attend(block, index, i / count, call_.tiles[i % count]);
  });
  const Source attended{room_.attended.data(), block.heads * block.head_dim};
  add_output(block.o, block.after_attention_norm, attended);
}

/// The neurons that fired need the normed input as floats: it is made once for all threads.
void Walk::sparse_feed_forward(const Block& block) {
  const int64_t width = decoder_.width_;
  float *normed = room_.normed.data(), *gate = room_.gate.data();
  walker_.share(call_.tokens, 4, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      tiles().rms_norm(call_.hidden + t * width, block.mlp_norm, width, normed + t * width);
    }
  });
  apply({&block.gate}, {gate}, Source{normed, width}, call_.tokens);
  const Fired fired{room_.hidden_index.data(), room_.hidden_values.data(), room_.hidden_count.data()};
  sparse_ffn(*block.sparse, normed, gate, call_.tokens, room_.summand.data(), fired, walker_);
  add_summand(block.after_mlp_norm);
}

void Walk::feed_forward(const Block& block) {
  if (block.sparse) return sparse_feed_forward(block);
  const Source normed{call_.hidden, decoder_.width_, &block.mlp_norm};
  apply({&block.gate, &block.up}, {room_.gate.data(), room_.up.data()}, normed, call_.tokens);
  const Source gated{room_.gate.data(), rows_of(block.gate.factors.back()), nullptr, room_.up.data(), block.activation};
  add_output(block.down, block.after_mlp_norm, gated);
}

void Walk::go() {
  for (size_t i = 0; i < decoder_.blocks_.size(); ++i) {
    attention(decoder_.blocks_[i], i);
    feed_forward(decoder_.blocks_[i]);
  }
  if (call_.first_logits >= call_.tokens) return;
  const Source normed{call_.hidden + call_.first_logits * decoder_.width_, decoder_.width_, &decoder_.norm_};
  apply({&decoder_.head_}, {call_.logits}, normed, call_.tokens - call_.first_logits);
}

}  // namespace lilliput
