// RMSNorm (Zhang & Sennrich 2019) over the rows of x[tokens, hidden]: a threadgroup a row.
struct NormShape {
  uint hidden;
  float eps;
};

inline float inverse_rms(device const float* x, constant NormShape& shape, threadgroup float* room, uint index, uint lane,
                         uint simd) {
  float squares = 0.0f;
  for (uint i = index; i < shape.hidden; i += THREADS) squares += x[i] * x[i];
  return 1.0f / precise::sqrt(group_sum(squares, room, lane, simd) / float(shape.hidden) + shape.eps);
}

// y = x / sqrt(mean(x²) + eps) · w
KERNEL rms_norm(device const float* x, device const float* w, device float* y, constant NormShape& shape, WHERE) {
  SHARED float room[SIMDS];
  x += group.x * shape.hidden;
  y += group.x * shape.hidden;
  float scale = inverse_rms(x, shape, room, index, lane, simd);
  for (uint i = index; i < shape.hidden; i += THREADS) y[i] = x[i] * scale * w[i];
}

// With s = 1 / sqrt(mean(x²) + eps) and g = dy · w: dx = s · (g − x · s² · mean(g · x)) + residual
KERNEL rms_norm_backward(device const float* x, device const float* w, device const float* dy,
                         device const float* residual, device float* dx, constant NormShape& shape, WHERE) {
  SHARED float room[SIMDS];
  uint first = group.x * shape.hidden;
  x += first, dy += first, residual += first, dx += first;
  float s = inverse_rms(x, shape, room, index, lane, simd);
  float along = 0.0f;
  for (uint i = index; i < shape.hidden; i += THREADS) along += dy[i] * w[i] * x[i];
  float mean = group_sum(along, room, lane, simd) / float(shape.hidden) * s * s * s;
  for (uint i = index; i < shape.hidden; i += THREADS) dx[i] = dy[i] * w[i] * s - x[i] * mean + residual[i];
}
