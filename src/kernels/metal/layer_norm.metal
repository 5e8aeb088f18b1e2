// Layer norm (Ba et al. 2016) over the rows of x[tokens, hidden]: a threadgroup a row.
struct Centre {
  float mean;
  // one over the deviation
  float scale;
};

inline Centre centre_of(device const float* x, constant NormShape& shape, threadgroup float* room, uint index, uint lane,
                        uint simd) {
  float sum = 0.0f;
  for (uint i = index; i < shape.hidden; i += THREADS) sum += x[i];
  Centre centre;
  centre.mean = group_sum(sum, room, lane, simd) / float(shape.hidden);
  float squares = 0.0f;
  for (uint i = index; i < shape.hidden; i += THREADS) squares += (x[i] - centre.mean) * (x[i] - centre.mean);
  centre.scale = 1.0f / precise::sqrt(group_sum(squares, room, lane, simd) / float(shape.hidden) + shape.eps);
  return centre;
}

// y = (x − mean(x)) / sqrt(variance(x) + eps) · w + b
KERNEL layer_norm(device const float* x, device const float* w, device const float* b, device float* y,
                  constant NormShape& shape, WHERE) {
  SHARED float room[SIMDS];
  x += group.x * shape.hidden;
  y += group.x * shape.hidden;
  Centre centre = centre_of(x, shape, room, index, lane, simd);
  for (uint i = index; i < shape.hidden; i += THREADS) y[i] = (x[i] - centre.mean) * centre.scale * w[i] + b[i];
}

// With c = x − mean(x), s = 1 / sqrt(variance(x) + eps) and g = dy · w:
// dx = s · (g − mean(g) − c · s² · mean(g · c)) + residual
KERNEL layer_norm_backward(device const float* x, device const float* w, device const float* dy,
                           device const float* residual, device float* dx, constant NormShape& shape, WHERE) {
  SHARED float room[SIMDS];
  uint first = group.x * shape.hidden;
  x += first, dy += first, residual += first, dx += first;
  Centre centre = centre_of(x, shape, room, index, lane, simd);
  float sum = 0.0f, along = 0.0f;
  for (uint i = index; i < shape.hidden; i += THREADS) {
    float g = dy[i] * w[i];
    sum += g;
    along += g * (x[i] - centre.mean);
  }
  float mean = group_sum(sum, room, lane, simd) / float(shape.hidden);
  along = group_sum(along, room, lane, simd) / float(shape.hidden) * centre.scale * centre.scale;
  for (uint i = index; i < shape.hidden; i += THREADS) {
    dx[i] = (dy[i] * w[i] - mean - (x[i] - centre.mean) * along) * centre.scale + residual[i];
  }
}
