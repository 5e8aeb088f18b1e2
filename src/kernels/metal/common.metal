// What every kernel shares: the shape of a threadgroup, where a thread stands in it, sums over it.
#include <metal_stdlib>
using namespace metal;

// Threads of a threadgroup, in simdgroups of 32: the launchers in Rust say the same.
#define THREADS 256u
#define LANES 32u
#define SIMDS 8u

#define KERNEL [[kernel, max_total_threads_per_threadgroup(256)]] void

// Memory of a threadgroup, declared in a kernel. Compiled for the CPU it has another name.
#ifndef SHARED
#define SHARED threadgroup
#endif

// The last arguments of every kernel: its threadgroup, its place in it, and that place by simdgroup.
#define WHERE                                                                                                          \
  uint3 group [[threadgroup_position_in_grid]], uint3 groups [[threadgroups_per_grid]],                              \
      uint index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],                           \
      uint simd [[simdgroup_index_in_threadgroup]]

// The sum of every thread's value, for every thread. `room` holds a number a simdgroup.
inline float group_sum(float value, threadgroup float* room, uint lane, uint simd) {
  value = simd_sum(value);
  // a sum before this one may still be read
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) room[simd] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0.0f;
  for (uint i = 0; i < SIMDS; i++) total += room[i];
  return total;
}

// The largest of every thread's value, for every thread, in the same way.
inline float group_max(float value, threadgroup float* room, uint lane, uint simd) {
  value = simd_max(value);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) room[simd] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float most = room[0];
  for (uint i = 1; i < SIMDS; i++) most = fmax(most, room[i]);
  return most;
}

// Whether a number is neither infinite nor NaN, by its bits.
inline bool is_finite(float x) { return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u; }
