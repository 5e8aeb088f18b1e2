// Layer norm (Ba et al. 2016) over the rows of x[tokens, hidden]: a block a row.
struct Centre {
  float mean;
  // one over the deviation
  float scale;
};

DEVICE Centre centre_of(const float* x, const NormShape shape, float* room, uint index, uint lane,
                        uint warp) {
  float sum = 0.0f;
  for (uint i = index; i < shape.hidden; i += THREADS) sum += x[i];
  Centre centre;
  centre.mean = group_sum(sum, room, lane, warp) / float(shape.hidden);
  float squares = 0.0f;
  for (uint i = index; i < shape.hidden; i += THREADS) squares += (x[i] - centre.mean) * (x[i] - centre.mean);
  centre.scale = 1.0f / sqrtf(group_sum(squares, room, lane, warp) / float(shape.hidden) + shape.eps);
  return centre;
}

// y = (x − mean(x)) / sqrt(variance(x) + eps) · w + b
KERNEL layer_norm(const float* x, const float* w, const float* b, float* y,
                  const NormShape shape) {
  PLACE;
  __shared__ float room[WARPS];
  x += blockIdx.x * shape.hidden;
  y += blockIdx.x * shape.hidden;
  Centre centre = centre_of(x, shape, room, index, lane, warp);
  for (uint i = index; i < shape.hidden; i += THREADS) y[i] = (x[i] - centre.mean) * centre.scale * w[i] + b[i];
}

// With c = x − mean(x), s = 1 / sqrt(variance(x) + eps) and g = dy · w:
// dx = s · (g − mean(g) − c · s² · mean(g · c)) + residual
KERNEL layer_norm_backward(const float* x, const float* w, const float* dy,
                           const float* residual, float* dx, const NormShape shape) {
  PLACE;
  __shared__ float room[WARPS];
  uint first = blockIdx.x * shape.hidden;
  x += first, dy += first, residual += first, dx += first;
  Centre centre = centre_of(x, shape, room, index, lane, warp);
  float sum = 0.0f, along = 0.0f;
  for (uint i = index; i < shape.hidden; i += THREADS) {
    float g = dy[i] * w[i];
    sum += g;
    along += g * (x[i] - centre.mean);
  }
  float mean = group_sum(sum, room, lane, warp) / float(shape.hidden);
  along = group_sum(along, room, lane, warp) / float(shape.hidden) * centre.scale * centre.scale;
  for (uint i = index; i < shape.hidden; i += THREADS) {
    dx[i] = (dy[i] * w[i] - mean - (x[i] - centre.mean) * along) * centre.scale + residual[i];
  }
}
