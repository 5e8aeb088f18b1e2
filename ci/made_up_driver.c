// A CUDA driver without a card, for tests of who waits for whom: memory is the host's, there are no kernels, and of a
// card's two streams (the first computes, the second copies) the one that MADE_UP_LAZY names, `computing` or `copying`, does its work
// only when something waits for it, the other as soon as it may. Both are what a card may do. Memory that was given back, or
// never written, holds bytes that no test writes. MADE_UP_DEAF leaves a wait out, to see that it is missed: that of the `host`,
// of what `computes` or of what `copies`.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, NOT_READY = 600 };
enum kind { COPY, FILL, FREE, WAIT };

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
  int value;
  struct place place;
};
struct stream {
  struct work* queue;
  size_t done, count, room;
  int lazy, computes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stream streams[8];
static size_t streams_made;
// of the context that was opened last
static size_t first_of_context;
static __thread void* current;

struct block {
  char* start;
  size_t bytes;
};
static struct block blocks[1 << 16];
static size_t blocks_made;
static struct block pinned[64];
static size_t pinned_made;

static int deaf(const char* who) {
  const char* named = getenv("MADE_UP_DEAF");
  return named != NULL && strcmp(named, who) == 0;
}

static void make(struct stream* stream, size_t until);

static void perform(struct work* work) {
  switch (work->kind) {
    case COPY: memcpy(work->to, work->from, work->bytes); break;
    case FILL: memset(work->to, work->value, work->bytes); break;
    case FREE:
      for (size_t i = 0; i < blocks_made; i++)
        if (blocks[i].start == work->to) memset(work->to, 0xdd, blocks[i].bytes);
      break;
    case WAIT: make(work->place.stream, work->place.behind); break;
  }
}

static void make(struct stream* stream, size_t until) {
  while (stream->done < until) perform(&stream->queue[stream->done++]);
}

// What the streams that are not lazy may do by now.
static void go_on(void) {
  for (size_t i = 0; i < streams_made; i++) {
    struct stream* stream = &streams[i];
    while (!stream->lazy && stream->done < stream->count) {
      struct work* next = &stream->queue[stream->done];
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
  if (stream->count == stream->room) {
    stream->room = 2 * stream->room + 64;
    stream->queue = realloc(stream->queue, stream->room * sizeof *stream->queue);
  }
  stream->queue[stream->count++] = work;
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
int cuDeviceGetAttribute(int* value, int attribute, int device) { return (void)attribute, (void)device, *value = 1, SUCCESS; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  return (void)device, first_of_context = streams_made, *context = (void*)streams, SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, SUCCESS; }
int cuCtxGetCurrent(void** context) { return *context = current, SUCCESS; }
int cuCtxSetCurrent(void* context) { return current = context, SUCCESS; }
int cuMemGetInfo_v2(size_t* left, size_t* all) { return *left = *all = (size_t)1 << 33, SUCCESS; }

int cuStreamCreate(struct stream** stream, unsigned flags) {
  (void)flags;
  if (current == NULL) return INVALID_CONTEXT;
  if (streams_made == 8) return INVALID_VALUE;
  const char* lazy = getenv("MADE_UP_LAZY");
  *stream = &streams[streams_made];
  (*stream)->computes = streams_made == first_of_context;
  (*stream)->lazy = lazy != NULL && strcmp(lazy, (*stream)->computes ? "computing" : "copying") == 0;
  streams_made++;
  return SUCCESS;
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
  *start = malloc(bytes + 1);
  memset(*start, 0xee, bytes);
  if (blocks_made < sizeof blocks / sizeof *blocks) blocks[blocks_made++] = (struct block){*start, bytes};
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}
// The memory stays, so that whatever still reads it reads what it must not.
int cuMemFreeAsync(char* start, struct stream* stream) {
  // the order of a stream needs no context
  void* before = current;
  current = streams;
  int done = put(stream, (struct work){.kind = FREE, .to = start});
  current = before;
  return done;
}

int cuMemHostAlloc(char** start, size_t bytes, unsigned flags) {
  (void)flags;
  if (current == NULL || pinned_made == 64) return INVALID_CONTEXT;
  *start = malloc(bytes);
  pinned[pinned_made++] = (struct block){*start, bytes};
  return SUCCESS;
}
int cuMemFreeHost(char* start) {
  for (size_t i = 0; i < pinned_made; i++)
    if (pinned[i].start == start) memset(start, 0xcc, pinned[i].bytes), pinned[i].start = NULL;
  return SUCCESS;
}

static int is_pinned(const char* start, size_t bytes) {
  for (size_t i = 0; i < pinned_made; i++)
    if (pinned[i].start != NULL && start >= pinned[i].start && start + bytes <= pinned[i].start + pinned[i].bytes) return 1;
  return 0;
}

int cuMemcpyHtoDAsync_v2(void* to, const char* from, size_t bytes, struct stream* stream) {
  if (!is_pinned(from, bytes)) {
    // of other memory a driver takes a copy before it returns
    char* copy = malloc(bytes + 1);
    from = memcpy(copy, from, bytes);
  }
  return put(stream, (struct work){.kind = COPY, .to = to, .from = from, .bytes = bytes});
}
int cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t bytes, struct stream* stream) {
  return put(stream, (struct work){.kind = COPY, .to = to, .from = from, .bytes = bytes});
}
int cuMemcpyDtoHAsync_v2(char* to, const void* from, size_t bytes, struct stream* stream) {
  int done = put(stream, (struct work){.kind = COPY, .to = to, .from = from, .bytes = bytes});
  // to other memory than pinned one it returns when that is written
  return done != SUCCESS || is_pinned(to, bytes) ? done : wait_for(stream, stream->count);
}
int cuMemsetD8Async(void* to, unsigned char value, size_t bytes, struct stream* stream) {
  return put(stream, (struct work){.kind = FILL, .to = to, .value = value, .bytes = bytes});
}

// cuBLAS and cuRAND: nothing but that they can be opened.
int cublasCreate_v2(void** handle) { return *handle = streams, 0; }
int cublasSetStream_v2(void* handle, void* stream) { return (void)handle, (void)stream, 0; }
int cublasDestroy_v2(void* handle) { return (void)handle, 0; }
int curandCreateGenerator(void** generator, int kind) { return (void)kind, *generator = streams, 0; }
int curandSetStream(void* generator, void* stream) { return (void)generator, (void)stream, 0; }
int curandSetPseudoRandomGeneratorSeed(void* generator, unsigned long long seed) { return (void)generator, (void)seed, 0; }
int curandDestroyGenerator(void* generator) { return (void)generator, 0; }
