// Optimizers over one flat vector: a step in one launch, which also says how large the numbers are that it made. From
// those the next step is known to stay finite; where they are too large for that, a launch asks element by element before
// anything is changed. And a block's sum of squares. A block strides over the vector.
struct AdamShape {
  uint n;
  float grad_scale;
  // 1 − beta1, beta2, 1 − beta2
  float weight;
  float keep;
  float take;
  // 1 − rate · weight decay, and the root of the second moment's correction
  float decay;
  float root;
  float rate;
  float eps;
};

struct Moments {
  float m;
  float v;
  float p;
};

// The largest absolute values that a block made: of parameters, first and second moments.
DEVICE void put_largest(Moments most, float* to, float* room, uint index, uint lane, uint warp) {
  most.p = group_max(most.p, room, lane, warp);
  most.m = group_max(most.m, room, lane, warp);
  most.v = group_max(most.v, room, lane, warp);
  if (index == 0) to[0] = most.p, to[1] = most.m, to[2] = most.v;
}

DEVICE Moments larger(Moments a, Moments b) {
  Moments most;
  most.m = fmaxf(a.m, fabsf(b.m)), most.v = fmaxf(a.v, fabsf(b.v)), most.p = fmaxf(a.p, fabsf(b.p));
  return most;
}

DEVICE Moments adam(float p, float g, float m, float v, const AdamShape shape) {
  g *= shape.grad_scale;
  Moments next;
  // torch's lerp
  next.m = shape.weight < 0.5f ? m + shape.weight * (g - m) : g - (g - m) * (1.0f - shape.weight);
  next.v = v * shape.keep + shape.take * g * g;
  next.p = p * shape.decay - shape.rate * (next.m / (sqrtf(next.v) / shape.root + shape.eps));
  return next;
}

// bad[block] = how many elements would not be finite
KERNEL adam_check(const float* params, const float* grads, const float* m, const float* v,
                  float* bad, const AdamShape shape) {
  PLACE;
  __shared__ float room[WARPS];
  float count = 0.0f;
  for (uint i = blockIdx.x * THREADS + index; i < shape.n; i += gridDim.x * THREADS) {
    Moments next = adam(params[i], grads[i], m[i], v[i], shape);
    if (!(is_finite(next.m) && is_finite(next.v) && is_finite(next.p))) count += 1.0f;
  }
  count = group_sum(count, room, lane, warp);
  if (index == 0) bad[blockIdx.x] = count;
}

// largest[block] = the largest parameter and moments made
KERNEL adam_step(const float* grads, float* params, float* m, float* v, float* largest, const AdamShape shape) {
  PLACE;
  __shared__ float room[WARPS];
  Moments most = {0.0f, 0.0f, 0.0f};
  for (uint i = blockIdx.x * THREADS + index; i < shape.n; i += gridDim.x * THREADS) {
    Moments next = adam(params[i], grads[i], m[i], v[i], shape);
    m[i] = next.m, v[i] = next.v, params[i] = next.p;
    most = larger(most, next);
  }
  put_largest(most, largest + 3 * blockIdx.x, room, index, lane, warp);
}

struct RmspropShape {
  uint n;
  float grad_scale;
  // the L2 term's factor
  float decay;
  float keep;
  float take;
  float rate;
  float eps;
};

DEVICE Moments rmsprop(float p, float g, float s, const RmspropShape shape) {
  g = g * shape.grad_scale + shape.decay * p;
  Moments next;
  next.m = 0.0f;
  next.v = s * shape.keep + shape.take * g * g;
  next.p = p - shape.rate * (g / (sqrtf(next.v) + shape.eps));
  return next;
}

KERNEL rmsprop_check(const float* params, const float* grads, const float* square_avg,
                     float* bad, const RmspropShape shape) {
  PLACE;
  __shared__ float room[WARPS];
  float count = 0.0f;
  for (uint i = blockIdx.x * THREADS + index; i < shape.n; i += gridDim.x * THREADS) {
    Moments next = rmsprop(params[i], grads[i], square_avg[i], shape);
    if (!(is_finite(next.v) && is_finite(next.p))) count += 1.0f;
  }
  count = group_sum(count, room, lane, warp);
  if (index == 0) bad[blockIdx.x] = count;
}

KERNEL rmsprop_step(const float* grads, float* params, float* square_avg, float* largest, const RmspropShape shape) {
  PLACE;
  __shared__ float room[WARPS];
  Moments most = {0.0f, 0.0f, 0.0f};
  for (uint i = blockIdx.x * THREADS + index; i < shape.n; i += gridDim.x * THREADS) {
    Moments next = rmsprop(params[i], grads[i], square_avg[i], shape);
    square_avg[i] = next.v, params[i] = next.p;
    most = larger(most, next);
  }
  put_largest(most, largest + 3 * blockIdx.x, room, index, lane, warp);
}

struct FlatShape {
  uint n;
};

KERNEL squares(const float* x, float* sums, const FlatShape shape) {
  PLACE;
  __shared__ float room[WARPS];
  float sum = 0.0f;
  for (uint i = blockIdx.x * THREADS + index; i < shape.n; i += gridDim.x * THREADS) sum += x[i] * x[i];
  sum = group_sum(sum, room, lane, warp);
  if (index == 0) sums[blockIdx.x] = sum;
}
