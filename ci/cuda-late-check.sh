#!/usr/bin/env bash
# Holds what stands in for CUDA's libraries (ci/cuda_late.c) to its word: without them it names the one that is missing, with
# them every call arrives there whole. The libraries are made up here.
set -euo pipefail
cd "$(dirname "$0")/.."
if ldconfig -p 2>/dev/null | grep -E 'lib(cuda\.so\.1|cublas(Lt)?\.so\.13|curand\.so\.10)' >/dev/null; then
  echo "skipped: this machine has the real libraries, which would be found"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
ci/cuda-late.sh "$folder/late"

cat >"$folder/main.c" <<'C'
#include <stdio.h>
int cuInit(unsigned);
int cuGetErrorString(int, const char**);
int cuDeviceGetCount(int*);
// two more arguments than there are registers, then floating-point ones
int cublasSgemm_v2(long, long, long, long, long, long, long, long, double, double);
int cuDeviceGetName(char*, int, int);
int main(void) {
  const char* words = "";
  int count = -1, before = cuDeviceGetCount(&count), begun = cuInit(0), after = cuDeviceGetCount(&count);
  if (begun) cuGetErrorString(begun, &words);
  printf("%d %d %d %d %d %d %s\n", before, begun, after, count, cublasSgemm_v2(1, 2, 3, 4, 5, 6, 7, 8, 0.5, 0.25),
         cuDeviceGetName(0, 0, 0), words);
}
C
cc -o "$folder/main" "$folder/main.c" -L "$folder/late" -lcuda -lcublas

holds() { # what is expected, what is said
  case $2 in
    $1) ;;
    *) echo "expected $1, it says: $2"; exit 1 ;;
  esac
}
holds "100 100 100 -1 1 100 libcuda.so.1: *" "$(LD_LIBRARY_PATH=$folder/none "$folder/main")"

mkdir "$folder/libraries"
made() { cc -shared -fPIC -Wl,-soname,"$1" -o "$folder/libraries/$1" "$folder/$2.c"; }
cat >"$folder/cuda.c" <<'C'
int cuInit(unsigned flags) { return (int)flags; }
int cuDeviceGetCount(int* count) { return *count = 3, 0; }
C
cat >"$folder/cublas.c" <<'C'
int cublasSgemm_v2(long a, long b, long c, long d, long e, long f, long g, long h, double x, double y) {
  return (int)(a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h + 100 * x + 200 * y);
}
C
echo 'int nothing(void) { return 0; }' >"$folder/nothing.c"
made libcuda.so.1 cuda
made libcublas.so.13 cublas
made libcublasLt.so.13 nothing
holds "100 100 100 -1 1 100 libcurand.so.10: *" "$(LD_LIBRARY_PATH=$folder/libraries "$folder/main")"
made libcurand.so.10 nothing
# a driver that lacks a function, and no nvrtc
holds "100 0 0 3 304 100 " "$(LD_LIBRARY_PATH=$folder/libraries "$folder/main")"
echo "calls arrive where the libraries are, and say what is missing where they are not"
