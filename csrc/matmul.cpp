// Both operands are packed, block by block, into strips of 16 rows: a word of 32 bits (one float, or two neighbours in
// bf16) of each row, then the next word. A tile of 8 x 48 sums stays in registers while it walks along the depth.
#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace oapl {
namespace {

constexpr int LANES = 16, TILE_ROWS = 8, TILE_STRIPS = 3;
constexpr int64_t UNIT = TILE_STRIPS * LANES;  // blocks are multiples of it
constexpr int64_t BLOCK = 8 * UNIT, DEPTH = 256;  // rows and words of a packed block: two fill the second-level cache

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prefer-vector-width=512")

typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(32)));

#define INLINE inline __attribute__((always_inline))

INLINE Words load(const void* from, int64_t bytes) {
  Words value{};
  if (bytes > 0) std::memcpy(&value, from, std::min<int64_t>(bytes, sizeof value));
  return value;
}

INLINE Words load_halves(const uint16_t* from, int64_t count) {
  Half value{};
  if (count > 0) std::memcpy(&value, from, std::min<int64_t>(count, LANES) * sizeof *from);
  return __builtin_convertvector(value, Words);
}

INLINE void transpose(Words (&rows)[LANES]) {
  const Words low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high = low + 8;
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {
    Words next[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + LANES / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + LANES / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = next[i];
  }
}

// One strip [words, 16] of `count` rows, with zeros beyond their end and beyond depth. May write 15 words more, which
// the next strip overwrites.
template <typename T>
void pack_strip(const T* from, const Operand& operand, int64_t count, int64_t depth, uint32_t* to) {
  constexpr int EACH = sizeof(uint32_t) / sizeof(T);
  const int64_t words = (depth + EACH - 1) / EACH;
  if (operand.depth_stride != 1) {
    for (int64_t k = 0; k < depth; k += EACH, to += LANES) {
      Words value;
      if constexpr (EACH == 1)
        value = load(from + k * operand.depth_stride, count * sizeof(T));
      else
        value = load_halves(from + k * operand.depth_stride, count) |
                load_halves(from + (k + 1) * operand.depth_stride, k + 1 < depth ? count : 0) << 16;
      std::memcpy(to, &value, sizeof value);
    }
    return;
  }
  for (int64_t word = 0; word < words; word += LANES, to += LANES * LANES) {
    const T* source = from + word * EACH;
    int64_t stride = operand.across_stride;
    const int64_t bytes = (depth - word * EACH) * sizeof(T);
    Words edge[LANES], rows[LANES];
    if (count < LANES || bytes < (int64_t)sizeof *edge) {
      for (int i = 0; i < LANES; i++) edge[i] = load(source + i * stride, i < count ? bytes : 0);
      source = reinterpret_cast<const T*>(edge), stride = LANES * EACH;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) std::memcpy(&rows[i], source + i * stride, sizeof rows[i]);
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) std::memcpy(to + i * LANES, &rows[i], sizeof rows[i]);
  }
}

template <typename T>
INLINE __m512 multiply_add(__m512 sum, uint32_t left, Words right) {
  const __m512i every = _mm512_set1_epi32(left);
  if constexpr (sizeof(T) == 2) return _mm512_dpbf16_ps(sum, (__m512bh)every, (__m512bh)right);
  return _mm512_fmadd_ps((__m512)every, (__m512)right, sum);
}

// At most 8 x 48 elements of out, over all words of two packed operands.
template <typename T>
void tile(const uint32_t* left, const uint32_t* right, int64_t words, float* out, int64_t stride, int64_t rows,
          int64_t columns, bool add) {
  __m512 sums[TILE_ROWS][TILE_STRIPS] = {};
  if (add)
    for (int i = 0; i < std::min<int64_t>(rows, TILE_ROWS); i++)
      for (int j = 0; j < TILE_STRIPS; j++) __builtin_prefetch(out + i * stride + j * LANES, 1);
  for (int64_t word = 0; word < words; word++) {
    Words strips[TILE_STRIPS];
#pragma GCC unroll 3
    for (int j = 0; j < TILE_STRIPS; j++) std::memcpy(&strips[j], right + (j * words + word) * LANES, sizeof(Words));
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 3
      for (int j = 0; j < TILE_STRIPS; j++)
        sums[i][j] = multiply_add<T>(sums[i][j], left[word * LANES + i], strips[j]);
  }
  const bool whole = rows >= TILE_ROWS && columns >= UNIT;  // masked stores are slow
#pragma GCC unroll 8
  for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 3
    for (int j = 0; j < TILE_STRIPS; j++) {
      float* to = out + i * stride + j * LANES;
      if (whole) {
        _mm512_storeu_ps(to, add ? _mm512_loadu_ps(to) + sums[i][j] : sums[i][j]);
      } else {
        const int64_t inside = i < rows ? std::clamp<int64_t>(columns - j * LANES, 0, LANES) : 0;
        const __mmask16 mask = (1u << inside) - 1;
        _mm512_mask_storeu_ps(to, mask, _mm512_maskz_loadu_ps(add ? mask : 0, to) + sums[i][j]);
      }
    }
}

#pragma GCC pop_options

// Memory of two packed blocks, kept for the next call: fresh pages cost more than packing.
std::mutex pool_mutex;
std::vector<std::unique_ptr<Words[]>> pool;

class Workspace {
 public:
  Workspace() {
    std::lock_guard<std::mutex> lock(pool_mutex);
    if (pool.empty()) pool.emplace_back(new Words[2 * BLOCK / LANES * DEPTH + LANES]);
    memory_ = std::move(pool.back());
    pool.pop_back();
  }
  ~Workspace() {
    std::lock_guard<std::mutex> lock(pool_mutex);
    pool.push_back(std::move(memory_));
  }
  uint32_t* block(int index) { return reinterpret_cast<uint32_t*>(memory_.get() + index * BLOCK / LANES * DEPTH); }

 private:
  std::unique_ptr<Words[]> memory_;
};

template <typename T>
void pack(const Operand& operand, int64_t start, int64_t count, int64_t k, int64_t depth, uint32_t* to) {
  const int64_t words = (depth * sizeof(T) + sizeof(uint32_t) - 1) / sizeof(uint32_t);
  const T* from = static_cast<const T*>(operand.data) + k * operand.depth_stride;
  for (int64_t i = 0; i < count; i += LANES)
    pack_strip(from + (start + i) * operand.across_stride, operand, std::min<int64_t>(LANES, count - i), depth,
               to + i * words);
}

// Rows [row, row + rows) and columns [column, column + columns) of the product.
template <typename T>
void multiply_block(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  constexpr int EACH = sizeof(uint32_t) / sizeof(T);
  Workspace workspace;
  uint32_t *left = workspace.block(0), *right = workspace.block(1);
  const int64_t pieces = std::max<int64_t>(1, (p.depth + DEPTH * EACH - 1) / (DEPTH * EACH));
  const int64_t step = ((p.depth + pieces - 1) / pieces + EACH - 1) / EACH * EACH;
  for (int64_t piece = 0; piece < pieces; piece++) {
    const int64_t k = piece * step, depth = std::min(step, p.depth - k), words = (depth + EACH - 1) / EACH;
    pack<T>(p.left, row, rows, k, depth, left);
    pack<T>(p.right, column, columns, k, depth, right);
    for (int64_t j = 0; j < columns; j += UNIT)
      for (int64_t i = 0; i < rows; i += TILE_ROWS)
        tile<T>(left + i / LANES * LANES * words + i % LANES, right + j * words, words,
                p.out + (row + i) * p.out_stride + column + j, p.out_stride, rows - i, columns - j, p.add || piece);
  }
}

template <typename T>
void multiply_as(const Product& p, int threads) {
  const auto parts = [](int64_t size, int64_t most) { return (size + most - 1) / most; };
  int64_t most = BLOCK;  // smaller where that gives every thread the same number of blocks
  for (int64_t blocks; most > UNIT; most -= UNIT) {
    blocks = parts(p.rows, most) * parts(p.columns, most);
    if (blocks % threads == 0 || blocks >= 8 * threads) break;
  }
  const auto even = [&](int64_t size) { return parts(parts(size, parts(size, most)), UNIT) * UNIT; };
  const int64_t rows = even(p.rows), columns = even(p.columns), down = parts(p.rows, rows);
  parallel(down * parts(p.columns, columns), 1, threads, [&](int64_t block) {
    const int64_t row = block % down * rows, column = block / down * columns;
    multiply_block<T>(p, row, std::min(rows, p.rows - row), column, std::min(columns, p.columns - column));
  });
}

}  // namespace

bool multiplies(bool bf16) {
  return bf16 ? instruction_set().multiplies_bf16 : instruction_set().multiplies_float;
}

void multiply(const Product& product, bool bf16, int threads) {
  if (!multiplies(bf16)) throw std::runtime_error("this processor, or the instruction set selected, cannot");
  if (product.rows == 0 || product.columns == 0) return;
  const auto multiply_all = bf16 ? multiply_as<uint16_t> : multiply_as<float>;
  multiply_all(product, threads);
}

}  // namespace oapl
#else
namespace oapl {
bool multiplies(bool) { return false; }
void multiply(const Product&, bool, int) { throw std::runtime_error("there is no such product on this processor"); }
}  // namespace oapl
#endif
