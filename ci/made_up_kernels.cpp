// What a made-up card (made_up_driver.c) computes: our kernels, which stand before this in the file that is compiled
// (ci/made-up-card.sh), candle's own as far as we use them, written again by their names and arguments, and cuBLAS's
// product.
#include <algorithm>
#include <memory>
#include <string>

namespace {
// A number as it lies, read and written as f32.
struct Bf16 {
  uint16_t bits;
  Bf16(float x) : bits((uint16_t)bf16_bits(x)) {}
  operator float() const { return bf16_number(bits); }
};

struct F16 {
  uint16_t bits;
  operator float() const {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size = exponent == 0    ? std::ldexp((float)fraction, -24)
                 : exponent == 31 ? (fraction == 0 ? INFINITY : NAN)
                                  : std::ldexp((float)(fraction + 1024), exponent - 25);
    return bits >> 15 ? -size : size;
  }
};

// Where element `i` of a tensor lies: candle gives no sizes for one in one piece.
struct Strided {
  const size_t *sizes, *strides;
  size_t dims;
  size_t at(size_t i) const {
    if (sizes == nullptr) return i;
    size_t place = 0;
    for (size_t d = dims; d-- > 0; i /= sizes[d]) place += i % sizes[d] * strides[d];
    return place;
  }
};
Strided strided(size_t dims, const size_t* info, size_t which) {
  return {info, info == nullptr ? nullptr : info + (1 + which) * dims, dims};
}

template <class From, class To>
void cast(size_t count, size_t dims, const size_t* info, const From* from, To* to) {
  for (size_t i = 0; i < count; i++) to[i] = (To)from[strided(dims, info, 0).at(i)];
}
template <class T>
void affine(size_t count, size_t dims, const size_t* info, const T* from, T* to, T factor, T term) {
  for (size_t i = 0; i < count; i++) to[i] = (from ? from[strided(dims, info, 0).at(i)] : to[i]) * factor + term;
}
template <class T>
void set(size_t count, size_t dims, const size_t* info, T number, T* to) {
  for (size_t i = 0; i < count; i++) to[strided(dims, info, 0).at(i)] = number;
}
template <class T, T (*of)(T, T)>
void binary(size_t count, size_t dims, const size_t* info, const T* a, const T* b, T* to) {
  for (size_t i = 0; i < count; i++) to[i] = of(a[strided(dims, info, 0).at(i)], b[strided(dims, info, 1).at(i)]);
}
template <class T>
void copy2d(const T* from, T* to, uint32_t rows, uint32_t columns, uint32_t from_row, uint32_t to_row) {
  for (size_t i = 0; i < rows; i++) std::memmove(to + i * to_row, from + i * from_row, columns * sizeof(T));
}
// Slices `ids` of the middle one of three dimensions, all in one piece.
template <class T>
void select(size_t count, size_t, const size_t*, const uint32_t* ids, const T* from, T* to, size_t, size_t sizes,
            size_t chosen, size_t inner) {
  for (size_t i = 0; i < count; i++) {
    uint32_t id = ids[i / inner % chosen];
    if (id >= sizes) std::abort();
    to[i] = from[(i / (chosen * inner) * sizes + id) * inner + i % inner];
  }
}
// Adds slices to those `ids` of the middle one of three dimensions.
template <class T>
void add_to(const uint32_t* ids, size_t chosen, const T* from, T* to, size_t outer, size_t, size_t sizes, size_t inner) {
  for (size_t i = 0; i < outer; i++)
    for (size_t j = 0; j < chosen; j++)
      for (size_t l = 0; l < inner; l++) {
        if (ids[j] >= sizes) std::abort();
        to[(i * sizes + ids[j]) * inner + l] += from[(i * chosen + j) * inner + l];
      }
}
template <class T>
T sum(T a, T b) { return a + b; }
template <class T>
T product(T a, T b) { return a * b; }

// A kernel of candle's with its arguments; nothing where it is not among these.
Work candle(const std::string& name, void** places) {
#define CANDLE(named, ...) \
  if (name == named) return take(__VA_ARGS__, places, true);
  CANDLE("cast_f32_bf16", cast<float, Bf16>)
  CANDLE("cast_bf16_f32", cast<Bf16, float>)
  CANDLE("cast_f16_f32", cast<F16, float>)
  CANDLE("is_u32_f32", select<float>)
  CANDLE("ia_u32_f32", add_to<float>)
  CANDLE("ucopy_f32", cast<float, float>)
  CANDLE("ucopy_bf16", cast<Bf16, Bf16>)
  CANDLE("ucopy_u8", cast<uint8_t, uint8_t>)
  CANDLE("copy2d_f32", copy2d<float>)
  CANDLE("copy2d_bf16", copy2d<Bf16>)
  CANDLE("affine_f32", affine<float>)
  CANDLE("const_set_f32", set<float>)
  CANDLE("badd_f32", binary<float, sum<float>>)
  CANDLE("bmul_f32", binary<float, product<float>>)
#undef CANDLE
  return nullptr;
}

struct Launch {
  std::string name;
  Work work;
  uint32_t groups[3], threads;
  bool ours;
};

// One operand of a product, by columns as cuBLAS has it, made f32: [rows, columns] without gaps.
std::vector<float> operand(const void* start, bool bf16, bool transposed, size_t rows, size_t columns, size_t leading) {
  std::vector<float> numbers(rows * columns);
  for (size_t j = 0; j < columns; j++)
    for (size_t i = 0; i < rows; i++) {
      size_t at = transposed ? j + i * leading : i + j * leading;
      numbers[i + j * rows] = bf16 ? (float)static_cast<const Bf16*>(start)[at] : static_cast<const float*>(start)[at];
    }
  return numbers;
}
}  // namespace

// A launch as the driver is asked for it; null for a kernel that nobody knows.
extern "C" void* made_up_launch(const char* name, const uint32_t* groups, uint32_t threads, void** arguments) {
  Work work = work_of(name, arguments, true);
  bool ours = (bool)work;
  if (!ours) work = candle(name, arguments);
  if (!work) return nullptr;
  return new Launch{name, work, {groups[0], groups[1], groups[2]}, threads, ours};
}
// Does it, where it is not only counted, and forgets it.
extern "C" void made_up_perform(void* launch, int really) {
  std::unique_ptr<Launch> it(static_cast<Launch*>(launch));
  if (!really) return;
  const char* trouble = nullptr;
  if (it->ours) trouble = run_over(it->groups, it->threads, it->work, false);
  else it->work();
  if (trouble) std::fprintf(stderr, "%s: %s\n", it->name.c_str(), trouble), std::abort();
}

// c[m, n] = alpha · a[m, k] · b[k, n] + beta · c, by columns; sums in f32.
extern "C" void* made_up_product(const int* transposed, const int* sizes, float alpha, const void* a, const void* b, int bf16,
                                 const int* leading, float beta, float* c) {
  size_t m = sizes[0], n = sizes[1], k = sizes[2], lda = leading[0], ldb = leading[1], ldc = leading[2];
  bool a_turned = transposed[0], b_turned = transposed[1];
  auto work = [=] {
    std::vector<float> left = operand(a, bf16, a_turned, m, k, lda), right = operand(b, bf16, b_turned, k, n, ldb);
    std::vector<float> sums(m);
    for (size_t j = 0; j < n; j++) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (size_t l = 0; l < k; l++)
        for (size_t i = 0; i < m; i++) sums[i] += left[i + l * m] * right[l + j * k];
      for (size_t i = 0; i < m; i++) {
        float& to = c[i + j * ldc];
        // what it held is not read for nothing: it may be no number
        to = beta == 0.0f ? alpha * sums[i] : alpha * sums[i] + beta * to;
      }
    }
  };
  return new Launch{"a product", work, {1, 1, 1}, 1, false};
}
