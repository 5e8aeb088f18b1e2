// What every kernel shares: the shape of a block of threads, where a thread stands in it, sums over it. All files are
// compiled as one, in the order that mod.rs has them.
typedef unsigned int uint;
typedef unsigned char uchar;

// Threads of a block, in warps of 32: the launchers in Rust say the same.
#define THREADS 256u
#define LANES 32u
#define WARPS 8u
#define ALL_LANES 0xffffffffu

#define DEVICE static __device__ __forceinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(256)

// A thread's place in its block, and that place by warp.
#define PLACE                                                                                                          \
  const uint index = threadIdx.x, lane = index % LANES, warp = index / LANES;                                          \
  (void)lane, (void)warp

DEVICE float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
  return value;
}

DEVICE float warp_max(float value) {
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
  return value;
}

DEVICE uint warp_min(uint value) {
  for (int step = 16; step > 0; step /= 2) {
    uint other = __shfl_xor_sync(ALL_LANES, value, step);
    value = other < value ? other : value;
  }
  return value;
}

// The sum of every thread's value, for every thread. `room` holds a number a warp.
DEVICE float group_sum(float value, float* room, uint lane, uint warp) {
  value = warp_sum(value);
  // a sum before this one may still be read
  __syncthreads();
  if (lane == 0) room[warp] = value;
  __syncthreads();
  float total = 0.0f;
  for (uint i = 0; i < WARPS; i++) total += room[i];
  return total;
}

// The largest of every thread's value, for every thread, in the same way.
DEVICE float group_max(float value, float* room, uint lane, uint warp) {
  value = warp_max(value);
  __syncthreads();
  if (lane == 0) room[warp] = value;
  __syncthreads();
  float most = room[0];
  for (uint i = 1; i < WARPS; i++) most = fmaxf(most, room[i]);
  return most;
}

// Whether a number is neither infinite nor NaN, by its bits.
DEVICE bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }
