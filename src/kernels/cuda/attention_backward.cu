// Attention's backward pass. With P = exp(S − lse) and D = Σ values · d_values a query: dS = P · (d_values · Vᵀ − D), times
// the cap's derivative. Scores are computed again, twice: once by blocks of queries for dq, once by blocks of keys for dk
// and dv, so that every sum has one block that adds it in one order.

// delta[query, head] = Σ values · d_values: a warp each
KERNEL attention_delta(const float* values, const float* d_values, float* delta,
                       const AttentionShape shape) {
  PLACE;
  uint at = blockIdx.x * WARPS + warp;
  if (at >= shape.queries) return;
  float sum = 0.0f;
  for (uint d = lane; d < shape.dim; d += LANES) sum += values[at * shape.dim + d] * d_values[at * shape.dim + d];
  sum = warp_sum(sum);
  if (lane == 0) delta[at] = sum;
}

// P and dS of one query and one key.
struct Weighted {
  float weight;
  float d_score;
};

DEVICE Weighted weighted(float dot, float d_weight, float lse, float delta, bool seen, const AttentionShape shape) {
  float score = scored(dot, shape);
  Weighted it;
  it.weight = seen ? expf(score - lse) : 0.0f;
  it.d_score = it.weight * (d_weight - delta) * shape.scale;
  if (shape.cap > 0.0f) it.d_score *= 1.0f - (score / shape.cap) * (score / shape.cap);
  return it;
}

template <uint CHUNKS, uint R>
DEVICE void attention_dq(const float* q, const float* k, const float* v,
                         const float* d_values, const float* lse, const float* delta,
                         const uint* blocks, float* dq, const AttentionShape shape,
                         float* tile, float* weights, uint index, uint lane,
                         uint warp) {
  const QueryBlock& block = ((const QueryBlock*)blocks)[blockIdx.x];
  uint head = blockIdx.y, width = shape.heads * shape.dim, kv_width = shape.kv * shape.dim;
  uint kv_column = head / (shape.heads / shape.kv) * shape.dim;
  Rows keys = {block.prefix, block.cut, block.own};
  uint last = block.end + block.count - 1;
  weights += warp * R * LANES;

  uint at[R];
  float sums[R][2 * CHUNKS];
  for (uint r = 0; r < R; r++) {
    at[r] = (block.first + min(warp * R + r, block.count - 1)) * width + head * shape.dim;
    for (uint c = 0; c < 2 * CHUNKS; c++) sums[r][c] = 0.0f;
  }
  for (uint first = first_tile(block.end, shape); first < last; first += LANES) {
    float dots[R], d_weights[R];
    for (uint r = 0; r < R; r++) dots[r] = d_weights[r] = 0.0f;
    for (uint c = 0; c < CHUNKS; c++) {
      uint dims = chunk_dims(c, shape);
      load_tile(tile, v, keys, first, last, kv_width, kv_column + c * WIDE, dims, index);
      add_dots<R>(d_weights, tile, d_values + c * WIDE, at, dims, lane);
    }
    for (uint c = 0; c < CHUNKS; c++) {
      uint dims = chunk_dims(c, shape);
      load_tile(tile, k, keys, first, last, kv_width, kv_column + c * WIDE, dims, index);
      add_dots<R>(dots, tile, q + c * WIDE, at, dims, lane);
    }
    __syncwarp();
    for (uint r = 0; r < R; r++) {
      uint query = min(warp * R + r, block.count - 1), row = (block.first + query) * shape.heads + head;
      bool seen = sees(block.end + query, first + lane, shape);
      weights[r * LANES + lane] = weighted(dots[r], d_weights[r], lse[row], delta[row], seen, shape).d_score;
    }
    __syncwarp();
    for (uint c = 0; c < CHUNKS; c++) {
      uint dims = chunk_dims(c, shape);
      // a head of one chunk finds its keys where they are
      if (CHUNKS > 1) load_tile(tile, k, keys, first, last, kv_width, kv_column + c * WIDE, dims, index);
      add_mix<R, CHUNKS>(sums, c, tile, weights, lane);
    }
  }
  for (uint r = 0; r < R; r++) {
    if (warp * R + r >= block.count) continue;
    for (uint c = 0; c < 2 * CHUNKS; c++) {
      uint d = c * LANES + lane;
      if (d < shape.dim) dq[at[r] + d] = sums[r][c];
    }
  }
}

// A block of keys that lie together, and which of the meetings are its own.
struct KeyBlock {
  uint first;
  uint count;
  uint meetings;
  uint meetings_end;
};

// Queries of one span that see a block of keys.
struct Meeting {
  uint first;
  uint count;
  // the place of the block's first key among the span's, and the keys before which the first query sees
  uint key;
  uint end;
};

template <uint CHUNKS, uint R>
DEVICE void attention_dkv(const float* q, const float* k, const float* v,
                          const float* d_values, const float* lse, const float* delta,
                          const uint* blocks, const uint* all_meetings, float* dk,
                          float* dv, const AttentionShape shape, float* tile,
                          float* d_scores, float* weights, uint index, uint lane,
                          uint warp) {
  const KeyBlock& block = ((const KeyBlock*)blocks)[blockIdx.x];
  const Meeting* meetings = (const Meeting*)all_meetings;
  uint kv_head = blockIdx.y, width = shape.heads * shape.dim, kv_width = shape.kv * shape.dim;
  uint served = shape.heads / shape.kv;
  d_scores += warp * R * LANES;
  weights += warp * R * LANES;

  uint at[R];
  float k_sums[R][2 * CHUNKS], v_sums[R][2 * CHUNKS];
  for (uint r = 0; r < R; r++) {
    at[r] = (block.first + min(warp * R + r, block.count - 1)) * kv_width + kv_head * shape.dim;
    for (uint c = 0; c < 2 * CHUNKS; c++) k_sums[r][c] = v_sums[r][c] = 0.0f;
  }
  for (uint m = block.meetings; m < block.meetings_end; m++) {
    const Meeting& meeting = meetings[m];
    Rows queries = {meeting.first, meeting.count, 0u};
    for (uint head = kv_head * served; head < (kv_head + 1) * served; head++) {
      for (uint first = 0; first < meeting.count; first += LANES) {
        float dots[R], d_weights[R];
        for (uint r = 0; r < R; r++) dots[r] = d_weights[r] = 0.0f;
        for (uint c = 0; c < CHUNKS; c++) {
          uint dims = chunk_dims(c, shape), column = head * shape.dim + c * WIDE;
          load_tile(tile, q, queries, first, meeting.count, width, column, dims, index);
          add_dots<R>(dots, tile, k + c * WIDE, at, dims, lane);
        }
        for (uint c = 0; c < CHUNKS; c++) {
          uint dims = chunk_dims(c, shape), column = head * shape.dim + c * WIDE;
          load_tile(tile, d_values, queries, first, meeting.count, width, column, dims, index);
          add_dots<R>(d_weights, tile, v + c * WIDE, at, dims, lane);
        }
        uint query = first + lane, row = (meeting.first + min(query, meeting.count - 1)) * shape.heads + head;
        __syncwarp();
        for (uint r = 0; r < R; r++) {
          uint key = meeting.key + min(warp * R + r, block.count - 1);
          bool seen = query < meeting.count && sees(meeting.end + query, key, shape);
          Weighted it = weighted(dots[r], d_weights[r], lse[row], delta[row], seen, shape);
          weights[r * LANES + lane] = it.weight;
          d_scores[r * LANES + lane] = it.d_score;
        }
        __syncwarp();
        for (uint c = 0; c < CHUNKS; c++) {
          uint dims = chunk_dims(c, shape), column = head * shape.dim + c * WIDE;
          // heads of one chunk find the gradients where they are
          if (CHUNKS > 1) load_tile(tile, d_values, queries, first, meeting.count, width, column, dims, index);
          add_mix<R, CHUNKS>(v_sums, c, tile, weights, lane);
        }
        for (uint c = 0; c < CHUNKS; c++) {
          uint dims = chunk_dims(c, shape), column = head * shape.dim + c * WIDE;
          load_tile(tile, q, queries, first, meeting.count, width, column, dims, index);
          add_mix<R, CHUNKS>(k_sums, c, tile, d_scores, lane);
        }
      }
    }
  }
  for (uint r = 0; r < R; r++) {
    if (warp * R + r >= block.count) continue;
    for (uint c = 0; c < 2 * CHUNKS; c++) {
      uint d = c * LANES + lane;
      if (d < shape.dim) {
        dk[at[r] + d] = k_sums[r][c];
        dv[at[r] + d] = v_sums[r][c];
      }
    }
  }
}

#define ATTENTION_BACKWARD(DIM, CHUNKS, R) \
  KERNEL attention_dq_##DIM(const float* q, const float* k, const float* v, \
                            const float* d_values, const float* lse, const float* delta, \
                            const uint* blocks, float* dq, const AttentionShape shape) { \
    PLACE; \
    __shared__ float tile[LANES * TILE_ROW]; \
    __shared__ float weights[WARPS * R * LANES]; \
    attention_dq<CHUNKS, R>(q, k, v, d_values, lse, delta, blocks, dq, shape, tile, weights, index, lane, \
                            warp); \
  } \
  KERNEL attention_dkv_##DIM(const float* q, const float* k, const float* v, \
                             const float* d_values, const float* lse, const float* delta, \
                             const uint* blocks, const uint* meetings, float* dk, \
                             float* dv, const AttentionShape shape) { \
    PLACE; \
    __shared__ float tile[LANES * TILE_ROW]; \
    __shared__ float d_scores[WARPS * R * LANES]; \
    __shared__ float weights[WARPS * R * LANES]; \
    attention_dkv<CHUNKS, R>(q, k, v, d_values, lse, delta, blocks, meetings, dk, dv, shape, tile, d_scores, weights, \
                             index, lane, warp); \
  }
ATTENTION_BACKWARD(64, 1, 4)
ATTENTION_BACKWARD(128, 2, 4)
ATTENTION_BACKWARD(256, 4, 2)
