// Rotary positions (Su et al. 2021): a thread turns one pair of a head's coordinates, in place.
struct RopeShape {
  // pairs in all
  uint n;
  // pairs of a head that turn, and coordinates a head
  uint half_dim;
  uint dim;
  uint heads;
  // 1 where neighbours turn together, 0 where halves do
  uint neighbours;
  // −1 turns back
  float sign;
};

KERNEL rope(device const float* cosines, device const float* sines, device float* x, constant RopeShape& shape, WHERE) {
  uint at = group.x * THREADS + index;
  if (at >= shape.n) return;
  uint pair = at % shape.half_dim, head = at / shape.half_dim, token = head / shape.heads;
  float c = cosines[token * shape.half_dim + pair], s = shape.sign * sines[token * shape.half_dim + pair];
  device float* of_head = x + head * shape.dim;
  uint first = shape.neighbours ? 2 * pair : pair, second = shape.neighbours ? first + 1 : pair + shape.half_dim;
  float a = of_head[first], b = of_head[second];
  of_head[first] = a * c - b * s;
  of_head[second] = b * c + a * s;
}
