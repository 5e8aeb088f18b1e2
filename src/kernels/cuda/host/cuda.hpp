// Stands in for CUDA's runtime where the kernels are compiled as C++ for the CPU, to be tested without a GPU: the names that
// they use, a GPU thread being a fiber (fibers.hpp). It is stricter than a GPU: a barrier or a shuffle that not every thread
// of its scope reaches is an error, and so are two threads of a warp in different ones.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "fibers.hpp"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Of one section, so that every block starts with numbers that are none.
#define __shared__ __attribute__((section("shared_memory"))) static

struct dim3 {
  unsigned int x, y, z;
};
static dim3 blockIdx, gridDim;
struct ThreadIdx {
  struct X {
    operator unsigned int() const { return fibers::current; }
  } x;
};
static const ThreadIdx threadIdx = {};

inline void __syncthreads() { fibers::wait(fibers::GROUP, 0); }
inline void __syncwarp() { fibers::wait(fibers::SIMD, 0); }

inline float __shfl_xor_sync(unsigned int, float value, int with) {
  return fibers::exchange(value, with).number((fibers::current % 32) ^ with);
}
inline unsigned int __shfl_xor_sync(unsigned int, unsigned int value, int with) {
  return fibers::exchange(value, with).bits[(fibers::current % 32) ^ with];
}

// The matrix unit (../matrix.cu).
extern char __start_shared_memory[], __stop_shared_memory[];

inline float bf16_number(unsigned int bits) {
  bits <<= 16;
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}
inline unsigned int bf16_bits(float x) {
  unsigned int bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline unsigned int bf16_pair(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline float bf16_half(unsigned int pair, int half) { return bf16_number(half ? pair >> 16 : pair & 0xffffu); }

inline void multiply(float (&sums)[4], const unsigned int (&a)[4], unsigned int b_low, unsigned int b_high) {
  const unsigned int given[6] = {a[0], a[1], a[2], a[3], b_low, b_high};
  const fibers::Slots *left = fibers::exchange_all(given, 6, fibers::MULTIPLY), *right = left + 4;
  int lane = fibers::current % 32;
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      unsigned int of_a = left[row / 8 + k / 8 * 2].bits[row % 8 * 4 + k % 8 / 2], of_b = right[k / 8].bits[column * 4 + k % 8 / 2];
      sums[i] += bf16_half(of_a, k % 2) * bf16_half(of_b, k % 2);
    }
  }
}

// Word `word` of row `row` of matrix `matrix`, of those that the lanes named.
inline unsigned int word_of(const fibers::Slots& rows, int matrix, int row, int word) {
  unsigned int at = rows.bits[matrix * 8 + row], value;
  if (at % 16 || at + 16 > (unsigned int)(__stop_shared_memory - __start_shared_memory)) std::abort();
  std::memcpy(&value, __start_shared_memory + at + word * 4, 4);
  return value;
}
inline fibers::Slots rows_named(const unsigned int* row) {
  return fibers::exchange((unsigned int)((const char*)row - __start_shared_memory), fibers::LOAD);
}
inline void load_four(unsigned int (&four)[4], const unsigned int* row) {
  fibers::Slots rows = rows_named(row);
  int lane = fibers::current % 32;
  for (int i = 0; i < 4; i++) four[i] = word_of(rows, i, lane / 4, lane % 4);
}
inline void load_four_turned(unsigned int (&four)[4], const unsigned int* row) {
  fibers::Slots rows = rows_named(row);
  int lane = fibers::current % 32, n = lane / 4, k = lane % 4 * 2;
  for (int i = 0; i < 4; i++) {
    unsigned int low = word_of(rows, i, k, n / 2), high = word_of(rows, i, k + 1, n / 2);
    four[i] = n % 2 ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
  }
}

// What a thread has sent arrives when it waits for it, no sooner.
struct Sent {
  unsigned int* to;
  const void* from;
  bool in;
};
static std::vector<std::vector<Sent>> on_their_way[fibers::THREADS_MAX];

inline void send(unsigned int* to, const void* from, bool in) {
  std::vector<std::vector<Sent>>& groups = on_their_way[fibers::current];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, from, in});
}
inline void close_group() {
  std::vector<std::vector<Sent>>& groups = on_their_way[fibers::current];
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
inline void await_all_but_last() {
  std::vector<std::vector<Sent>>& groups = on_their_way[fibers::current];
  // the last closed one and the open one stay
  while (groups.size() > 2) {
    for (const Sent& sent : groups.front()) {
      if (sent.in) std::memcpy(sent.to, sent.from, 16);
      else std::memset(sent.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}
inline float __expf(float x) { return std::exp(x); }

template <class To, class From>
inline To with_bits_of(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "bits keep their number");
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned int __float_as_uint(float x) { return with_bits_of<unsigned int>(x); }
inline float __uint_as_float(unsigned int x) { return with_bits_of<float>(x); }
// The compiler is told not to join products and sums.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline unsigned int min(unsigned int a, unsigned int b) { return a < b ? a : b; }
