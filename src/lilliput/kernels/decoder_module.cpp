// The decoder as Python sees it: addresses and sizes; decoder.py checks them and keeps the memory alive.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "decoder.hpp"
#include "decoder_tiles.hpp"
#include "sparse_ffn_module.hpp"

namespace nb = nanobind;

namespace lilliput {
namespace {

// A factor is (format, addresses of weights or codes, of the grid and of tables, rows, columns, group, bits, offset).
using FactorRow = std::tuple<std::string, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int, int>;
using LinearRow = std::tuple<std::vector<FactorRow>, uintptr_t>;  // factors, first one first; address of the bias
using NormRow = std::tuple<uintptr_t, float, float>;              // address of the weight, epsilon, offset
using Addresses = std::vector<std::tuple<uintptr_t, uintptr_t>>;

Matrix matrix(const FactorRow& row) {
  const auto& [format, weights, grid_at, tables, rows, columns, group, bits, offset] = row;
  const auto* codes = at<const uint8_t>(weights);
  const auto* grid = at<const uint16_t>(grid_at);
  if (format == "integer") return PackedMatrix{codes, grid, rows, columns, group, bits};
  if (format == "lookup") return LookupMatrix{codes, grid, rows, columns, group, bits};
  if (format == "seeds") return SeedMatrix{codes, rows, columns, bits, offset};
  if (format == "codebook" || format == "codebooks") {
    return CodebookMatrix{codes, grid, at<const int8_t>(tables), rows, columns, group, bits, format == "codebook"};
  }
  if (format != "float32" && format != "bfloat16") throw std::invalid_argument("unknown format of weights: " + format);
  return DenseMatrix{at<const void>(weights), rows, columns, format == "bfloat16"};
}

Linear linear(const LinearRow& row) {
  Linear made{{}, at<const float>(std::get<1>(row))};
  for (const FactorRow& factor : std::get<0>(row)) made.factors.push_back(matrix(factor));
  return made;
}

Norm norm(const NormRow& row) { return {at<const float>(std::get<0>(row)), std::get<1>(row), std::get<2>(row)}; }

Activation activation(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  throw std::invalid_argument("unknown activation: " + name);
}

/// Norms: of the attention, the queries, the keys, after the attention, of the MLP, after it. Linears: q, k, v, o, gate,
/// up, down. `sparse` is empty, or holds what stands in the place of up and down.
void add_block(Decoder& decoder, const std::vector<NormRow>& n, const std::vector<LinearRow>& l, int64_t heads,
               int64_t kv_heads, int64_t head_dim, float scaling, int64_t window, int rotary, const std::string& name,
               const std::vector<SparseRow>& sparse) {
  std::optional<SparseFfn> part;
  if (!sparse.empty()) part = sparse_part(sparse[0]);
  if (n.size() != 6 || l.size() != 7) throw std::invalid_argument("a block has 6 norms and 7 linear layers");
  decoder.add_block({norm(n[0]), norm(n[1]), norm(n[2]), norm(n[3]), norm(n[4]), norm(n[5]), linear(l[0]), linear(l[1]),
                     linear(l[2]), linear(l[3]), linear(l[4]), linear(l[5]), linear(l[6]), heads, kv_heads, head_dim,
                     scaling, window, rotary, activation(name), part});
}

/// Caches: addresses of the tables of keys and values of each sequence; rotaries: of cosines and sines.
void run(Decoder& decoder, uintptr_t places, int64_t tokens, uintptr_t hidden,
         const std::vector<std::tuple<uintptr_t, int64_t>>& caches, const Addresses& rotaries, uintptr_t logits,
         int64_t first_logits, int threads) {
  std::vector<Sequence> sequences;
  for (const auto& [table, length] : caches) sequences.push_back({at<const Cache>(table), length});
  std::vector<Rotary> tables;
  for (const auto& [cos, sin] : rotaries) tables.push_back({at<const float>(cos), at<const float>(sin)});
  const nb::gil_scoped_release others_may_run;
  decoder.run(at<const Place>(places), tokens, at<float>(hidden), sequences.data(), tables.data(), at<float>(logits),
              first_logits, threads);
}

// The steps one by one, all tensors contiguous: to compare a walk with, to the bit.

void norm_rows(uintptr_t x, int64_t rows, int64_t width, const NormRow& row) {
  for (int64_t r = 0; r < rows; ++r) {
    decoder_tiles().rms_norm(at<const float>(x) + r * width, norm(row), width, at<float>(x) + r * width);
  }
}

void gate_values(const std::string& name, uintptr_t gate, uintptr_t up, int64_t count) {
  decoder_tiles().gate(activation(name), at<const float>(gate), at<const float>(up), count, at<float>(gate));
}

/// x (tokens, heads, dim), cos and sin (tokens, dim)
void rotate_heads(uintptr_t x, int64_t tokens, int64_t heads, int64_t dim, uintptr_t cos, uintptr_t sin, float scaling) {
  for (int64_t i = 0; i < tokens * heads; ++i) {
    const int64_t from = i / heads * dim;
    decoder_tiles().rotate(at<float>(x) + i * dim, at<const float>(cos) + from, at<const float>(sin) + from, dim, scaling);
  }
}

/// queries and out (tokens, heads, dim), keys and values (kv_heads, length, dim)
void attend_heads(uintptr_t queries, int64_t tokens, int64_t heads, int64_t dim, int64_t position, uintptr_t keys,
                  uintptr_t values, int64_t kv_heads, int64_t length, int64_t window, uintptr_t out) {
  std::vector<float> scores(kQueries * (score_room(position + tokens) + dim));
  for (int64_t t = 0; t < tokens; t += kQueries) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t from = (t * heads + h) * dim, kv = h / (heads / kv_heads) * length * dim;
      const int count = static_cast<int>(tokens - t < kQueries ? tokens - t : kQueries);
      decoder_tiles().attend({at<const float>(queries) + from, heads * dim, count, position + t,
                              at<const float>(keys) + kv, at<const float>(values) + kv, dim, window,
                              at<float>(out) + from},
                             scores.data());
    }
  }
}

void dense_rows(uintptr_t weights, int64_t rows, int64_t columns, bool bfloat16, uintptr_t x, int64_t tokens, uintptr_t y) {
  const DenseMatrix dense{at<const void>(weights), rows, columns, bfloat16};
  multiply(dense, at<const float>(x), tokens, 0, dense.blocks(), at<float>(y));
}

void bind(nb::module_& m) {
  m.def("norm_rows", &norm_rows);
  m.def("gate_values", &gate_values);
  m.def("rotate_heads", &rotate_heads);
  m.def("attend_heads", &attend_heads);
  m.def("dense_rows", &dense_rows);
  nb::class_<Decoder>(m, "Decoder")
      .def("__init__",
           [](Decoder* self, int64_t width, const NormRow& final_norm, const LinearRow& head) {
             new (self) Decoder(width, norm(final_norm), linear(head));
           })
      .def("add_block", &add_block)
      .def("run", &run);
}

const Binding binding(bind);

}  // namespace
}  // namespace lilliput
