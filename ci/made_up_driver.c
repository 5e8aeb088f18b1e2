// A CUDA driver without a card, to run a build with CUDA and to test who waits for whom. Memory is the host's; kernels and
// cuBLAS's products run there, too (made_up_kernels.cpp). Memory that was given back, or never written, holds bytes that no
// test writes.
//
// Its variables:
//   MADE_UP_LAZY    of a card's two streams (the first computes, the second copies) `computing` or `copying` does its work
//                   only when something waits for it, the other as soon as it may. Both are what a card may do.
//   MADE_UP_DEAF    leaves a wait out, to see that it is missed: of the `host`, of what `computes` or of what `copies`
//   MADE_UP_MEMORY  how many MiB the card has: 8192
//   MADE_UP_IDLE    if set, nothing is computed and nothing copied there. Every number is zero, and memory that is
//                   asked for takes none here: what a run of any size asks for can be seen.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_FOUND = 500, NOT_READY = 600 };
enum kind { COPY, FILL, FREE, WAIT, LAUNCH };

struct stream;
struct place {
  struct stream* stream;
  size_t behind;
};
struct work {
  enum kind kind;
  void* to;
  const void* from;
  size_t bytes;
  int value, to_host, owned;
  struct place place;
};
struct stream {
  // from the work on that is number `first`: what is done is forgotten
  struct work* queue;
  size_t first, done, count, room;
  int lazy, computes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
enum { STREAMS = 1 << 10, PINNED = 1 << 8 };
static struct stream streams[STREAMS];
static size_t streams_made;
// of the context that was opened last
static size_t first_of_context;
static __thread void* current;

struct block {
  char* start;
  size_t bytes;
};
static struct block pinned[PINNED];

static int idle(void) { return getenv("MADE_UP_IDLE") != NULL; }

// A block's size stands before it.
enum { BEFORE = 256 };
static char* block_of(size_t bytes) {
  void* all = idle() ? mmap(NULL, bytes + BEFORE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                     : malloc(bytes + BEFORE);
  char* start = (char*)all + BEFORE;
  *(size_t*)all = bytes;
  return idle() ? start : memset(start, 0xee, bytes);
}

static size_t in_use, most_in_use;
static size_t memory(void) {
  const char* said = getenv("MADE_UP_MEMORY");
  return (said == NULL ? (size_t)8192 : strtoull(said, NULL, 10)) << 20;
}

// Memory that was given back, the oldest first: it stays a while, so that whatever still reads it reads what it must not.
enum { ASIDE = 1 << 12 };
static struct block aside[ASIDE];
static size_t aside_first, aside_count, aside_bytes;

static void set_aside(char* start) {
  size_t bytes = *(size_t*)(start - BEFORE);
  if (idle()) {
    munmap(start - BEFORE, bytes + BEFORE);
    return;
  }
  memset(start, 0xdd, bytes);
  while (aside_count == ASIDE || (aside_count > 0 && aside_bytes + bytes > (size_t)1 << 28)) {
    struct block* oldest = &aside[aside_first];
    aside_bytes -= oldest->bytes;
    free(oldest->start - BEFORE);
    aside_first = (aside_first + 1) % ASIDE, aside_count--;
  }
  aside[(aside_first + aside_count++) % ASIDE] = (struct block){start, bytes};
  aside_bytes += bytes;
}

static int deaf(const char* who) {
  const char* named = getenv("MADE_UP_DEAF");
  return named != NULL && strcmp(named, who) == 0;
}

void* made_up_launch(const char* kernel, const unsigned* groups, unsigned threads, void** arguments);
void* made_up_product(const int* transposed, const int* sizes, float alpha, const void* a, const void* b, int bf16,
                      const int* leading, float beta, float* c);
void made_up_perform(void* launch, int really);

static void make(struct stream* stream, size_t until);

static void perform(struct work* work) {
  switch (work->kind) {
    case COPY:
      if (!idle() || work->to_host) memcpy(work->to, work->from, work->bytes);
      if (work->owned) free((void*)work->from);
      break;
    case FILL:
      if (!idle()) memset(work->to, work->value, work->bytes);
      break;
    case FREE: set_aside(work->to); break;
    case LAUNCH: made_up_perform(work->to, !idle()); break;
    case WAIT: make(work->place.stream, work->place.behind); break;
  }
}

static void make(struct stream* stream, size_t until) {
  while (stream->done < until) perform(&stream->queue[stream->done++ - stream->first]);
}

// What the streams that are not lazy may do by now.
static void go_on(void) {
  for (size_t i = 0; i < streams_made; i++) {
    struct stream* stream = &streams[i];
    while (!stream->lazy && stream->done < stream->count) {
      struct work* next = &stream->queue[stream->done - stream->first];
      if (next->kind == WAIT && next->place.stream->done < next->place.behind) break;
      perform(next);
      stream->done++;
    }
  }
}

static int put(struct stream* stream, struct work work) {
  if (current == NULL) return INVALID_CONTEXT;
  if (stream < streams || stream >= streams + streams_made) return INVALID_VALUE;
  pthread_mutex_lock(&lock);
  if (stream->done == stream->count) stream->first = stream->done;
  if (stream->count - stream->first == stream->room) {
    stream->room = 2 * stream->room + 64;
    stream->queue = realloc(stream->queue, stream->room * sizeof *stream->queue);
  }
  stream->queue[stream->count++ - stream->first] = work;
  go_on();
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

static int wait_for(struct stream* stream, size_t until) {
  pthread_mutex_lock(&lock);
  make(stream, until);
  go_on();
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

int cuInit(unsigned flags) { return (int)flags; }
int cuGetErrorString(int error, const char** words) { return (void)error, *words = "a made-up driver's error", SUCCESS; }
int cuGetErrorName(int error, const char** words) { return cuGetErrorString(error, words); }
int cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
int cuDeviceGet(int* device, int number) { return *device = number, number == 0 ? SUCCESS : INVALID_VALUE; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  enum { CLOCK_RATE = 13, MULTIPROCESSORS = 16, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };
  (void)device;
  // an H200's, by which a plan weighs
  switch (attribute) {
    case CLOCK_RATE: *value = 1980000; break;
    case MULTIPROCESSORS: *value = 132; break;
    case CAPABILITY_MAJOR: *value = 9; break;
    case CAPABILITY_MINOR: *value = 0; break;
    default: *value = 1;
  }
  return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  return (void)device, first_of_context = streams_made, *context = (void*)streams, SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, SUCCESS; }
int cuCtxGetCurrent(void** context) { return *context = current, SUCCESS; }
int cuCtxSetCurrent(void* context) { return current = context, SUCCESS; }
// The pool keeps what it ever had.
int cuMemGetInfo_v2(size_t* left, size_t* all) { return *all = memory(), *left = *all - most_in_use, SUCCESS; }
int cuDeviceGetDefaultMemPool(void** pool, int device) { return (void)device, *pool = streams, SUCCESS; }
int cuMemPoolSetAttribute(void* pool, int attribute, void* value) { return (void)pool, (void)attribute, (void)value, SUCCESS; }
int cuMemPoolGetAttribute(void* pool, int attribute, size_t* value) {
  return (void)pool, (void)attribute, *value = most_in_use, SUCCESS;
}

int cuStreamCreate(struct stream** stream, unsigned flags) {
  (void)flags;
  if (current == NULL) return INVALID_CONTEXT;
  const char* lazy = getenv("MADE_UP_LAZY");
  pthread_mutex_lock(&lock);
  int fits = streams_made < STREAMS;
  if (fits) {
    *stream = &streams[streams_made];
    (*stream)->computes = streams_made == first_of_context;
    (*stream)->lazy = lazy != NULL && strcmp(lazy, (*stream)->computes ? "computing" : "copying") == 0;
    streams_made++;
  }
  pthread_mutex_unlock(&lock);
  return fits ? SUCCESS : INVALID_VALUE;
}
int cuCtxSynchronize(void) {
  for (size_t i = 0; i < streams_made; i++) wait_for(&streams[i], streams[i].count);
  return SUCCESS;
}
int cuStreamDestroy_v2(struct stream* stream) { return wait_for(stream, stream->count); }
int cuStreamSynchronize(struct stream* stream) { return wait_for(stream, stream->count); }

int cuEventCreate(struct place** event, unsigned flags) {
  (void)flags;
  if (current == NULL) return INVALID_CONTEXT;
  *event = calloc(1, sizeof **event);
  return SUCCESS;
}
int cuEventRecord(struct place* event, struct stream* stream) {
  return event->stream = stream, event->behind = stream->count, SUCCESS;
}
int cuEventSynchronize(struct place* event) {
  // one that was never recorded is over
  return event->stream == NULL || deaf("host") ? SUCCESS : wait_for(event->stream, event->behind);
}
int cuEventQuery(struct place* event) {
  return event->stream == NULL || event->stream->done >= event->behind ? SUCCESS : NOT_READY;
}
int cuEventDestroy_v2(struct place* event) { return free(event), SUCCESS; }
int cuStreamWaitEvent(struct stream* stream, struct place* event, unsigned flags) {
  (void)flags;
  if (event->stream == NULL || deaf(stream->computes ? "computes" : "copies")) return SUCCESS;
  return put(stream, (struct work){.kind = WAIT, .place = *event});
}

int cuMemAllocAsync(char** start, size_t bytes, struct stream* stream) {
  (void)stream;
  if (current == NULL) return INVALID_CONTEXT;
  pthread_mutex_lock(&lock);
  int fits = in_use + bytes <= memory();
  if (fits) {
    *start = block_of(bytes);
    in_use += bytes;
    most_in_use = in_use > most_in_use ? in_use : most_in_use;
  }
  pthread_mutex_unlock(&lock);
  return fits ? SUCCESS : OUT_OF_MEMORY;
}
int cuMemFreeAsync(char* start, struct stream* stream) {
  pthread_mutex_lock(&lock);
  in_use -= *(size_t*)(start - BEFORE);
  pthread_mutex_unlock(&lock);
  // the order of a stream needs no context
  void* before = current;
  current = streams;
  int done = put(stream, (struct work){.kind = FREE, .to = start});
  current = before;
  return done;
}

int cuMemHostAlloc(char** start, size_t bytes, unsigned flags) {
  (void)flags;
  if (current == NULL) return INVALID_CONTEXT;
  pthread_mutex_lock(&lock);
  size_t place = 0;
  while (place < PINNED && pinned[place].start != NULL) place++;
  if (place < PINNED) pinned[place] = (struct block){*start = block_of(bytes), bytes};
  pthread_mutex_unlock(&lock);
  return place < PINNED ? SUCCESS : OUT_OF_MEMORY;
}
int cuMemFreeHost(char* start) {
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < PINNED; i++)
    if (pinned[i].start == start) pinned[i].start = NULL;
  set_aside(start);
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

static int is_pinned(const char* start, size_t bytes) {
  for (size_t i = 0; i < PINNED; i++)
    if (pinned[i].start != NULL && start >= pinned[i].start && start + bytes <= pinned[i].start + pinned[i].bytes) return 1;
  return 0;
}

int cuMemcpyHtoDAsync_v2(void* to, const char* from, size_t bytes, struct stream* stream) {
  // of other memory a driver takes a copy before it returns
  int owned = !is_pinned(from, bytes) && !idle();
  if (owned) from = memcpy(malloc(bytes + 1), from, bytes);
  return put(stream, (struct work){.kind = COPY, .to = to, .from = from, .bytes = bytes, .owned = owned});
}
int cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t bytes, struct stream* stream) {
  return put(stream, (struct work){.kind = COPY, .to = to, .from = from, .bytes = bytes});
}
int cuMemcpyDtoHAsync_v2(char* to, const void* from, size_t bytes, struct stream* stream) {
  int done = put(stream, (struct work){.kind = COPY, .to = to, .from = from, .bytes = bytes, .to_host = 1});
  // to other memory than pinned one it returns when that is written
  return done != SUCCESS || is_pinned(to, bytes) ? done : wait_for(stream, stream->count);
}
int cuMemsetD8Async(void* to, unsigned char value, size_t bytes, struct stream* stream) {
  return put(stream, (struct work){.kind = FILL, .to = to, .value = value, .bytes = bytes});
}

// A kernel is its name, whatever the module holds.
int cuModuleLoadData(void** module, const void* image) { return (void)image, *module = streams, SUCCESS; }
int cuModuleUnload(void* module) { return (void)module, SUCCESS; }
int cuModuleGetFunction(char** function, void* module, const char* name) {
  return (void)module, *function = strdup(name), SUCCESS;
}
int cuLaunchKernel(const char* kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared, struct stream* stream, void** arguments, void** extra) {
  if (threads_y != 1 || threads_z != 1 || shared != 0 || extra != NULL) return INVALID_VALUE;
  void* launch = made_up_launch(kernel, (unsigned[]){x, y, z}, threads, arguments);
  if (launch == NULL) {
    fprintf(stderr, "the made-up card has no kernel %s\n", kernel);
    return NOT_FOUND;
  }
  return put(stream, (struct work){.kind = LAUNCH, .to = launch});
}

// cuBLAS; a handle holds the stream that it works on. cuRAND: nothing but that it can be opened.
int cublasCreate_v2(struct stream*** handle) { return *handle = calloc(1, sizeof **handle), 0; }
int cublasSetStream_v2(struct stream** handle, struct stream* stream) { return *handle = stream, 0; }
int cublasDestroy_v2(struct stream** handle) { return free(handle), 0; }
int cublasGemmEx(struct stream** handle, int a_transposed, int b_transposed, int m, int n, int k, const float* alpha,
                 const void* a, int a_type, int lda, const void* b, int b_type, int ldb, const float* beta, float* c,
                 int c_type, int ldc, int compute, int algorithm) {
  enum { F32 = 0, BF16 = 14, INVALID = 7 };
  (void)compute, (void)algorithm;
  if (a_type != b_type || (a_type != F32 && a_type != BF16) || c_type != F32) return INVALID;
  void* launch = made_up_product((int[]){a_transposed, b_transposed}, (int[]){m, n, k}, *alpha, a, b, a_type == BF16,
                                 (int[]){lda, ldb, ldc}, *beta, c);
  return put(*handle, (struct work){.kind = LAUNCH, .to = launch}) == SUCCESS ? 0 : INVALID;
}
int curandCreateGenerator(void** generator, int kind) { return (void)kind, *generator = streams, 0; }
int curandSetStream(void* generator, void* stream) { return (void)generator, (void)stream, 0; }
int curandSetPseudoRandomGeneratorSeed(void* generator, unsigned long long seed) { return (void)generator, (void)seed, 0; }
int curandDestroyGenerator(void* generator) { return (void)generator, 0; }
