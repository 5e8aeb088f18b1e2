// SiLU, GELU and its tanh form, alone and as gates, and Gemma's soft cap: a thread an element. Metal has no erf; its form
// here is that of src/kernels/special.rs.
struct Elements {
  uint n;
  // 0: SiLU, 1: GELU by erf, 2: GELU by tanh
  uint form;
};

struct Capped {
  uint n;
  float cap;
};

inline float error_function(float x) {
  float size = fabs(x), small = fmin(size, 1.0f), z = small * small;
  float near = 7.8824974e-5f;
  near = near * z - 8.018855e-4f;
  near = near * z + 5.189312e-3f;
  near = near * z - 2.6854329e-2f;
  near = near * z + 0.11283597f;
  near = near * z - 0.37612626f;
  near = near * z + 1.1283792f;
  // the logarithm of 1 − erf on [1, 4]; beyond, erf is 1 in f32
  float t = fmin(fmax(size, 1.0f), 4.0f);
  float log = 1.6140616e-6f;
  log = log * t - 4.5590623e-5f;
  log = log * t + 5.9276953e-4f;
  log = log * t - 4.7402224e-3f;
  log = log * t + 2.6364718e-2f;
  log = log * t - 0.10997824f;
  log = log * t - 0.6319371f;
  log = log * t - 1.1301666f;
  log = log * t + 3.0321296e-4f;
  return size >= 1.0f ? copysign(1.0f - precise::exp(log), x) : near * x;
}

// A value, and the derivative there.
struct Valued {
  float value;
  float slope;
};

inline Valued activated(float x, uint form) {
  Valued f;
  if (form == 0) {
    float s = 1.0f / (1.0f + precise::exp(-x));
    f.value = x * s;
    f.slope = s * (1.0f + x * (1.0f - s));
  } else if (form == 1) {
    float probability = 0.5f * (1.0f + error_function(x * 0.70710678f));
    f.value = x * probability;
    f.slope = probability + x * 0.39894228f * precise::exp(-0.5f * x * x);
  } else {
    // beyond 10 tanh is 1 in f32, and within its argument does not overflow
    float u = 0.7978846f * (x + 0.044715f * x * x * x);
    float t = precise::tanh(fmin(fmax(u, -10.0f), 10.0f));
    float du = 0.7978846f * (1.0f + 3.0f * 0.044715f * x * x);
    f.value = 0.5f * x * (1.0f + t);
    f.slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * du;
  }
  return f;
}

// f(gate) · up
KERNEL gated(device const float* gate, device const float* up, device float* y, constant Elements& elements, WHERE) {
  uint i = group.x * THREADS + index;
  if (i < elements.n) y[i] = activated(gate[i], elements.form).value * up[i];
}

KERNEL gated_backward(device const float* gate, device const float* up, device const float* dy, device float* dgate,
                      device float* dup, constant Elements& elements, WHERE) {
  uint i = group.x * THREADS + index;
  if (i >= elements.n) return;
  Valued f = activated(gate[i], elements.form);
  dup[i] = dy[i] * f.value;
  dgate[i] = dy[i] * up[i] * f.slope;
}

KERNEL activation(device const float* x, device float* y, constant Elements& elements, WHERE) {
  uint i = group.x * THREADS + index;
  if (i < elements.n) y[i] = activated(x[i], elements.form).value;
}

KERNEL activation_backward(device const float* x, device const float* dy, device float* dx,
                           constant Elements& elements, WHERE) {
  uint i = group.x * THREADS + index;
  if (i < elements.n) dx[i] = activated(x[i], elements.form).slope * dy[i];
}

inline float capped(float x, float cap) {
  float u = x / cap;
  // compared, since fmin and fmax make a number of a NaN
  return cap * precise::tanh(u < -10.0f ? -10.0f : u > 10.0f ? 10.0f : u);
}

// cap · tanh(x / cap), in place
KERNEL soft_cap(device float* x, constant Capped& shape, WHERE) {
  uint i = group.x * THREADS + index;
  if (i < shape.n) x[i] = capped(x[i], shape.cap);
}

// Its derivative from the capped y: 1 − (y / cap)²
KERNEL soft_cap_slope(device const float* y, device float* slope, constant Capped& shape, WHERE) {
  uint i = group.x * THREADS + index;
  if (i < shape.n) slope[i] = 1.0f - (y[i] / shape.cap) * (y[i] / shape.cap);
}
