// Runs a kernel by name over a grid of blocks; follows the kernels in the file that is compiled.
template <class T>
struct Argument {
  static T of(void* buffer) { return *static_cast<T*>(buffer); }
};
template <class T>
struct Argument<T*> {
  static T* of(void* buffer) { return static_cast<T*>(buffer); }
};

template <class... Types, int... I>
inline void call_with(void (*kernel)(Types...), void** buffers, std::integer_sequence<int, I...>) {
  kernel(Argument<Types>::of(buffers[I])...);
}
template <class... Types>
inline void call(void (*kernel)(Types...), void** buffers) {
  call_with(kernel, buffers, std::make_integer_sequence<int, sizeof...(Types)>());
}

typedef void (*Call)(void** buffers);
struct Named {
  const char* name;
  Call call;
};
static const Named named[] = {
#define NAME(kernel) {#kernel, [](void** buffers) { call(kernel, buffers); }},
    NAMES
#undef NAME
};

struct Work {
  Call call;
  void** buffers;
};

// Null, or what went wrong.
extern "C" const char* launch(const char* name, const uint32_t* groups, uint32_t threads, void** buffers,
                              int descending) {
  Work work = {nullptr, buffers};
  for (const Named& it : named)
    if (!std::strcmp(it.name, name)) work.call = it.call;
  if (!work.call || threads > fibers::THREADS_MAX || threads % 32) return "no such kernel, or too many threads for it";
  gridDim = {groups[0], groups[1], groups[2]};
  for (blockIdx.z = 0; blockIdx.z < groups[2]; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < groups[1]; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < groups[0]; blockIdx.x++) {
        for (auto& groups : on_their_way) groups.clear();
        std::memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
        auto thread = [](int, void* context) {
          const Work& work = *static_cast<Work*>(context);
          work.call(work.buffers);
        };
        if (!fibers::run(threads, descending, thread, &work)) return fibers::trouble;
      }
  return nullptr;
}
