// SiLU, GELU and its tanh form, alone and as gates, and Gemma's soft cap: a thread an element.
struct Elements {
  uint n;
  // 0: SiLU, 1: GELU by erf, 2: GELU by tanh
  uint form;
};

struct Capped {
  uint n;
  float cap;
};

// A value, and the derivative there.
struct Valued {
  float value;
  float slope;
};

DEVICE Valued activated(float x, uint form) {
  Valued f;
  if (form == 0) {
    float s = 1.0f / (1.0f + expf(-x));
    f.value = x * s;
    f.slope = s * (1.0f + x * (1.0f - s));
  } else if (form == 1) {
    float probability = 0.5f * (1.0f + erff(x * 0.70710678f));
    f.value = x * probability;
    f.slope = probability + x * 0.39894228f * expf(-0.5f * x * x);
  } else {
    // beyond 10 tanh is 1 in f32, and within its argument does not overflow
    float u = 0.7978846f * (x + 0.044715f * x * x * x);
    float t = tanhf(fminf(fmaxf(u, -10.0f), 10.0f));
    float du = 0.7978846f * (1.0f + 3.0f * 0.044715f * x * x);
    f.value = 0.5f * x * (1.0f + t);
    f.slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * du;
  }
  return f;
}

// f(gate) · up
KERNEL gated(const float* gate, const float* up, float* y, const Elements elements) {
  PLACE;
  uint i = blockIdx.x * THREADS + index;
  if (i < elements.n) y[i] = activated(gate[i], elements.form).value * up[i];
}

KERNEL gated_backward(const float* gate, const float* up, const float* dy, float* dgate,
                      float* dup, const Elements elements) {
  PLACE;
  uint i = blockIdx.x * THREADS + index;
  if (i >= elements.n) return;
  Valued f = activated(gate[i], elements.form);
  dup[i] = dy[i] * f.value;
  dgate[i] = dy[i] * up[i] * f.slope;
}

KERNEL activation(const float* x, float* y, const Elements elements) {
  PLACE;
  uint i = blockIdx.x * THREADS + index;
  if (i < elements.n) y[i] = activated(x[i], elements.form).value;
}

KERNEL activation_backward(const float* x, const float* dy, float* dx,
                           const Elements elements) {
  PLACE;
  uint i = blockIdx.x * THREADS + index;
  if (i < elements.n) dx[i] = activated(x[i], elements.form).slope * dy[i];
}

DEVICE float capped(float x, float cap) {
  float u = x / cap;
  // compared, since fminf and fmaxf make a number of a NaN
  return cap * tanhf(u < -10.0f ? -10.0f : u > 10.0f ? 10.0f : u);
}

// cap · tanh(x / cap), in place
KERNEL soft_cap(float* x, const Capped shape) {
  PLACE;
  uint i = blockIdx.x * THREADS + index;
  if (i < shape.n) x[i] = capped(x[i], shape.cap);
}

// Its derivative from the capped y: 1 − (y / cap)²
KERNEL soft_cap_slope(const float* y, float* slope, const Capped shape) {
  PLACE;
  uint i = blockIdx.x * THREADS + index;
  if (i < shape.n) slope[i] = 1.0f - (y[i] / shape.cap) * (y[i] / shape.cap);
}
