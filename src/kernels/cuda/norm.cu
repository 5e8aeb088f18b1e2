// RMSNorm (Zhang & Sennrich 2019) over the rows of x[tokens, hidden]: a block a row.
struct NormShape {
  uint hidden;
  float eps;
};

DEVICE float inverse_rms(const float* x, const NormShape shape, float* room, uint index, uint lane,
                         uint warp) {
  float squares = 0.0f;
  for (uint i = index; i < shape.hidden; i += THREADS) squares += x[i] * x[i];
  return 1.0f / sqrtf(group_sum(squares, room, lane, warp) / float(shape.hidden) + shape.eps);
}

// y = x / sqrt(mean(x²) + eps) · w
KERNEL rms_norm(const float* x, const float* w, float* y, const NormShape shape) {
  PLACE;
  __shared__ float room[WARPS];
  x += blockIdx.x * shape.hidden;
  y += blockIdx.x * shape.hidden;
  float scale = inverse_rms(x, shape, room, index, lane, warp);
  for (uint i = index; i < shape.hidden; i += THREADS) y[i] = x[i] * scale * w[i];
}

// With s = 1 / sqrt(mean(x²) + eps) and g = dy · w: dx = s · (g − x · s² · mean(g · x)) + residual
KERNEL rms_norm_backward(const float* x, const float* w, const float* dy,
                         const float* residual, float* dx, const NormShape shape) {
  PLACE;
  __shared__ float room[WARPS];
  uint first = blockIdx.x * shape.hidden;
  x += first, dy += first, residual += first, dx += first;
  float s = inverse_rms(x, shape, room, index, lane, warp);
  float along = 0.0f;
  for (uint i = index; i < shape.hidden; i += THREADS) along += dy[i] * w[i] * x[i];
  float mean = group_sum(along, room, lane, warp) / float(shape.hidden) * s * s * s;
  for (uint i = index; i < shape.hidden; i += THREADS) dx[i] = dy[i] * w[i] * s - x[i] * mean + residual[i];
}
