// The matrix unit, on every card since Ampere: products of bf16 with sums in f32, a warp's at once. A word holds two bf16
// numbers, the first in its low half. cuda/host has the same in C++.
#ifdef __CUDACC__

// Two numbers to the nearest bf16.
DEVICE uint bf16_pair(float low, float high) {
  uint pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// sums[16, 8] += a[16, 16] · b[16, 8]. With row = lane / 4 and column = lane % 4 · 2 a lane has of
//   a      (row, column..), (row + 8, column..), (row, column + 8..), (row + 8, column + 8..)
//   b      (column.., row), (column + 8.., row)
//   sums   (row, column..), (row + 8, column..)
DEVICE void multiply(float (&sums)[4], const uint (&a)[4], uint b_low, uint b_high) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

DEVICE uint in_shared(const void* at) { return (uint)__cvta_generic_to_shared(at); }

// Four matrices of 8 × 8 numbers from shared memory; lanes 8i.. to 8i + 7 name the rows of the i-th. A lane gets of each
// the numbers (row, column..), as above.
DEVICE void load_four(uint (&four)[4], const uint* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(four[0]), "=r"(four[1]), "=r"(four[2]), "=r"(four[3])
               : "r"(in_shared(row)) : "memory");
}

// The same of the matrices turned: (column.., row).
DEVICE void load_four_turned(uint (&four)[4], const uint* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(four[0]), "=r"(four[1]), "=r"(four[2]), "=r"(four[3])
               : "r"(in_shared(row)) : "memory");
}

// Sends 16 bytes on their way to shared memory, zeros where `from` is not to be read.
DEVICE void send(uint* to, const void* from, bool in) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(in_shared(to)), "l"(from), "r"(in ? 16 : 0) : "memory");
}

// What was sent since the last call is one group.
DEVICE void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all of this thread's groups but the last one.
DEVICE void await_all_but_last() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

#endif
