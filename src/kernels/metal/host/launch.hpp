// Runs a kernel by name over a grid of threadgroups; follows the shaders in the file that is compiled.
extern char __start_shared_memory[], __stop_shared_memory[];

typedef void (*Call)(const metal::Thread&);
struct Named {
  const char* name;
  Call call;
};
static const Named named[] = {
#define NAME(kernel) {#kernel, [](const metal::Thread& at) { metal::call(kernel, at); }},
    NAMES
#undef NAME
};

struct Grid {
  Call call;
  void** buffers;
  metal::uint3 group, groups;
};

// Null, or what went wrong.
extern "C" const char* launch(const char* name, const uint32_t* groups, uint32_t threads, void** buffers,
                              int descending) {
  Grid grid = {nullptr, buffers, {0, 0, 0}, {groups[0], groups[1], groups[2]}};
  for (const Named& it : named)
    if (!std::strcmp(it.name, name)) grid.call = it.call;
  if (!grid.call || threads > fibers::THREADS_MAX || threads % 32) return "no such kernel, or too many threads for it";
  for (grid.group.z = 0; grid.group.z < groups[2]; grid.group.z++)
    for (grid.group.y = 0; grid.group.y < groups[1]; grid.group.y++)
      for (grid.group.x = 0; grid.group.x < groups[0]; grid.group.x++) {
        std::memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
        auto thread_of_grid = [](int index, void* context) {
          const Grid& grid = *static_cast<Grid*>(context);
          grid.call(metal::Thread{grid.buffers, grid.group, grid.groups, (uint)index});
        };
        if (!fibers::run(threads, descending, thread_of_grid, &grid)) return fibers::trouble;
      }
  return nullptr;
}
