// Compiled once per instruction set, with EP_ROW_MATH naming the table it defines.
// Includes nothing whose inline functions another file might share: see element.h.

#include <cstdint>

#include "common/element.h"
#include "cpu/row_math.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace jax_ep::cpu {
namespace {

// Elements of a token that are summed before the next ones are looked at: both sums
// stay in the first-level cache, and a row is still read in long runs.
constexpr std::int64_t kBlock = 1024;
constexpr std::int64_t kDotLanes = 64;
constexpr std::int64_t kLineBytes = 64;
constexpr int kIntoSecondLevel = 2;  // as __builtin_prefetch counts locality

float Fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
double Fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

#if defined(__AVX__)
using Vector = __m256i;
Vector LoadVector(const char* p) {
  return _mm256_loadu_si256(reinterpret_cast<const Vector*>(p));
}
void StreamVector(char* p, Vector v) {
  _mm256_stream_si256(reinterpret_cast<Vector*>(p), v);
}
#elif defined(__SSE2__)
using Vector = __m128i;
Vector LoadVector(const char* p) {
  return _mm_loadu_si128(reinterpret_cast<const Vector*>(p));
}
void StreamVector(char* p, Vector v) {
  _mm_stream_si128(reinterpret_cast<Vector*>(p), v);
}
#endif

#if defined(__SSE2__)
void StreamRow(const char* src, char* dst, std::int64_t bytes) {
  constexpr std::int64_t kStep = 4 * sizeof(Vector);
  std::int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) {
    const Vector a = LoadVector(src + i);
    const Vector b = LoadVector(src + i + sizeof(Vector));
    const Vector c = LoadVector(src + i + 2 * sizeof(Vector));
    const Vector d = LoadVector(src + i + 3 * sizeof(Vector));
    StreamVector(dst + i, a);
    StreamVector(dst + i + sizeof(Vector), b);
    StreamVector(dst + i + 2 * sizeof(Vector), c);
    StreamVector(dst + i + 3 * sizeof(Vector), d);
  }
  __builtin_memcpy(dst + i, src + i, static_cast<std::size_t>(bytes - i));
}

bool CanStream(const void* dst) {
  return reinterpret_cast<std::uintptr_t>(dst) % sizeof(Vector) == 0;
}

void Fence() { _mm_sfence(); }
#else
void StreamRow(const char* src, char* dst, std::int64_t bytes) {
  __builtin_memcpy(dst, src, static_cast<std::size_t>(bytes));
}

bool CanStream(const void* /*dst*/) { return false; }

void Fence() {}
#endif

void Copy(const void* src, void* const* dst, std::int64_t count, std::int64_t bytes,
          bool stream) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (stream && CanStream(dst[i])) {
      StreamRow(static_cast<const char*>(src), static_cast<char*>(dst[i]), bytes);
    } else {
      __builtin_memcpy(dst[i], src, static_cast<std::size_t>(bytes));
    }
  }
}

template <typename E>
void Scale(const void* src, float weight, void* dst, std::int64_t hidden) {
  const auto* from = static_cast<const typename E::Storage*>(src);
  auto* to = static_cast<typename E::Storage*>(dst);
  const auto w = static_cast<typename E::Sum>(weight);
  for (std::int64_t i = 0; i < hidden; ++i) to[i] = E::Round(w * E::Load(from[i]));
}

void PrefetchLine(const char* p) { __builtin_prefetch(p, 0, kIntoSecondLevel); }

void Prefetch(const void* src, std::int64_t bytes) {
  const char* p = static_cast<const char*>(src);
  for (std::int64_t i = 0; i < bytes; i += kLineBytes) PrefetchLine(p + i);
}

// One block of a token's terms.
template <typename E>
struct Block {
  std::int64_t begin;  // first element
  std::int64_t size;
  typename E::Sum* partial;  // [size], of the rank at hand
  typename E::Sum* total;    // [size], of the ranks before, or of those of its node
};

// Adds one term to its rank's partial sum. The first term of a rank starts that anew;
// the last one has it rounded, as it would be to cross a wire, and added to the total.
// Goes by cache lines of the row, each with a line of `ahead` to fetch.
template <typename E, bool first, bool last>
void Accumulate(const ReduceTerm& term, const Block<E>& block, const char* ahead) {
  using Sum = typename E::Sum;
  using Storage = typename E::Storage;
  constexpr std::int64_t kLine = kLineBytes / sizeof(Storage);
  const auto* __restrict row = static_cast<const Storage*>(term.row) + block.begin;
  Sum* __restrict partial = block.partial;
  Sum* __restrict total = block.total;
  const auto w = static_cast<Sum>(term.weight);
  const auto add = [&](std::int64_t i) {
    const Sum sum = Fma(w, E::Load(row[i]), first ? Sum{0} : partial[i]);
    if (last) {
      total[i] += E::RoundSum(sum);
    } else {
      partial[i] = sum;
    }
  };
  std::int64_t i = 0;
  for (; i + kLine <= block.size; i += kLine) {
    PrefetchLine(ahead + i * static_cast<std::int64_t>(sizeof(Storage)));
    for (std::int64_t j = 0; j < kLine; ++j) add(i + j);
  }
  for (; i < block.size; ++i) add(i);
}

// What is fetched while a term is added: the same part of the next one's row; after the
// last one, the next part of the first, or of `row_after`.
template <typename E>
const char* NextToRead(const ReduceTerm* terms, std::int64_t num_terms, std::int64_t j,
                       const Block<E>& block, std::int64_t hidden,
                       const void* row_after) {
  // Fetching what is at hand already costs next to nothing.
  const void* row = terms[j].row;
  std::int64_t offset = block.begin;
  if (j + 1 < num_terms) {
    row = terms[j + 1].row;
  } else if (block.begin + block.size < hidden) {
    row = terms[0].row;
    offset = block.begin + block.size;
  } else if (row_after != nullptr) {
    row = row_after;
    offset = 0;
  }
  using Storage = typename E::Storage;
  return reinterpret_cast<const char*>(static_cast<const Storage*>(row) + offset);
}

template <typename E>
void Reduce(const ReduceTerm* terms, std::int64_t num_terms, void* out,
            std::int64_t hidden, const void* row_after) {
  using Sum = typename E::Sum;
  alignas(64) Sum partial[kBlock];
  alignas(64) Sum of_node[kBlock];
  alignas(64) Sum total[kBlock];
  auto* to = static_cast<typename E::Storage*>(out);
  for (std::int64_t begin = 0; begin < hidden; begin += kBlock) {
    const std::int64_t size = hidden - begin < kBlock ? hidden - begin : kBlock;
    for (std::int64_t i = 0; i < size; ++i) total[i] = 0;
    bool opens = false;  // whether the rank at hand is the first of its node
    for (std::int64_t j = 0; j < num_terms; ++j) {
      const bool first = j == 0 || terms[j - 1].rank != terms[j].rank;
      const bool last = j + 1 == num_terms || terms[j + 1].rank != terms[j].rank;
      const bool closes = j + 1 == num_terms || terms[j + 1].node != terms[j].node;
      if (first) opens = j == 0 || terms[j - 1].node != terms[j].node;
      // What is alone on its node is that node's sum.
      const bool alone = opens && closes;
      if (last && opens && !alone) {
        for (std::int64_t i = 0; i < size; ++i) of_node[i] = 0;
      }
      const Block<E> block = {begin, size, partial, alone ? total : of_node};
      const auto accumulate =
          first ? (last ? Accumulate<E, true, true> : Accumulate<E, true, false>)
                : (last ? Accumulate<E, false, true> : Accumulate<E, false, false>);
      accumulate(terms[j], block,
                 NextToRead(terms, num_terms, j, block, hidden, row_after));
      if (last && closes && !alone) {
        for (std::int64_t i = 0; i < size; ++i) total[i] += E::RoundSum(of_node[i]);
      }
    }
    for (std::int64_t i = 0; i < size; ++i) to[begin + i] = E::Round(total[i]);
  }
}

template <typename E>
float Dot(const void* a, const void* b, std::int64_t hidden) {
  const auto* x = static_cast<const typename E::Storage*>(a);
  const auto* y = static_cast<const typename E::Storage*>(b);
  alignas(64) typename E::Sum lanes[kDotLanes] = {};
  std::int64_t begin = 0;
  for (; begin + kDotLanes <= hidden; begin += kDotLanes) {
    for (std::int64_t i = 0; i < kDotLanes; ++i) {
      lanes[i] = Fma(E::Load(x[begin + i]), E::Load(y[begin + i]), lanes[i]);
    }
  }
  for (std::int64_t i = 0; begin + i < hidden; ++i) {
    lanes[i] = Fma(E::Load(x[begin + i]), E::Load(y[begin + i]), lanes[i]);
  }
  for (std::int64_t half = kDotLanes / 2; half > 0; half /= 2) {
    for (std::int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return static_cast<float>(lanes[0]);
}

// Calls `visit` with the element type of `dtype`.
template <typename Visit>
auto Visited(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kBF16:
      return visit(BF16());
    case DType::kF16:
      return visit(F16());
    case DType::kF32:
      return visit(F32());
    case DType::kF64:
      break;
  }
  return visit(F64());
}

void ScaleAny(DType dtype, const void* src, float weight, void* dst,
              std::int64_t hidden) {
  Visited(dtype, [&](auto e) { Scale<decltype(e)>(src, weight, dst, hidden); });
}

void ReduceAny(DType dtype, const ReduceTerm* terms, std::int64_t num_terms, void* out,
               std::int64_t hidden, const void* row_after) {
  Visited(dtype, [&](auto e) {
    Reduce<decltype(e)>(terms, num_terms, out, hidden, row_after);
  });
}

float DotAny(DType dtype, const void* a, const void* b, std::int64_t hidden) {
  return Visited(dtype, [&](auto e) { return Dot<decltype(e)>(a, b, hidden); });
}

}  // namespace

extern const RowMath EP_ROW_MATH;
const RowMath EP_ROW_MATH = {
    .instruction_set = EP_INSTRUCTION_SET,
    .copy = Copy,
    .fence = Fence,
    .prefetch = Prefetch,
    .scale = ScaleAny,
    .reduce = ReduceAny,
    .dot = DotAny,
};

}  // namespace jax_ep::cpu
