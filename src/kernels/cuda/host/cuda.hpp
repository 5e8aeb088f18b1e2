// Stands in for CUDA's runtime where the kernels are compiled as C++ for the CPU, to be tested without a GPU: the names that
// they use, a GPU thread being a fiber (fibers.hpp). It is stricter than a GPU: a barrier or a shuffle that not every thread
// of its scope reaches is an error, and so are two threads of a warp in different ones.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "fibers.hpp"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
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
