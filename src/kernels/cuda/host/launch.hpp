// Runs a kernel by name over a grid of blocks; follows the kernels in the file that is compiled.
#include <functional>

// A kernel and its arguments.
typedef std::function<void()> Work;

// An argument from its place: numbers lie there; a buffer begins there or, where `driver` says so, is named there, as a
// driver is given it.
template <class T>
struct Argument {
  static T of(void* place, bool) { return *static_cast<T*>(place); }
};
template <class T>
struct Argument<T*> {
  static T* of(void* place, bool driver) { return driver ? *static_cast<T**>(place) : static_cast<T*>(place); }
};

template <class... Types>
inline Work with(void (*kernel)(Types...), Types... arguments) {
  return [=] { kernel(arguments...); };
}
template <class... Types, int... I>
inline Work take_all(void (*kernel)(Types...), void** places, bool driver, std::integer_sequence<int, I...>) {
  return with(kernel, Argument<Types>::of(places[I], driver)...);
}
template <class... Types>
inline Work take(void (*kernel)(Types...), void** places, bool driver) {
  return take_all(kernel, places, driver, std::make_integer_sequence<int, sizeof...(Types)>());
}

// That kernel with those arguments; nothing where there is no such kernel.
inline Work work_of(const char* name, void** places, bool driver) {
#define NAME(kernel) \
  if (!std::strcmp(name, #kernel)) return take(kernel, places, driver);
  NAMES
#undef NAME
  return nullptr;
}

// Null, or what went wrong.
inline const char* run_over(const uint32_t* groups, uint32_t threads, Work& work, bool descending) {
  if (threads > fibers::THREADS_MAX || threads % 32) return "too many threads, or no whole warps";
  gridDim = {groups[0], groups[1], groups[2]};
  for (blockIdx.z = 0; blockIdx.z < groups[2]; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < groups[1]; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < groups[0]; blockIdx.x++) {
        for (auto& groups : on_their_way) groups.clear();
        std::memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
        auto thread = [](int, void* work) { (*static_cast<Work*>(work))(); };
        if (!fibers::run(threads, descending, thread, &work)) return fibers::trouble;
      }
  return nullptr;
}

extern "C" const char* launch(const char* name, const uint32_t* groups, uint32_t threads, void** buffers,
                              int descending) {
  Work work = work_of(name, buffers, false);
  return work ? run_over(groups, threads, work, descending) : "no such kernel";
}
