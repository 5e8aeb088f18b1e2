// What the head says of one token a row of logits[positions, vocabulary]: a threadgroup a row.
struct HeadShape {
  uint vocabulary;
};

// scores[position] = log-prob, entropy, mean logit, 1 where the target is the likeliest, logarithm of the sum
KERNEL head_scores(device const float* logits, device const uint* targets, device float* scores,
                   constant HeadShape& shape, WHERE) {
  SHARED float room[SIMDS];
  SHARED uint places[SIMDS];
  logits += group.x * shape.vocabulary;
  float top = -3e38f;
  uint place = shape.vocabulary;
  for (uint i = index; i < shape.vocabulary; i += THREADS) {
    if (logits[i] > top) top = logits[i], place = i;
  }
  // the first of the largest
  float highest = simd_max(top);
  uint first = simd_min(top == highest ? place : shape.vocabulary);
  if (lane == 0) room[simd] = highest, places[simd] = first;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  highest = room[0], first = places[0];
  for (uint i = 1; i < SIMDS; i++) {
    if (room[i] > highest || (room[i] == highest && places[i] < first)) highest = room[i], first = places[i];
  }
  float sum = 0.0f, products = 0.0f, plain = 0.0f;
  for (uint i = index; i < shape.vocabulary; i += THREADS) {
    float e = precise::exp(logits[i] - highest);
    sum += e;
    // of the distance to the largest: the entropy is then a sum of small numbers
    products += e * (logits[i] - highest);
    plain += logits[i];
  }
  sum = group_sum(sum, room, lane, simd);
  products = group_sum(products, room, lane, simd);
  plain = group_sum(plain, room, lane, simd);
  if (index == 0) {
    float log = precise::log(sum);
    device float* score = scores + group.x * 5;
    uint target = targets[group.x];
    score[0] = logits[target] - highest - log;
    score[1] = log - products / sum;
    score[2] = plain / float(shape.vocabulary);
    score[3] = first == target ? 1.0f : 0.0f;
    score[4] = highest + log;
  }
}

// onehot(target) − softmax(logits), in the place of the logits
KERNEL head_slope(device const uint* targets, device const float* lse, device float* logits, constant HeadShape& shape,
                  WHERE) {
  uint i = group.x * THREADS + index;
  if (i >= shape.vocabulary) return;
  device float* logit = logits + group.y * shape.vocabulary + i;
  *logit = (i == targets[group.y] ? 1.0f : 0.0f) - precise::exp(*logit - lse[group.y]);
}
