// Optimizers over one flat vector: a step in one launch, which also says how large the numbers are that it made. From
// those the next step is known to stay finite; where they are too large for that, a launch asks element by element before
// anything is changed. And a threadgroup's sum of squares. A threadgroup strides over the vector.
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

// The largest absolute values that a threadgroup made: of parameters, first and second moments.
inline void put_largest(Moments most, device float* to, threadgroup float* room, uint index, uint lane, uint simd) {
  most.p = group_max(most.p, room, lane, simd);
  most.m = group_max(most.m, room, lane, simd);
  most.v = group_max(most.v, room, lane, simd);
  if (index == 0) to[0] = most.p, to[1] = most.m, to[2] = most.v;
}

inline Moments larger(Moments a, Moments b) {
  Moments most;
  most.m = fmax(a.m, fabs(b.m)), most.v = fmax(a.v, fabs(b.v)), most.p = fmax(a.p, fabs(b.p));
  return most;
}

inline Moments adam(float p, float g, float m, float v, constant AdamShape& shape) {
  g *= shape.grad_scale;
  Moments next;
  // torch's lerp
  next.m = shape.weight < 0.5f ? m + shape.weight * (g - m) : g - (g - m) * (1.0f - shape.weight);
  next.v = v * shape.keep + shape.take * g * g;
  next.p = p * shape.decay - shape.rate * (next.m / (precise::sqrt(next.v) / shape.root + shape.eps));
  return next;
}

// bad[group] = how many elements would not be finite
KERNEL adam_check(device const float* params, device const float* grads, device const float* m, device const float* v,
                  device float* bad, constant AdamShape& shape, WHERE) {
  SHARED float room[SIMDS];
  float count = 0.0f;
  for (uint i = group.x * THREADS + index; i < shape.n; i += groups.x * THREADS) {
    Moments next = adam(params[i], grads[i], m[i], v[i], shape);
    if (!(is_finite(next.m) && is_finite(next.v) && is_finite(next.p))) count += 1.0f;
  }
  count = group_sum(count, room, lane, simd);
  if (index == 0) bad[group.x] = count;
}

// largest[threadgroup] = the largest parameter and moments made
KERNEL adam_step(device const float* grads, device float* params, device float* m, device float* v,
                 device float* largest, constant AdamShape& shape, WHERE) {
  SHARED float room[SIMDS];
  Moments most = {0.0f, 0.0f, 0.0f};
  for (uint i = group.x * THREADS + index; i < shape.n; i += groups.x * THREADS) {
    Moments next = adam(params[i], grads[i], m[i], v[i], shape);
    m[i] = next.m, v[i] = next.v, params[i] = next.p;
    most = larger(most, next);
  }
  put_largest(most, largest + 3 * group.x, room, index, lane, simd);
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

inline Moments rmsprop(float p, float g, float s, constant RmspropShape& shape) {
  g = g * shape.grad_scale + shape.decay * p;
  Moments next;
  next.m = 0.0f;
  next.v = s * shape.keep + shape.take * g * g;
  next.p = p - shape.rate * (g / (precise::sqrt(next.v) + shape.eps));
  return next;
}

KERNEL rmsprop_check(device const float* params, device const float* grads, device const float* square_avg,
                     device float* bad, constant RmspropShape& shape, WHERE) {
  SHARED float room[SIMDS];
  float count = 0.0f;
  for (uint i = group.x * THREADS + index; i < shape.n; i += groups.x * THREADS) {
    Moments next = rmsprop(params[i], grads[i], square_avg[i], shape);
    if (!(is_finite(next.v) && is_finite(next.p))) count += 1.0f;
  }
  count = group_sum(count, room, lane, simd);
  if (index == 0) bad[group.x] = count;
}

KERNEL rmsprop_step(device const float* grads, device float* params, device float* square_avg,
                    device float* largest, constant RmspropShape& shape, WHERE) {
  SHARED float room[SIMDS];
  Moments most = {0.0f, 0.0f, 0.0f};
  for (uint i = group.x * THREADS + index; i < shape.n; i += groups.x * THREADS) {
    Moments next = rmsprop(params[i], grads[i], square_avg[i], shape);
    square_avg[i] = next.v, params[i] = next.p;
    most = larger(most, next);
  }
  put_largest(most, largest + 3 * group.x, room, index, lane, simd);
}

struct FlatShape {
  uint n;
};

KERNEL squares(device const float* x, device float* sums, constant FlatShape& shape, WHERE) {
  SHARED float room[SIMDS];
  float sum = 0.0f;
  for (uint i = group.x * THREADS + index; i < shape.n; i += groups.x * THREADS) sum += x[i] * x[i];
  sum = group_sum(sum, room, lane, simd);
  if (index == 0) sums[group.x] = sum;
}
