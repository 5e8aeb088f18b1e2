// Quantised matrices as f32 or bf16, in f32 with the bits of the CPU's decoders (src/weights/gguf/blocks.rs and
// src/weights/quantised/bitsandbytes.rs): no product may be joined with the sum after it, which the _rn functions see to. A
// thread decodes a run of numbers, neighbours under one scale.
#define RUN 8u

struct BlocksShape {
  uint n;
  uint columns;
  // bytes of a row
  uint row_bytes;
  // 0: Q4_0, 1: Q8_0, 2: Q4_K, 3: Q6_K
  uint kind;
  // rows of a head whose rows are stored as [half, 2] for what is [2, half]; 0: as they are
  uint halves;
  // 1: the result is bf16, 0: f32
  uint narrow;
};

// The f16 in two bytes, its NaNs as infinite.
DEVICE float half_at(const uchar* bytes) {
  uint bits = uint(bytes[0]) | uint(bytes[1]) << 8, exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
  float size = exponent == 0    ? float(mantissa) * 5.9604645e-8f
               : exponent == 31 ? __uint_as_float(0x7f800000u)
                                : __uint_as_float((exponent + 112u) << 23 | mantissa << 13);
  return bits & 0x8000u ? -size : size;
}

DEVICE float signed_byte(uchar byte) { return byte < 128 ? float(byte) : float(byte) - 256.0f; }

DEVICE float q4_0(const uchar* block, uint i) {
  uint byte = block[2 + i % 16];
  return (float(i < 16 ? byte & 15u : byte >> 4) - 8.0f) * half_at(block);
}

DEVICE float q8_0(const uchar* block, uint i) { return signed_byte(block[2 + i]) * half_at(block); }

// d, dmin, 12 bytes of eight scales and minima, 128 bytes: two runs of 32 in the halves of 32 bytes.
DEVICE float q4_k(const uchar* block, uint i) {
  uint run = i / 32, j = run % 4;
  uint scale = block[4 + j], minimum = block[8 + j], both = block[12 + j];
  if (run < 4) {
    scale &= 63u, minimum &= 63u;
  } else {
    scale = (both & 15u) | (scale >> 6) << 4, minimum = both >> 4 | (minimum >> 6) << 4;
  }
  uint q = block[16 + run / 2 * 32 + i % 32] >> (run % 2 * 4) & 15u;
  float product = half_at(block) * float(scale) * float(q);
  return __fsub_rn(product, __fmul_rn(half_at(block + 2), float(minimum)));
}

// 128 bytes of low halves, 64 of high quarters, 16 signed scales, d.
DEVICE float q6_k(const uchar* block, uint i) {
  uint side = i / 128, run = i % 128 / 32, place = i % 32;
  uint low = block[side * 64 + run % 2 * 32 + place] >> (run / 2 * 4) & 15u;
  uint high = block[128 + side * 32 + place] >> (run * 2) & 3u;
  return (float(low | high << 4) - 32.0f) * (signed_byte(block[192 + i / 16]) * half_at(block + 208));
}

// To the nearest bf16, ties to even. A card's NaN, which a file's infinite scale makes, has all bits set: it would come out as
// zero, here and as an f16.
DEVICE float rounded_to_bfloat(float x) {
  if (x != x) return x;
  uint bits = __float_as_uint(x);
  return __uint_as_float((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

// 16 bytes, which move at once.
struct __align__(16) Four {
  uint words[4];
};

DEVICE uint bfloat_bits(float x) { return __float_as_uint(rounded_to_bfloat(x)) >> 16; }

// Puts the `count` numbers of a run, rounded to the nearest bf16 where that is asked for.
DEVICE void store(void* out, uint at, const float (&run)[RUN], uint count, uint narrow) {
  if (narrow && count == RUN) {
    Four four;
    for (uint i = 0; i < 4; i++) four.words[i] = bfloat_bits(run[2 * i]) | bfloat_bits(run[2 * i + 1]) << 16;
    *(Four*)((unsigned short*)out + at) = four;
  } else if (narrow) {
    for (uint i = 0; i < count; i++) ((unsigned short*)out)[at + i] = (unsigned short)bfloat_bits(run[i]);
  } else {
    for (uint i = 0; i < count; i++) ((float*)out)[at + i] = run[i];
  }
}

KERNEL dequantise_blocks(const uchar* bytes, void* out, const BlocksShape shape) {
  PLACE;
  uint at = (blockIdx.x * THREADS + index) * RUN;
  if (at >= shape.n) return;
  uint row = at / shape.columns, column = at % shape.columns;
  if (shape.halves > 0) {
    uint place = row % shape.halves, half_rows = shape.halves / 2;
    row = row - place + place % half_rows * 2 + place / half_rows;
  }
  const uchar* of_row = bytes + row * shape.row_bytes;
  float run[RUN];
#pragma unroll
  for (uint i = 0; i < RUN; i++) {
    switch (shape.kind) {
      case 0: run[i] = q4_0(of_row + column / 32 * 18, column % 32 + i); break;
      case 1: run[i] = q8_0(of_row + column / 32 * 34, column % 32 + i); break;
      case 2: run[i] = q4_k(of_row + column / 256 * 144, column % 256 + i); break;
      default: run[i] = q6_k(of_row + column / 256 * 210, column % 256 + i);
    }
  }
  store(out, at, run, RUN, shape.narrow);
}

struct FourBitShape {
  uint n;
  // a block has 2^block numbers, whole runs
  uint block;
  // blocks under one scale of the scales; 0: the scales are plain
  uint nested;
  float offset;
  // 0: f32, 1: f16, 2: bf16
  uint round;
  // 1: the result is bf16, 0: f32
  uint narrow;
};

// To the nearest f16, ties to even.
DEVICE float rounded_to_half(float x) {
  if (x != x) return x;
  float size = fabsf(x);
  // below 2^-14 an f16 counts in steps of 2^-24, as f32 does between 1/2 and 1
  if (size < 6.1035156e-5f) return copysignf((x + 0.75f) - 0.75f, x);
  if (size >= 65520.0f) return copysignf(__uint_as_float(0x7f800000u), x);
  uint bits = __float_as_uint(x);
  return __uint_as_float((bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu);
}

// bitsandbytes' two codes a byte, the first in the high half: code · absmax of its block
KERNEL dequantise_four_bit(const uchar* bytes, const float* codes, const float* absmax,
                           const uchar* absmax_bytes, const float* map, void* out,
                           const FourBitShape shape) {
  PLACE;
  uint at = (blockIdx.x * THREADS + index) * RUN;
  if (at >= shape.n) return;
  uint block = at >> shape.block, count = min(shape.n - at, RUN);
  float scale;
  if (shape.nested > 0) {
    float inner = __fmul_rn(map[absmax_bytes[block]], absmax[block / shape.nested]);
    scale = __fadd_rn(inner, shape.offset);
  } else {
    scale = absmax[block];
  }
  uint packed = 0;
  if (count == RUN) {
    packed = *(const uint*)(bytes + at / 2);
  } else {
    for (uint i = 0; i < count; i += 2) packed |= uint(bytes[(at + i) / 2]) << i * 4;
  }
  float run[RUN];
#pragma unroll
  for (uint i = 0; i < RUN; i++) {
    float value = codes[packed >> (i ^ 1u) * 4 & 15u] * scale;
    if (shape.round == 1) value = rounded_to_half(value);
    if (shape.round == 2) value = rounded_to_bfloat(value);
    run[i] = value;
  }
  store(out, at, run, count, shape.narrow);
}
