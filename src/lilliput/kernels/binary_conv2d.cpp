#include "binary_conv2d.hpp"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "binary_linear_tiles.hpp"
#include "scratch.hpp"
#include "thread_pool.hpp"

namespace lilliput {
namespace {

constexpr int64_t kTile = 12;                // positions that a tile takes at most
constexpr int64_t kPatchBytes = 16 * 1024;   // of the positions that go through all weights together: part of an L1
constexpr int64_t kMostPositions = 8 * kTile;
constexpr int64_t kPackPixels = 256;
constexpr int64_t kThreadWords = 1 << 16;    // products of words: fewer are not worth another thread

struct Patches {};
struct Corrections {};
struct Outputs {};

/// The taps along one axis that lie inside the picture, first .. last-1, and the place of tap 0.
struct Reach {
  int64_t first, last, start;
};

Reach reach(const ConvShape& shape, int axis, int64_t position) {
  const int64_t size = axis ? shape.width : shape.height, step = shape.dilation[axis], taps = shape.kernel[axis];
  const int64_t start = position * shape.stride[axis] - shape.padding[axis];
  const int64_t first = start >= 0 ? 0 : std::min(taps, (-start + step - 1) / step);
  const int64_t last = start >= size ? first : std::min(taps, (size - 1 - start) / step + 1);
  return {first, std::max(first, last), start};
}

/// Each output position's sets of taps inside the picture along an axis, numbered.
struct Borders {
  std::vector<Reach> reaches;  // per position
  std::vector<int64_t> kinds;  // per position
  std::vector<std::pair<int64_t, int64_t>> sets;  // per kind

  Borders(const ConvShape& shape, int axis) {
    for (int64_t position = 0; position < shape.output(axis); ++position) {
      const Reach found = reach(shape, axis, position);
      const std::pair<int64_t, int64_t> set{found.first, found.last};
      const int64_t kind = std::find(sets.begin(), sets.end(), set) - sets.begin();
      if (kind == static_cast<int64_t>(sets.size())) sets.push_back(set);
      reaches.push_back(found);
      kinds.push_back(kind);
    }
  }
};

/// The pixels of a batch as signs.
struct Pixels {
  std::vector<uint8_t> bits;  // (planes, pictures * height * width, segment_bytes)
  std::vector<float> means;   // per pixel, when asked for
  int64_t plane_bytes;
};

Pixels pack_pixels(const SignMatrix& matrix, const Binarizer& how, const ConvShape& shape, const float* x,
                   int threads) {
  const int64_t area = shape.height * shape.width, count = shape.pictures * area, bytes = matrix.segment_bytes();
  Pixels pixels{std::vector<uint8_t>(how.planes * count * bytes), std::vector<float>(how.by_mean ? count : 0),
                count * bytes};
  const auto target = [&](int64_t pixel) {
    return SignTarget{pixels.bits.data() + pixel * bytes, pixels.plane_bytes, bytes,
                      how.by_mean ? pixels.means.data() + pixel : nullptr};
  };
  if (shape.channels_last) {
    parallel_for(count, kPackPixels, threads, [&](int64_t first, int64_t last) {
      binary_linear_tiles().pack_rows(how, x + first * shape.channels, last - first, shape.channels, target(first));
    });
    return pixels;
  }
  const int64_t strips = (area + kPackPixels - 1) / kPackPixels;
  parallel_for(shape.pictures * strips, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t job = first; job < last; ++job) {
      const int64_t picture = job / strips, begin = job % strips * kPackPixels;
      binary_linear_tiles().pack_columns(how, x + picture * shape.channels * area, shape.channels, area, begin,
                                         std::min(area, begin + kPackPixels), target(picture * area));
    }
  });
  return pixels;
}

/// What to add to the sums of a position for each pair of border kinds, (kinds, kinds, blocks * 16): the signs of the
/// taps outside the picture.
std::vector<int32_t> outside_sums(const SignMatrix& matrix, const ConvShape& shape, const Borders& down,
                                  const Borders& across) {
  const int64_t rows = matrix.blocks() * kSignRows;
  std::vector<int32_t> sums(matrix.segments * rows), found(down.sets.size() * across.sets.size() * rows);
  binary_linear_tiles().segment_sums(matrix, sums.data());
  int32_t* to = found.data();
  for (const auto& [top, bottom] : down.sets) {
    for (const auto& [left, right] : across.sets) {
      for (int64_t tap = 0; tap < shape.taps(); ++tap) {
        const int64_t r = tap / shape.kernel[1], c = tap % shape.kernel[1];
        if (r >= top && r < bottom && c >= left && c < right) continue;
        for (int64_t n = 0; n < rows; ++n) to[n] += sums[tap * rows + n];
      }
      to += rows;
    }
  }
  return found;
}

/// memcpy for a few bytes, without a call.
inline void copy_bytes(uint8_t* to, const uint8_t* from, int64_t count) {
  for (; count >= 8; count -= 8, to += 8, from += 8) std::memcpy(to, from, 8);
  if (count & 4) std::memcpy(to, from, 4), to += 4, from += 4;
  if (count & 2) std::memcpy(to, from, 2), to += 2, from += 2;
  if (count & 1) *to = *from;
}

/// One convolution under way: what all its positions share.
struct Job {
  const SignMatrix& matrix;
  const Binarizer& how;
  const ConvShape& shape;
  const Pixels& pixels;
  Borders down, across;
  std::vector<int32_t> outside;  // empty when every place lies inside

  int64_t height() const { return static_cast<int64_t>(down.kinds.size()); }
  int64_t width() const { return static_cast<int64_t>(across.kinds.size()); }

  /// Copy the taps of a position into `patch` (planes, words), whose bits are all 0.
  void gather(int64_t picture, const Reach& rows, const Reach& columns, uint32_t* patch) const {
    const int64_t bytes = matrix.segment_bytes(), step = shape.dilation[1], taps = shape.kernel[1];
    for (int p = 0; p < how.planes; ++p) {
      uint8_t* to = reinterpret_cast<uint8_t*>(patch + p * matrix.words());
      for (int64_t r = rows.first; r < rows.last; ++r) {
        const int64_t line = (picture * shape.height + rows.start + r * shape.dilation[0]) * shape.width;
        const uint8_t* from = pixels.bits.data() + p * pixels.plane_bytes + (line + columns.start) * bytes;
        if (step == 1) {
          copy_bytes(to + (r * taps + columns.first) * bytes, from + columns.first * bytes,
                     (columns.last - columns.first) * bytes);
          continue;
        }
        for (int64_t c = columns.first; c < columns.last; ++c) {
          copy_bytes(to + (r * taps + c) * bytes, from + c * step * bytes, bytes);
        }
      }
    }
  }

  /// The mean over all taps of the means of the pixels under them.
  float mean(int64_t picture, const Reach& rows, const Reach& columns) const {
    float sum = 0;
    for (int64_t r = rows.first; r < rows.last; ++r) {
      const int64_t line = (picture * shape.height + rows.start + r * shape.dilation[0]) * shape.width + columns.start;
      for (int64_t c = columns.first; c < columns.last; ++c) sum += pixels.means[line + c * shape.dilation[1]];
    }
    return sum / static_cast<float>(shape.taps());
  }

  /// The positions first .. last-1 of the whole batch, as many as fit together at most.
  void run(int64_t first, int64_t last, float* y) const {
    const int64_t count = last - first, patch_words = how.planes * matrix.words();
    uint32_t* patches = scratch<uint32_t, Patches>(count * patch_words);
    const int32_t** corrections = scratch<const int32_t*, Corrections>(count);
    float* means = how.by_mean ? scratch<float, Patches>(count) : nullptr;
    std::fill_n(patches, count * patch_words, 0u);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t picture = (first + i) / (height() * width()), place = (first + i) % (height() * width());
      const int64_t row = place / width(), column = place % width();
      gather(picture, down.reaches[row], across.reaches[column], patches + i * patch_words);
      if (means) means[i] = mean(picture, down.reaches[row], across.reaches[column]);
      const int64_t kind = down.kinds[row] * static_cast<int64_t>(across.sets.size()) + across.kinds[column];
      if (!outside.empty()) corrections[i] = outside.data() + kind * matrix.blocks() * kSignRows;
    }
    const SignTokens tokens{patches, count, how.planes, how.levels, means, outside.empty() ? nullptr : corrections};
    if (shape.channels_last) {
      binary_linear_tiles().multiply(matrix, tokens, 0, matrix.blocks(), y + first * matrix.rows);
      return;
    }
    float* found = scratch<float, Outputs>(count * matrix.rows);
    binary_linear_tiles().multiply(matrix, tokens, 0, matrix.blocks(), found);
    store_by_channel(found, first, count, y);
  }

  /// found (count, rows) into y (pictures, rows, positions).
  void store_by_channel(const float* found, int64_t first, int64_t count, float* y) const {
    const int64_t area = height() * width(), rows = matrix.rows;
    for (int64_t done = 0; done < count;) {
      const int64_t picture = (first + done) / area, place = (first + done) % area;
      const int64_t here = std::min(count - done, area - place);
      float* to = y + picture * rows * area + place;
      for (int64_t n = 0; n < rows; ++n) {
        for (int64_t i = 0; i < here; ++i) to[n * area + i] = found[(done + i) * rows + n];
      }
      done += here;
    }
  }
};

}  // namespace

void binary_conv2d(const SignMatrix& matrix, const Binarizer& how, const ConvShape& shape, const float* x, float* y,
                   int threads) {
  const int64_t positions = shape.pictures * shape.output(0) * shape.output(1);
  if (positions <= 0 || matrix.rows == 0) return;
  const int64_t worth = std::max<int64_t>(1, positions * how.planes * matrix.words() * matrix.blocks() / kThreadWords);
  const int used = static_cast<int>(std::min<int64_t>(threads, worth));
  const Pixels pixels = pack_pixels(matrix, how, shape, x, used);
  Job job{matrix, how, shape, pixels, Borders(shape, 0), Borders(shape, 1), {}};
  const bool inside = shape.padding[0] == 0 && shape.padding[1] == 0;
  if (!inside) job.outside = outside_sums(matrix, shape, job.down, job.across);
  const int64_t patch_bytes = std::max<int64_t>(1, how.planes * matrix.words() * kSignWordBytes);
  const int64_t together = std::clamp(kPatchBytes / patch_bytes / kTile * kTile, kTile, kMostPositions);
  const int64_t steps = (positions + together - 1) / together;
  parallel_for(steps, 1, used, [&](int64_t first, int64_t last) {
    for (int64_t step = first; step < last; ++step) {
      job.run(step * together, std::min(positions, (step + 1) * together), y);
    }
  });
}

}  // namespace lilliput
