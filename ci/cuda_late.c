// CUDA's libraries, looked for when the program first asks for a GPU instead of when it starts: linked in their place, so that
// one binary runs on machines with and without them. Each function that the Rust bindings name is a jump through a table,
// which says "not there" until `cuInit`, which comes before all others, has found the libraries.
//
// symbols.h has a line `LATE(place, library, name)` for each function; ci/cuda-build.sh writes it.
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>

enum { CUDA, CUBLAS, CUBLASLT, CURAND, NVRTC, LIBRARIES };

static const char* const files[LIBRARIES] = {"libcuda.so.1", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10",
                                             "libnvrtc.so.13"};

// In each library's own numbers: no device; not initialised; not initialised; not initialised; an internal error.
#define NOT_THERE 100
static int absent_CUDA(void) { return NOT_THERE; }
static int absent_CUBLAS(void) { return 1; }
static int absent_CUBLASLT(void) { return 1; }
static int absent_CURAND(void) { return 101; }
static int absent_NVRTC(void) { return 11; }

__attribute__((visibility("hidden"))) int (*late_table[])(void) = {
#define LATE(place, library, name) absent_##library,
#include "symbols.h"
#undef LATE
};

static const struct {
  int library;
  const char* name;
} functions[] = {
#define LATE(place, library, name) {library, #name},
#include "symbols.h"
#undef LATE
};

#if defined(__x86_64__)
#define JUMP(place) "jmp *late_table+8*" #place "(%rip)\n"
#elif defined(__aarch64__)
#define JUMP(place)                                                                                                    \
  "adrp x16, late_table+8*" #place "\nldr x16, [x16, :lo12:late_table+8*" #place "]\nbr x16\n"
#else
#error "no jump is known for this processor: link CUDA's own libraries"
#endif
#define LATE(place, library, name)                                                                                     \
  __asm__(".text\n.globl " #name "\n.type " #name ", %function\n" #name ":\n" JUMP(place));
#include "symbols.h"
#undef LATE

static pthread_once_t once = PTHREAD_ONCE_INIT;
static char trouble[512];
static int (*init)(unsigned);
static int (*error_string)(int, const char**);

static void find(void) {
  void* opened[LIBRARIES];
  for (int i = 0; i < LIBRARIES; i++) {
    opened[i] = dlopen(files[i], RTLD_NOW | RTLD_LOCAL);
    // candle makes nothing at run time: it can do without the compiler
    if (opened[i] == NULL && i != NVRTC) {
      snprintf(trouble, sizeof trouble, "%s", dlerror());
      return;
    }
  }
  for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
    void* library = opened[functions[i].library];
    // an older driver lacks newer functions: those keep saying so
    void* function = library == NULL ? NULL : dlsym(library, functions[i].name);
    if (function != NULL) late_table[i] = (int (*)(void))function;
  }
  error_string = (int (*)(int, const char**))dlsym(opened[CUDA], "cuGetErrorString");
  init = (int (*)(unsigned))dlsym(opened[CUDA], "cuInit");
}

int cuInit(unsigned flags) {
  pthread_once(&once, find);
  return init == NULL ? NOT_THERE : init(flags);
}

int cuGetErrorString(int error, const char** text) {
  if (error_string != NULL) return error_string(error, text);
  *text = trouble;
  return 0;
}
