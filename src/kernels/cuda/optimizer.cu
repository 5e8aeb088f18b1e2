// Optimizers over one flat vector, in one launch, and what is asked of the vector before: each block's sum of squares
// and whether a step would make a number that is not finite. A block strides over the vector.
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

KERNEL adam_step(const float* grads, float* params, float* m, float* v,
                 const AdamShape shape) {
  PLACE;
  for (uint i = blockIdx.x * THREADS + index; i < shape.n; i += gridDim.x * THREADS) {
    Moments next = adam(params[i], grads[i], m[i], v[i], shape);
    m[i] = next.m, v[i] = next.v, params[i] = next.p;
  }
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

KERNEL rmsprop_step(const float* grads, float* params, float* square_avg,
                    const RmspropShape shape) {
  PLACE;
  for (uint i = blockIdx.x * THREADS + index; i < shape.n; i += gridDim.x * THREADS) {
    Moments next = rmsprop(params[i], grads[i], square_avg[i], shape);
    square_avg[i] = next.v, params[i] = next.p;
  }
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
