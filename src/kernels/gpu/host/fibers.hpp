// The threads of a threadgroup as fibers of one thread of the CPU, which change at barriers alone.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace fibers {
enum Scope { NONE, SIMD, GROUP };
enum { THREADS_MAX = 1024, STACK = 64 << 10 };
// operations of a simdgroup beside shuffles, which are the distance they reach
enum { MULTIPLY = 64, LOAD };

// What the threads of a simdgroup give each other.
struct Slots {
  uint32_t bits[32];
  float number(int lane) const {
    float x;
    std::memcpy(&x, &bits[lane], 4);
    return x;
  }
};

struct Fiber {
  jmp_buf at;
  ucontext_t start;
  bool started, done;
  Scope waits;
  // which operation of a simdgroup it waits in
  int operation;
  // exchanges take turns between two rooms: one is written while the other may still be read
  int turn;
};

static Fiber all[THREADS_MAX];
// what a product on the matrix unit takes of a thread
enum { WORDS_MAX = 6 };
static Slots rooms[THREADS_MAX / 32][2][WORDS_MAX];
static char* stacks;
static int current;
static jmp_buf scheduler;
static ucontext_t outside;
static void (*work)(int, void*);
static void* context;
static const char* trouble;

inline void leave() {
  if (!_setjmp(all[current].at)) _longjmp(scheduler, 1);
}

inline void wait(Scope scope, int operation) {
  all[current].waits = scope;
  all[current].operation = operation;
  leave();
}

// Gives `n` words of 4 bytes; what all threads gave, word by word.
inline Slots* exchange_all(const void* words, int n, int operation) {
  Slots* room = rooms[current / 32][all[current].turn];
  for (int i = 0; i < n; i++) std::memcpy(&room[i].bits[current % 32], (const char*)words + 4 * i, 4);
  all[current].turn ^= 1;
  wait(SIMD, operation);
  return room;
}

template <class T>
inline Slots& exchange(T value, int operation) {
  return *exchange_all(&value, 1, operation);
}

inline void enter() {
  work(current, context);
  all[current].done = true;
  _longjmp(scheduler, 1);
}

inline void resume(int fiber) {
  current = fiber;
  if (_setjmp(scheduler)) return;
  if (all[fiber].started) _longjmp(all[fiber].at, 1);
  all[fiber].started = true;
  getcontext(&all[fiber].start);
  all[fiber].start.uc_stack.ss_sp = stacks + (size_t)fiber * STACK;
  all[fiber].start.uc_stack.ss_size = STACK;
  all[fiber].start.uc_link = nullptr;
  makecontext(&all[fiber].start, enter, 0);
  setcontext(&all[fiber].start);
}

// Releases the fibers first..end where all wait in one scope and operation; says whether it did.
inline bool release(int first, int end, Scope scope) {
  for (int i = first; i < end; i++)
    if (all[i].done || all[i].waits != scope || all[i].operation != all[first].operation) return false;
  for (int i = first; i < end; i++) all[i].waits = NONE;
  return true;
}

// Runs `n` fibers of `of` to their end, the first or the last one first; false, with `trouble` set, where they do not come
// together at a barrier.
inline bool run(int n, bool descending, void (*of)(int, void*), void* with) {
  if (!stacks) stacks = (char*)std::malloc((size_t)THREADS_MAX * STACK);
  work = of, context = with;
  for (int i = 0; i < n; i++) all[i].started = all[i].done = false, all[i].waits = NONE, all[i].turn = 0;
  for (;;) {
    bool ended = true, moved = false;
    for (int k = 0; k < n; k++) {
      int i = descending ? n - 1 - k : k;
      if (all[i].done || all[i].waits != NONE) continue;
      moved = true;
      resume(i);
    }
    for (int i = 0; i < n; i += 32) moved |= release(i, i + 32, SIMD);
    moved |= release(0, n, GROUP);
    for (int i = 0; i < n; i++) ended &= all[i].done;
    if (ended) return true;
    if (!moved) {
      trouble = "threads of one scope wait at different barriers, or not all reach one";
      return false;
    }
  }
}
}  // namespace fibers
