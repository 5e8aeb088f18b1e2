// Quantised matrices as f32, with the bits of the CPU's decoders (src/weights/gguf/blocks.rs and
// src/weights/quantised/bitsandbytes.rs): no product may be joined with the sum after it. A thread decodes a run of numbers,
// neighbours under one scale.
#pragma METAL fp contract(off)
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
};

// The f16 in two bytes, its NaNs as infinite.
inline float half_at(device const uchar* bytes) {
  uint bits = uint(bytes[0]) | uint(bytes[1]) << 8, exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
  float size = exponent == 0    ? float(mantissa) * 5.9604645e-8f
               : exponent == 31 ? as_type<float>(0x7f800000u)
                                : as_type<float>((exponent + 112u) << 23 | mantissa << 13);
  return bits & 0x8000u ? -size : size;
}

inline float signed_byte(uchar byte) { return byte < 128 ? float(byte) : float(byte) - 256.0f; }

inline float q4_0(device const uchar* block, uint i) {
  uint byte = block[2 + i % 16];
  return (float(i < 16 ? byte & 15u : byte >> 4) - 8.0f) * half_at(block);
}

inline float q8_0(device const uchar* block, uint i) { return signed_byte(block[2 + i]) * half_at(block); }

// d, dmin, 12 bytes of eight scales and minima, 128 bytes: two runs of 32 in the halves of 32 bytes.
inline float q4_k(device const uchar* block, uint i) {
  uint run = i / 32, j = run % 4;
  uint scale = block[4 + j], minimum = block[8 + j], both = block[12 + j];
  if (run < 4) {
    scale &= 63u, minimum &= 63u;
  } else {
    scale = (both & 15u) | (scale >> 6) << 4, minimum = both >> 4 | (minimum >> 6) << 4;
  }
  uint q = block[16 + run / 2 * 32 + i % 32] >> (run % 2 * 4) & 15u;
  float product = half_at(block) * float(scale) * float(q);
  return product - half_at(block + 2) * float(minimum);
}

// 128 bytes of low halves, 64 of high quarters, 16 signed scales, d.
inline float q6_k(device const uchar* block, uint i) {
  uint side = i / 128, run = i % 128 / 32, place = i % 32;
  uint low = block[side * 64 + run % 2 * 32 + place] >> (run / 2 * 4) & 15u;
  uint high = block[128 + side * 32 + place] >> (run * 2) & 3u;
  return (float(low | high << 4) - 32.0f) * (signed_byte(block[192 + i / 16]) * half_at(block + 208));
}

KERNEL dequantise_blocks(device const uchar* bytes, device float* out, constant BlocksShape& shape, WHERE) {
  uint at = (group.x * THREADS + index) * RUN;
  if (at >= shape.n) return;
  uint row = at / shape.columns, column = at % shape.columns;
  if (shape.halves > 0) {
    uint place = row % shape.halves, half_rows = shape.halves / 2;
    row = row - place + place % half_rows * 2 + place / half_rows;
  }
  device const uchar* of_row = bytes + row * shape.row_bytes;
  for (uint i = 0; i < RUN; i++) {
    switch (shape.kind) {
      case 0: out[at + i] = q4_0(of_row + column / 32 * 18, column % 32 + i); break;
      case 1: out[at + i] = q8_0(of_row + column / 32 * 34, column % 32 + i); break;
      case 2: out[at + i] = q4_k(of_row + column / 256 * 144, column % 256 + i); break;
      default: out[at + i] = q6_k(of_row + column / 256 * 210, column % 256 + i);
    }
  }
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
};

// To the nearest f16, ties to even. A NaN with all bits set would come out as zero, here and as a bf16.
inline float rounded_to_half(float x) {
  if (x != x) return x;
  float size = fabs(x);
  // below 2^-14 an f16 counts in steps of 2^-24, as f32 does between 1/2 and 1
  if (size < 6.1035156e-5f) return copysign((x + 0.75f) - 0.75f, x);
  if (size >= 65520.0f) return copysign(as_type<float>(0x7f800000u), x);
  uint bits = as_type<uint>(x);
  return as_type<float>((bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu);
}

inline float rounded_to_bfloat(float x) {
  if (x != x) return x;
  uint bits = as_type<uint>(x);
  return as_type<float>((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

// bitsandbytes' two codes a byte, the first in the high half: code · absmax of its block
KERNEL dequantise_four_bit(device const uchar* bytes, device const float* codes, device const float* absmax,
                           device const uchar* absmax_bytes, device const float* map, device float* out,
                           constant FourBitShape& shape, WHERE) {
  uint at = (group.x * THREADS + index) * RUN;
  if (at >= shape.n) return;
  uint block = at >> shape.block, end = min(at + RUN, shape.n);
  float scale;
  if (shape.nested > 0) {
    float inner = map[absmax_bytes[block]] * absmax[block / shape.nested];
    scale = inner + shape.offset;
  } else {
    scale = absmax[block];
  }
  for (; at < end; at++) {
    uint byte = bytes[at / 2];
    float value = codes[at % 2 ? byte & 15u : byte >> 4] * scale;
    out[at] = shape.round == 0 ? value : shape.round == 1 ? rounded_to_half(value) : rounded_to_bfloat(value);
  }
}
