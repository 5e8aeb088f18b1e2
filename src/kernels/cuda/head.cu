// What the head says of one token a row of logits[positions, vocabulary]: a block a row.
struct HeadShape {
  uint vocabulary;
};

// Loads that a thread has under way at once: a row is long, and there are few of them.
#define AT_ONCE 16u

DEVICE void load_some(float (&some)[AT_ONCE], const float* row, uint start, uint end) {
  for (uint j = 0; j < AT_ONCE; j++) some[j] = start + j * THREADS < end ? row[start + j * THREADS] : -3e38f;
}

// scores[position] = log-prob, entropy, mean logit, 1 where the target is the likeliest, logarithm of the sum
KERNEL head_scores(const float* logits, const uint* targets, float* scores,
                   const HeadShape shape) {
  PLACE;
  __shared__ float room[WARPS];
  __shared__ uint places[WARPS];
  logits += blockIdx.x * shape.vocabulary;
  float top = -3e38f;
  uint place = shape.vocabulary;
  for (uint start = index; start < shape.vocabulary; start += AT_ONCE * THREADS) {
    float some[AT_ONCE];
    load_some(some, logits, start, shape.vocabulary);
    for (uint j = 0; j < AT_ONCE; j++) {
      if (some[j] > top) top = some[j], place = start + j * THREADS;
    }
  }
  // the first of the largest
  float highest = warp_max(top);
  uint first = warp_min(top == highest ? place : shape.vocabulary);
  if (lane == 0) room[warp] = highest, places[warp] = first;
  __syncthreads();
  highest = room[0], first = places[0];
  for (uint i = 1; i < WARPS; i++) {
    if (room[i] > highest || (room[i] == highest && places[i] < first)) highest = room[i], first = places[i];
  }
  float sum = 0.0f, products = 0.0f, plain = 0.0f;
  for (uint start = index; start < shape.vocabulary; start += AT_ONCE * THREADS) {
    float some[AT_ONCE];
    load_some(some, logits, start, shape.vocabulary);
    for (uint j = 0; j < AT_ONCE; j++) {
      if (start + j * THREADS >= shape.vocabulary) continue;
      float e = expf(some[j] - highest);
      sum += e;
      // of the distance to the largest: the entropy is then a sum of small numbers
      products += e * (some[j] - highest);
      plain += some[j];
    }
  }
  sum = group_sum(sum, room, lane, warp);
  products = group_sum(products, room, lane, warp);
  plain = group_sum(plain, room, lane, warp);
  if (index == 0) {
    float log = logf(sum);
    float* score = scores + blockIdx.x * 5;
    uint target = targets[blockIdx.x];
    score[0] = logits[target] - highest - log;
    score[1] = log - products / sum;
    score[2] = plain / float(shape.vocabulary);
    score[3] = first == target ? 1.0f : 0.0f;
    score[4] = highest + log;
  }
}

// onehot(target) − softmax(logits), in the place of the logits
KERNEL head_slope(const uint* targets, const float* lse, float* logits, const HeadShape shape) {
  PLACE;
  uint i = blockIdx.x * THREADS + index;
  if (i >= shape.vocabulary) return;
  float* logit = logits + blockIdx.y * shape.vocabulary + i;
  *logit = (i == targets[blockIdx.y] ? 1.0f : 0.0f) - expf(*logit - lse[blockIdx.y]);
}
