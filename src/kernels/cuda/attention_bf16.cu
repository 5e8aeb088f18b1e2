// Attention on the matrix unit, for runs that multiply in bf16 (../attention.rs): q, k, v and the gradient of the values
// are bf16, scores and sums f32, weights are rounded for their product. Heads have up to DIM coordinates, in eights.
//
// A warp has 16 rows (queries; keys for dk and dv), so a block has 128. What they meet passes in tiles of ROWS rows through
// shared memory, the next tile under way while one is used. A block gives OUT columns of the result: the sums of more would
// not fit its registers.

typedef unsigned short bfloat;

// Four words longer than its numbers: eight rows then lie in different banks.
template <uint DIM>
struct Pitch {
  static const uint WORDS = DIM / 2 + 4;
};

// Sends rows `first..` of one head to a tile, zeros beyond `end` and beyond the head.
template <uint DIM, uint ROWS>
DEVICE void send_tile(uint* tile, const bfloat* from, Rows rows, uint first, uint end, uint width, uint dim, uint index) {
  for (uint at = index; at < ROWS * (DIM / 8); at += THREADS) {
    uint row = at / (DIM / 8), d = at % (DIM / 8) * 8;
    bool in = first + row < end && d < dim;
    send(tile + row * Pitch<DIM>::WORDS + d / 2, in ? from + row_of(rows, first + row) * width + d : from, in);
  }
}

// Sends the rows `first..` of two sides to a tile each, if there are any, as one group.
template <uint DIM, uint ROWS>
DEVICE void send_both(uint* tile, uint* other_tile, const bfloat* from, const bfloat* other, Rows rows, uint first, uint end,
                      uint width, uint dim, uint index) {
  if (first < end) {
    send_tile<DIM, ROWS>(tile, from, rows, first, end, width, dim, index);
    send_tile<DIM, ROWS>(other_tile, other, rows, first, end, width, dim, index);
  }
  close_group();
}

template <uint OUT>
DEVICE void clear(float (&sums)[OUT / 8][4]) {
  for (uint n = 0; n < OUT / 8; n++) {
    for (uint i = 0; i < 4; i++) sums[n][i] = 0.0f;
  }
}

// A warp's 16 rows of one head as the left side of products: this lane's rows are those at `low` and `high`.
template <uint DIM>
DEVICE void load_left(uint (&left)[DIM / 16][4], const bfloat* low, const bfloat* high, uint dim, uint lane) {
  for (uint s = 0; s < DIM / 16; s++) {
    for (uint side = 0; side < 2; side++) {
      uint d = s * 16 + side * 8 + lane % 4 * 2;
      left[s][side * 2] = d < dim ? *(const uint*)(low + d) : 0u;
      left[s][side * 2 + 1] = d < dim ? *(const uint*)(high + d) : 0u;
    }
  }
}

// sums[16, ROWS] = left[16, DIM] · tile[ROWS, DIM]ᵀ, of the tile's rows from `first` on
template <uint DIM, uint ROWS>
DEVICE void dots(float (&sums)[ROWS / 8][4], const uint (&left)[DIM / 16][4], const uint* tile, uint first, uint lane) {
  for (uint n = 0; n < ROWS / 8; n++) {
    for (uint i = 0; i < 4; i++) sums[n][i] = 0.0f;
  }
  const uint* row = tile + (first + lane / 16 * 8 + lane % 8) * Pitch<DIM>::WORDS + lane / 8 % 2 * 4;
#pragma unroll
  for (uint s = 0; s < DIM / 16; s++) {
#pragma unroll
    for (uint n = 0; n < ROWS / 8; n += 2) {
      uint right[4];
      load_four(right, row + n * 8 * Pitch<DIM>::WORDS + s * 8);
      multiply(sums[n], left[s], right[0], right[1]);
      multiply(sums[n + 1], left[s], right[2], right[3]);
    }
  }
}

// sums[16, OUT] += weights[16, ROWS] · tile[ROWS, OUT], of the tile's rows from `first` on and this block's columns
template <uint DIM, uint OUT, uint ROWS>
DEVICE void mix(float (&sums)[OUT / 8][4], const float (&weights)[ROWS / 8][4], const uint* tile, uint first, uint lane) {
  const uint* row = tile + (first + lane % 16) * Pitch<DIM>::WORDS + blockIdx.z * OUT / 2 + lane / 16 * 4;
#pragma unroll
  for (uint s = 0; s < ROWS / 16; s++) {
    const float(&low)[4] = weights[2 * s];
    const float(&high)[4] = weights[2 * s + 1];
    uint left[4] = {bf16_pair(low[0], low[1]), bf16_pair(low[2], low[3]), bf16_pair(high[0], high[1]), bf16_pair(high[2], high[3])};
#pragma unroll
    for (uint n = 0; n < OUT / 8; n += 2) {
      uint right[4];
      load_four_turned(right, row + s * 16 * Pitch<DIM>::WORDS + n * 4);
      multiply(sums[n], left, right[0], right[1]);
      multiply(sums[n + 1], left, right[2], right[3]);
    }
  }
}

// A warp's 16 rows of sums to their places; `low` and `high` say where this lane's two rows go, null for nowhere.
template <uint OUT>
DEVICE void put(const float (&sums)[OUT / 8][4], float* low, float* high, float low_factor, float high_factor, uint dim, uint lane) {
#pragma unroll
  for (uint n = 0; n < OUT / 8; n++) {
    uint d = blockIdx.z * OUT + n * 8 + lane % 4 * 2;
    if (d >= dim) continue;
    if (low) low[d] = sums[n][0] * low_factor, low[d + 1] = sums[n][1] * low_factor;
    if (high) high[d] = sums[n][2] * high_factor, high[d + 1] = sums[n][3] * high_factor;
  }
}

// Sums and maxima over the four lanes that share a row.
DEVICE float row_sum(float value) {
  value += __shfl_xor_sync(ALL_LANES, value, 1);
  return value + __shfl_xor_sync(ALL_LANES, value, 2);
}

DEVICE float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, 1));
  return fmaxf(value, __shfl_xor_sync(ALL_LANES, value, 2));
}

// The two queries of a lane, as offsets into their block; queries beyond it do the last one's work and write nothing.
struct TwoRows {
  uint row[2];
  bool in[2];
};

DEVICE TwoRows two_rows(uint count, uint lane, uint warp) {
  TwoRows two;
  for (uint i = 0; i < 2; i++) {
    uint row = warp * 16 + i * 8 + lane / 4;
    two.in[i] = row < count;
    two.row[i] = min(row, count - 1);
  }
  return two;
}

template <uint DIM, uint OUT, uint ROWS>
DEVICE void attention_bf16(const bfloat* q, const bfloat* k, const bfloat* v, const uint* blocks, float* values, float* lse,
                           const AttentionShape shape, uint* key_tiles, uint* value_tiles, uint index, uint lane, uint warp) {
  const uint TILE = ROWS * Pitch<DIM>::WORDS;
  const QueryBlock& block = ((const QueryBlock*)blocks)[blockIdx.x];
  uint head = blockIdx.y, width = shape.heads * shape.dim, kv_width = shape.kv * shape.dim;
  uint kv_column = head / (shape.heads / shape.kv) * shape.dim;
  k += kv_column, v += kv_column, q += head * shape.dim, values += head * shape.dim;
  Rows keys = {block.prefix, block.cut, block.own};
  uint last = block.end + block.count - 1;
  TwoRows two = two_rows(block.count, lane, warp);
  uint at[2] = {(block.first + two.row[0]) * width, (block.first + two.row[1]) * width};

  uint left[DIM / 16][4];
  load_left<DIM>(left, q + at[0], q + at[1], shape.dim, lane);
  float top[2] = {-3e38f, -3e38f}, total[2] = {0.0f, 0.0f}, sums[OUT / 8][4];
  clear<OUT>(sums);
  uint first = first_tile(block.end, shape), turn = 0;
  send_both<DIM, ROWS>(key_tiles, value_tiles, k, v, keys, first, last, kv_width, shape.dim, index);
  for (; first < last; first += ROWS, turn ^= 1) {
    uint next = (turn ^ 1) * TILE;
    send_both<DIM, ROWS>(key_tiles + next, value_tiles + next, k, v, keys, first + ROWS, last, kv_width, shape.dim, index);
    await_all_but_last();
    __syncthreads();
    float weights[ROWS / 8][4], higher[2] = {top[0], top[1]};
    dots<DIM, ROWS>(weights, left, key_tiles + turn * TILE, 0, lane);
#pragma unroll
    for (uint n = 0; n < ROWS / 8; n++) {
#pragma unroll
      for (uint i = 0; i < 4; i++) {
        uint key = first + n * 8 + lane % 4 * 2 + i % 2;
        // what is not seen has no weight in the end
        weights[n][i] = sees(block.end + two.row[i / 2], key, shape) ? scored(weights[n][i], shape) : -INFINITY;
        higher[i / 2] = fmaxf(higher[i / 2], weights[n][i]);
      }
    }
    float shrink[2], more[2] = {0.0f, 0.0f};
    for (uint i = 0; i < 2; i++) {
      higher[i] = row_max(higher[i]);
      shrink[i] = __expf(top[i] - higher[i]);
      top[i] = higher[i];
    }
#pragma unroll
    for (uint n = 0; n < ROWS / 8; n++) {
#pragma unroll
      for (uint i = 0; i < 4; i++) {
        weights[n][i] = __expf(weights[n][i] - top[i / 2]);
        more[i / 2] += weights[n][i];
      }
    }
    for (uint i = 0; i < 2; i++) total[i] = total[i] * shrink[i] + row_sum(more[i]);
#pragma unroll
    for (uint n = 0; n < OUT / 8; n++) {
#pragma unroll
      for (uint i = 0; i < 4; i++) sums[n][i] *= shrink[i / 2];
    }
    mix<DIM, OUT, ROWS>(sums, weights, value_tiles + turn * TILE, 0, lane);
    // the tiles are filled again in the next round
    __syncthreads();
  }
  float* to[2];
  for (uint i = 0; i < 2; i++) {
    to[i] = two.in[i] ? values + at[i] : nullptr;
    if (two.in[i] && lane % 4 == 0 && blockIdx.z == 0) lse[(block.first + two.row[i]) * shape.heads + head] = top[i] + logf(total[i]);
  }
  put<OUT>(sums, to[0], to[1], 1.0f / total[0], 1.0f / total[1], shape.dim, lane);
}

template <uint DIM, uint OUT, uint ROWS>
DEVICE void attention_dq_bf16(const bfloat* q, const bfloat* k, const bfloat* v, const bfloat* d_values, const float* lse,
                              const float* delta, const uint* blocks, float* dq, const AttentionShape shape, uint* key_tiles,
                              uint* value_tiles, uint index, uint lane, uint warp) {
  const uint TILE = ROWS * Pitch<DIM>::WORDS;
  const QueryBlock& block = ((const QueryBlock*)blocks)[blockIdx.x];
  uint head = blockIdx.y, width = shape.heads * shape.dim, kv_width = shape.kv * shape.dim;
  uint kv_column = head / (shape.heads / shape.kv) * shape.dim;
  k += kv_column, v += kv_column, q += head * shape.dim, d_values += head * shape.dim, dq += head * shape.dim;
  Rows keys = {block.prefix, block.cut, block.own};
  uint last = block.end + block.count - 1;
  TwoRows two = two_rows(block.count, lane, warp);
  uint at[2];
  float log_sum[2], mean[2], sums[OUT / 8][4];
  for (uint i = 0; i < 2; i++) {
    uint row = block.first + two.row[i];
    at[i] = row * width;
    log_sum[i] = lse[row * shape.heads + head];
    mean[i] = delta[row * shape.heads + head];
  }
  clear<OUT>(sums);
  uint left[DIM / 16][4], d_left[DIM / 16][4];
  load_left<DIM>(left, q + at[0], q + at[1], shape.dim, lane);
  load_left<DIM>(d_left, d_values + at[0], d_values + at[1], shape.dim, lane);
  uint first = first_tile(block.end, shape), turn = 0;
  send_both<DIM, ROWS>(key_tiles, value_tiles, k, v, keys, first, last, kv_width, shape.dim, index);
  for (; first < last; first += ROWS, turn ^= 1) {
    uint next = (turn ^ 1) * TILE;
    send_both<DIM, ROWS>(key_tiles + next, value_tiles + next, k, v, keys, first + ROWS, last, kv_width, shape.dim, index);
    await_all_but_last();
    __syncthreads();
    float scores[ROWS / 8][4], d_weights[ROWS / 8][4];
    dots<DIM, ROWS>(scores, left, key_tiles + turn * TILE, 0, lane);
    dots<DIM, ROWS>(d_weights, d_left, value_tiles + turn * TILE, 0, lane);
#pragma unroll
    for (uint n = 0; n < ROWS / 8; n++) {
#pragma unroll
      for (uint i = 0; i < 4; i++) {
        bool seen = sees(block.end + two.row[i / 2], first + n * 8 + lane % 4 * 2 + i % 2, shape);
        scores[n][i] = weighted(scores[n][i], d_weights[n][i], log_sum[i / 2], mean[i / 2], seen, shape).d_score;
      }
    }
    mix<DIM, OUT, ROWS>(sums, scores, key_tiles + turn * TILE, 0, lane);
    __syncthreads();
  }
  put<OUT>(sums, two.in[0] ? dq + at[0] : nullptr, two.in[1] ? dq + at[1] : nullptr, 1.0f, 1.0f, shape.dim, lane);
}

// Rows are keys here, and what they meet are the queries of one head; lse and delta are [head, query]. Heads that share keys
// have shares of dk and dv of their own, [key, head, dim].
template <uint DIM, uint OUT, uint ROWS, uint PART>
DEVICE void attention_dkv_bf16(const bfloat* q, const bfloat* k, const bfloat* v, const bfloat* d_values, const float* lse,
                               const float* delta, const uint* blocks, const uint* all_meetings, float* dk, float* dv,
                               const AttentionShape shape, uint* query_tiles, uint* d_tiles, uint index, uint lane, uint warp) {
  const uint TILE = ROWS * Pitch<DIM>::WORDS;
  const KeyBlock& block = ((const KeyBlock*)blocks)[blockIdx.x];
  const Meeting* meetings = (const Meeting*)all_meetings;
  uint head = blockIdx.y, width = shape.heads * shape.dim, kv_width = shape.kv * shape.dim;
  uint kv_column = head / (shape.heads / shape.kv) * shape.dim, rows = shape.queries / shape.heads;
  k += kv_column, v += kv_column, q += head * shape.dim, d_values += head * shape.dim;
  dk += head * shape.dim, dv += head * shape.dim, lse += head * rows, delta += head * rows;
  TwoRows two = two_rows(block.count, lane, warp);
  uint key[2];
  float k_sums[OUT / 8][4], v_sums[OUT / 8][4];
  for (uint i = 0; i < 2; i++) key[i] = block.first + two.row[i];
  clear<OUT>(k_sums), clear<OUT>(v_sums);
  uint k_left[DIM / 16][4], v_left[DIM / 16][4];
  load_left<DIM>(k_left, k + key[0] * kv_width, k + key[1] * kv_width, shape.dim, lane);
  load_left<DIM>(v_left, v + key[0] * kv_width, v + key[1] * kv_width, shape.dim, lane);
  for (uint m = block.meetings; m < block.meetings_end; m++) {
    const Meeting& meeting = meetings[m];
    Rows queries = {meeting.first, meeting.count, 0u};
    uint turn = 0;
    send_both<DIM, ROWS>(query_tiles, d_tiles, q, d_values, queries, 0, meeting.count, width, shape.dim, index);
    for (uint first = 0; first < meeting.count; first += ROWS, turn ^= 1) {
      uint next = (turn ^ 1) * TILE;
      send_both<DIM, ROWS>(query_tiles + next, d_tiles + next, q, d_values, queries, first + ROWS, meeting.count, width, shape.dim,
                           index);
      await_all_but_last();
      __syncthreads();
      for (uint part = 0; part < ROWS; part += PART) {
        float weights[PART / 8][4], d_scores[PART / 8][4];
        dots<DIM, PART>(weights, k_left, query_tiles + turn * TILE, part, lane);
        dots<DIM, PART>(d_scores, v_left, d_tiles + turn * TILE, part, lane);
#pragma unroll
        for (uint n = 0; n < PART / 8; n++) {
#pragma unroll
          for (uint i = 0; i < 4; i++) {
            uint query = first + part + n * 8 + lane % 4 * 2 + i % 2;
            uint row = meeting.first + min(query, meeting.count - 1);
            bool seen = query < meeting.count && sees(meeting.end + query, meeting.key + two.row[i / 2], shape);
            Weighted it = weighted(weights[n][i], d_scores[n][i], lse[row], delta[row], seen, shape);
            weights[n][i] = it.weight;
            d_scores[n][i] = it.d_score;
          }
        }
        mix<DIM, OUT, PART>(v_sums, weights, d_tiles + turn * TILE, part, lane);
        mix<DIM, OUT, PART>(k_sums, d_scores, query_tiles + turn * TILE, part, lane);
      }
      __syncthreads();
    }
  }
  float *k_to[2], *v_to[2];
  for (uint i = 0; i < 2; i++) {
    k_to[i] = two.in[i] ? dk + key[i] * width : nullptr;
    v_to[i] = two.in[i] ? dv + key[i] * width : nullptr;
  }
  put<OUT>(k_sums, k_to[0], k_to[1], 1.0f, 1.0f, shape.dim, lane);
  put<OUT>(v_sums, v_to[0], v_to[1], 1.0f, 1.0f, shape.dim, lane);
}

struct SharesShape {
  // numbers of a sum
  uint n;
  // heads that share keys
  uint served;
  uint dim;
};

// The sums of the shares: a thread a number
KERNEL attention_shares(const float* k_shares, const float* v_shares, float* dk, float* dv, const SharesShape shape) {
  PLACE;
  uint at = blockIdx.x * THREADS + index;
  if (at >= shape.n) return;
  uint first = at / shape.dim * shape.served * shape.dim + at % shape.dim;
  float k = 0.0f, v = 0.0f;
  for (uint i = 0; i < shape.served; i++) {
    k += k_shares[first + i * shape.dim];
    v += v_shares[first + i * shape.dim];
  }
  dk[at] = k;
  dv[at] = v;
}

// Two tiles of either side.
#define TILES(DIM, ROWS) __shared__ __align__(16) uint these[2 * ROWS * Pitch<DIM>::WORDS], those[2 * ROWS * Pitch<DIM>::WORDS]

// Heads of up to DIM coordinates; a block gives so many columns of values and dq, and of dk and dv.
#define ATTENTION_BF16(DIM, ROWS, OUT, KEY_OUT) \
  KERNEL attention_bf16_##DIM(const bfloat* q, const bfloat* k, const bfloat* v, const uint* blocks, float* values, float* lse, \
                              const AttentionShape shape) { \
    PLACE; \
    TILES(DIM, ROWS); \
    attention_bf16<DIM, OUT, ROWS>(q, k, v, blocks, values, lse, shape, these, those, index, lane, warp); \
  } \
  KERNEL attention_dq_bf16_##DIM(const bfloat* q, const bfloat* k, const bfloat* v, const bfloat* d_values, const float* lse, \
                                 const float* delta, const uint* blocks, float* dq, const AttentionShape shape) { \
    PLACE; \
    TILES(DIM, ROWS); \
    attention_dq_bf16<DIM, OUT, ROWS>(q, k, v, d_values, lse, delta, blocks, dq, shape, these, those, index, lane, warp); \
  } \
  KERNEL attention_dkv_bf16_##DIM(const bfloat* q, const bfloat* k, const bfloat* v, const bfloat* d_values, const float* lse, \
                                  const float* delta, const uint* blocks, const uint* meetings, float* dk, float* dv, \
                                  const AttentionShape shape) { \
    PLACE; \
    TILES(DIM, ROWS); \
    attention_dkv_bf16<DIM, KEY_OUT, ROWS, 16>(q, k, v, d_values, lse, delta, blocks, meetings, dk, dv, shape, these, those, \
                                               index, lane, warp); \
  }
ATTENTION_BF16(64, 32, 64, 64)
ATTENTION_BF16(128, 32, 128, 128)
ATTENTION_BF16(256, 16, 128, 64)
