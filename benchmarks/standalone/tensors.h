// Arrays of random numbers, and of results: on the device in a dtype, here as doubles.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "memory.h"
#include "numbers.h"

namespace standalone {

using inti::Strides;

// The same numbers at every run.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  // Uniform in [-1, 1).
  double operator()() {
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t bits = (state_ ^ (state_ >> 30)) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>(static_cast<int64_t>((bits ^ (bits >> 31)) >> 11)) * 0x1p-52 - 1;
  }

 private:
  uint64_t state_;
};

// A contiguous array.
class Array {
 public:
  // NaN until a kernel writes it.
  Array(int64_t size, DType dtype) : dtype_(dtype), size_(size), memory_(static_cast<size_t>(size) * width()) {}
  // As given, which must be numbers of dtype.
  Array(const std::vector<double>& values, DType dtype) : Array(static_cast<int64_t>(values.size()), dtype) {
    std::vector<unsigned char> bytes(values.size() * width());
    for (size_t i = 0; i < values.size(); ++i) encode(values[i], dtype, bytes.data() + i * width());
    memory_.upload(bytes);
    given_ = std::move(bytes);
  }

  void* data() const { return memory_.data(); }
  DType dtype() const { return dtype_; }
  int64_t size() const { return size_; }
  int64_t bytes() const { return size_ * format_of(dtype_).bytes; }

  // Throws if it isn't as it was given.
  void check_unchanged(const char* what) const {
    if (memory_.download(what) != given_) throw std::runtime_error(std::string(what) + ": an input was written to");
  }
  // What lies on the device; throws if something was written beside it.
  std::vector<double> values(const char* what) const {
    const std::vector<unsigned char> bytes = memory_.download(what);
    std::vector<double> values(static_cast<size_t>(size_));
    for (size_t i = 0; i < values.size(); ++i) values[i] = decode(bytes.data() + i * width(), dtype_);
    return values;
  }

 private:
  size_t width() const { return static_cast<size_t>(format_of(dtype_).bytes); }
  DType dtype_;
  int64_t size_;
  Memory memory_;
  std::vector<unsigned char> given_;
};

// What a kernel reads: the same numbers here and on the device, random ones unless given.
struct Input {
  std::vector<double> values;
  Array array;

  Input(int64_t size, DType dtype, Random& random, double scale = 1, double offset = 0)
      : values(draw(size, dtype, random, scale, offset)), array(values, dtype) {}
  // As given, which must be numbers of dtype.
  Input(std::vector<double> given, DType dtype) : values(std::move(given)), array(values, dtype) {}

  const double& operator[](int64_t i) const { return values[static_cast<size_t>(i)]; }
  void* data() const { return array.data(); }
  int64_t bytes() const { return array.bytes(); }

  static std::vector<double> draw(int64_t size, DType dtype, Random& random, double scale, double offset) {
    std::vector<double> values(static_cast<size_t>(size));
    for (double& value : values) value = rounded(offset + scale * random(), dtype);
    return values;
  }
};

// How tokens [batch, frames, tokens, dim] lie in memory.
enum class Layout {
  contiguous,
  padded,    // rows 16-byte aligned, but with gaps between tokens, frames and clips
  odd,       // rows at odd multiples of an element, and so not aligned
  swapped,   // [frames, batch, tokens, dim]
  shifted,   // rows 16-byte aligned to each other, but not to anything else
  repeated,  // one row for all, as the gradient of a sum has it: strides of 0
};

struct TokenSizes {
  int64_t batch, frames, tokens, dim;
  int64_t size() const { return batch * frames * tokens * dim; }
  int64_t at(int64_t clip, int64_t frame, int64_t token, int64_t channel) const {
    return ((clip * frames + frame) * tokens + token) * dim + channel;
  }
};

// Tokens that a kernel reads; gaps are NaN. values are contiguous.
struct Tokens {
  TokenSizes sizes;
  Strides strides;
  int64_t first;  // element of array
  std::vector<double> values;
  Array array;

  Tokens(const TokenSizes& sizes, Layout layout, DType dtype, Random& random, double scale = 1, double offset = 0)
      : sizes(sizes),
        strides(strides_of(sizes, layout)),
        first(layout == Layout::shifted ? 1 : 0),
        values(draw(sizes, layout, dtype, random, scale, offset)),
        array(spread(), dtype) {}

  double at(int64_t clip, int64_t frame, int64_t token, int64_t channel) const {
    return values[static_cast<size_t>(sizes.at(clip, frame, token, channel))];
  }
  const void* data() const {
    return static_cast<const unsigned char*>(array.data()) + first * format_of(array.dtype()).bytes;
  }
  int64_t bytes() const { return sizes.size() * format_of(array.dtype()).bytes; }  // without the gaps

 private:
  static Strides strides_of(const TokenSizes& s, Layout layout) {
    const int64_t token = layout == Layout::padded ? s.dim + 16 : layout == Layout::odd ? s.dim + 1 : s.dim;
    const int64_t gap = layout == Layout::padded ? 48 : layout == Layout::odd ? 3 : 0;
    const int64_t row = s.tokens * token + gap;
    if (layout == Layout::repeated) return {0, 0, 0};
    if (layout == Layout::swapped) return {row, s.batch * row, token};
    return {s.frames * row + gap, row, token};
  }
  static std::vector<double> draw(const TokenSizes& sizes, Layout layout, DType dtype, Random& random, double scale,
                                  double offset) {
    std::vector<double> values = Input::draw(sizes.size(), dtype, random, scale, offset);
    if (layout == Layout::repeated)
      for (size_t i = static_cast<size_t>(sizes.dim); i < values.size(); ++i)
        values[i] = values[i - static_cast<size_t>(sizes.dim)];
    return values;
  }
  std::vector<double> spread() const {
    const int64_t last = (sizes.batch - 1) * strides.batch + (sizes.frames - 1) * strides.frame +
                         (sizes.tokens - 1) * strides.token + sizes.dim;
    std::vector<double> all(static_cast<size_t>(first + last), std::nan(""));
    for (int64_t b = 0; b < sizes.batch; ++b)
      for (int64_t t = 0; t < sizes.frames; ++t)
        for (int64_t n = 0; n < sizes.tokens; ++n)
          for (int64_t c = 0; c < sizes.dim; ++c)
            all[static_cast<size_t>(first + b * strides.batch + t * strides.frame + n * strides.token + c)] =
                at(b, t, n, c);
    return all;
  }
};

}  // namespace standalone
