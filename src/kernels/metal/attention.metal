// Causal attention over segments that share prompts (../attention.rs), forward: a threadgroup a block of queries and a
// head. Keys pass in tiles of 32; a simdgroup has a few queries, whose scores its lanes hold, one key each; the scores
// never leave the threadgroup. A head's coordinates pass through the tile 64 at a time.
#define WIDE 64u
// a row of the tile is one number longer, so that lanes reading a column meet different banks
#define TILE_ROW 65u

struct AttentionShape {
  // query heads and key heads
  uint heads;
  uint kv;
  uint dim;
  // positions back that a query sees; all bits set: all
  uint window;
  float scale;
  // 0: scores are not capped
  float cap;
  // queries times heads
  uint queries;
};

// How many of the 64 coordinates of a chunk a head has.
inline uint chunk_dims(uint chunk, constant AttentionShape& shape) {
  return shape.dim > chunk * WIDE ? min(shape.dim - chunk * WIDE, WIDE) : 0u;
}

// Rows of a matrix that count on from `first` to `cut`, and from there on in another place.
struct Rows {
  uint first;
  uint cut;
  uint rest;
};

inline uint row_of(Rows rows, uint j) { return j < rows.cut ? rows.first + j : rows.rest + (j - rows.cut); }

// A block of queries: those of one span that the launcher cut. Query r of it sees the keys up to end + r.
struct QueryBlock {
  uint first;
  uint count;
  // where the span's keys stand, prefix first
  uint prefix;
  uint cut;
  uint own;
  uint end;
};

// Columns `column..` of the 32 rows `first..` into the tile, 0 beyond `end` and beyond the head.
inline void load_tile(threadgroup float* tile, device const float* from, Rows rows, uint first, uint end, uint width,
                      uint column, uint dims, uint index) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint at = index; at < LANES * WIDE; at += THREADS) {
    uint row = at / WIDE, d = at % WIDE;
    bool in = first + row < end && d < dims;
    tile[row * TILE_ROW + d] = in ? from[row_of(rows, first + row) * width + column + d] : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// sums[r] += Σ_d left[at[r] + d] · tile[lane][d]
template <uint R>
inline void add_dots(thread float (&sums)[R], threadgroup const float* tile, device const float* left,
                     thread const uint (&at)[R], uint dims, uint lane) {
  for (uint d = 0; d < dims; d++) {
    float x = tile[lane * TILE_ROW + d];
    for (uint r = 0; r < R; r++) sums[r] += left[at[r] + d] * x;
  }
}

// sums[r][..] += Σ_j weights[r][j] · tile[j][..], two columns a lane
template <uint R, uint CHUNKS>
inline void add_mix(thread float (&sums)[R][2 * CHUNKS], uint chunk, threadgroup const float* tile,
                    threadgroup const float* weights, uint lane) {
  float low[R], high[R];
  for (uint r = 0; r < R; r++) low[r] = high[r] = 0.0f;
  for (uint j = 0; j < LANES; j++) {
    float a = tile[j * TILE_ROW + lane], b = tile[j * TILE_ROW + LANES + lane];
    for (uint r = 0; r < R; r++) {
      float weight = weights[r * LANES + j];
      low[r] += weight * a;
      high[r] += weight * b;
    }
  }
  // the sums' index is known where this is unrolled, so that they stay in registers
  for (uint c = 0; c < CHUNKS; c++) {
    for (uint r = 0; r < R && c == chunk; r++) {
      sums[r][2 * c] += low[r];
      sums[r][2 * c + 1] += high[r];
    }
  }
}

inline float scored(float dot, constant AttentionShape& shape) {
  float score = dot * shape.scale;
  return shape.cap > 0.0f ? capped(score, shape.cap) : score;
}

// Whether the query that sees the keys before `end` sees key j.
inline bool sees(uint end, uint j, constant AttentionShape& shape) { return j < end && end - j <= shape.window; }

// The first key that the query which sees those before `end` sees, down to a whole tile.
inline uint first_tile(uint end, constant AttentionShape& shape) {
  return end > shape.window ? (end - shape.window) / LANES * LANES : 0u;
}

template <uint CHUNKS, uint R>
inline void attention(device const float* q, device const float* k, device const float* v,
                      device const uint* blocks, device float* values, device float* lse,
                      constant AttentionShape& shape, threadgroup float* tile, threadgroup float* weights, uint3 group,
                      uint index, uint lane, uint simd) {
  device const QueryBlock& block = ((device const QueryBlock*)blocks)[group.x];
  uint head = group.y, width = shape.heads * shape.dim, kv_width = shape.kv * shape.dim;
  uint kv_column = head / (shape.heads / shape.kv) * shape.dim;
  Rows keys = {block.prefix, block.cut, block.own};
  uint last = block.end + block.count - 1;
  weights += simd * R * LANES;

  uint at[R];
  float top[R], total[R], sums[R][2 * CHUNKS];
  for (uint r = 0; r < R; r++) {
    // queries beyond the block do the last one's work and write nothing
    uint query = block.first + min(simd * R + r, block.count - 1);
    at[r] = query * width + head * shape.dim;
    top[r] = -3e38f;
    total[r] = 0.0f;
    for (uint c = 0; c < 2 * CHUNKS; c++) sums[r][c] = 0.0f;
  }
  for (uint first = first_tile(block.end, shape); first < last; first += LANES) {
    float dots[R];
    for (uint r = 0; r < R; r++) dots[r] = 0.0f;
    for (uint c = 0; c < CHUNKS; c++) {
      uint dims = chunk_dims(c, shape);
      load_tile(tile, k, keys, first, last, kv_width, kv_column + c * WIDE, dims, index);
      add_dots<R>(dots, tile, q + c * WIDE, at, dims, lane);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint r = 0; r < R; r++) {
      uint end = block.end + min(simd * R + r, block.count - 1);
      bool seen = sees(end, first + lane, shape);
      float score = scored(dots[r], shape);
      float higher = fmax(top[r], simd_max(seen ? score : -3e38f));
      float weight = seen ? precise::exp(score - higher) : 0.0f;
      float shrink = precise::exp(top[r] - higher);
      total[r] = total[r] * shrink + simd_sum(weight);
      for (uint c = 0; c < 2 * CHUNKS; c++) sums[r][c] *= shrink;
      top[r] = higher;
      weights[r * LANES + lane] = weight;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint c = 0; c < CHUNKS; c++) {
      uint dims = chunk_dims(c, shape);
      load_tile(tile, v, keys, first, last, kv_width, kv_column + c * WIDE, dims, index);
      add_mix<R, CHUNKS>(sums, c, tile, weights, lane);
    }
  }
  for (uint r = 0; r < R; r++) {
    uint query = simd * R + r;
    if (query >= block.count) continue;
    for (uint c = 0; c < 2 * CHUNKS; c++) {
      uint d = c * LANES + lane;
      if (d < shape.dim) values[at[r] + d] = sums[r][c] / total[r];
    }
    if (lane == 0) lse[(block.first + query) * shape.heads + head] = top[r] + precise::log(total[r]);
  }
}

// Heads of up to 64 · CHUNKS coordinates; R queries a simdgroup, so 8 · R a block.
#define ATTENTION(NAME, CHUNKS, R)                                                                                     \
  KERNEL NAME(device const float* q, device const float* k, device const float* v, device const uint* blocks,         \
              device float* values, device float* lse, constant AttentionShape& shape, WHERE) {                        \
    SHARED float tile[LANES * TILE_ROW];                                                                               \
    SHARED float weights[SIMDS * R * LANES];                                                                           \
    attention<CHUNKS, R>(q, k, v, blocks, values, lse, shape, tile, weights, group, index, lane, simd);                \
  }
ATTENTION(attention_64, 1, 4)
ATTENTION(attention_128, 2, 4)
ATTENTION(attention_256, 4, 2)
