// garbling on odd sizes without Python, to be built with sanitizers (test_sanitizers.py): every buffer is exactly as
// large as needed. Evaluated labels must be those of the bits that the gates give in the open.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "garbling.hpp"
#include "isa.hpp"

using namespace lilliput;

namespace {

std::mt19937 generator(0);

std::vector<uint8_t> random_bytes(int64_t count) {
  std::vector<uint8_t> bytes(count);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
  return bytes;
}

void demand(bool fulfilled, const char* what) {
  if (fulfilled) return;
  std::printf("%s: %s\n", isa_name(isa()).c_str(), what);
  std::exit(1);
}

void check_cipher(int64_t blocks) {
  const std::vector<uint8_t> key = random_bytes(16), x = random_bytes(16 * blocks);
  std::vector<uint8_t> all(16 * blocks), one(16);
  encrypt(expand_key(key.data()), x.data(), all.data(), blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    encrypt(expand_key(key.data()), x.data() + 16 * b, one.data(), 1);
    demand(!std::memcmp(one.data(), all.data() + 16 * b, 16), "a block depends on its neighbours");
  }
  hash_labels(expand_key(key.data()), x.data(), all.data(), blocks, 7);
}

void check_gates(int64_t inputs, int64_t count) {
  std::vector<uint8_t> kinds(count), secrets{1, 0, 1};
  std::vector<int32_t> left(count), right(count);
  std::vector<int> value(inputs + count);
  int64_t ands = 0;
  for (int64_t i = 0; i < inputs; ++i) value[i] = generator() & 1;
  for (int64_t g = 0; g < count; ++g) {
    kinds[g] = generator() % 4;
    left[g] = static_cast<int32_t>(generator() % (inputs + g));
    right[g] = static_cast<int32_t>(generator() % (kinds[g] == kFlip ? 3 : inputs + g));
    const int a = value[left[g]];
    ands += kinds[g] == kAnd;
    value[inputs + g] = kinds[g] == kXor   ? a ^ value[right[g]]
                        : kinds[g] == kAnd ? a & value[right[g]]
                        : kinds[g] == kNot ? 1 - a
                                           : a ^ secrets[right[g]];
  }
  const std::vector<uint8_t> key_bytes = random_bytes(16);
  const CipherKey key = expand_key(key_bytes.data());
  std::vector<uint8_t> delta = random_bytes(16), labels = random_bytes(16 * (inputs + count));
  delta[0] |= 1;
  std::vector<uint8_t> seen = labels, tables(kTableBytes * ands);
  const Gates gates{kinds.data(), left.data(), right.data(), inputs};
  garble(key, gates, 0, count, secrets.data(), delta.data(), labels.data(), 3, tables.data());
  for (int64_t i = 0; i < inputs; ++i) {
    for (int b = 0; b < 16; ++b) seen[16 * i + b] = labels[16 * i + b] ^ (value[i] ? delta[b] : 0);
  }
  evaluate(key, gates, 0, count, seen.data(), 3, tables.data());
  for (int64_t w = 0; w < inputs + count; ++w) {
    for (int b = 0; b < 16; ++b) {
      demand(seen[16 * w + b] == (labels[16 * w + b] ^ (value[w] ? delta[b] : 0)), "a wire has a wrong label");
    }
  }
}

}  // namespace

int main() {
  for (const Isa set : available_isas()) {
    set_isa(isa_name(set));
    for (const int64_t blocks : {0, 1, 7, 8, 17}) check_cipher(blocks);
    for (const int64_t count : {0, 1, 2, 50, 501}) check_gates(3, count);
  }
  std::puts("right");
}
