#!/usr/bin/env bash
# Runs a test program on a processor that this machine need not have: Bochs emulates one with AVX-512, AVX512-BF16 and
# AMX (Sapphire Rapids), and boots Linux with that program.
#
#   RUSTFLAGS='-C target-feature=+crt-static' \
#     cargo test --release --lib --no-run --target x86_64-unknown-linux-gnu    # a program that needs no files, TEST
#   ci/emulate.sh TEST kernels:: weights::quantised --test-threads=1 --skip gpu:: --skip cuda:: \
#     --skip attention::tests::kernel_equals                                   # minutes; that one would take long
#   ci/emulate.sh DPO_LORA_TILES=off TEST …                                    # by AVX-512 instead of tiles
#
#   emulate.sh [NAME=VALUE | DIRECTORY]... PROGRAM [ARGUMENT]...
#
# NAME=VALUE goes to the program's environment, a DIRECTORY lies under the same path there. What it prints comes on
# stdout at the end, and its exit status is this script's; 125 where it was not run, 124 after EMULATE_SECONDS (1800).
# Debian's mirror and a C++ compiler are needed at first (five minutes on one core); what they give is kept in
# $DPO_LORA_CACHE, or ~/.cache/dpo-lora. CI does not run it: its kernel is of a Debian that still changes.
set -euo pipefail
trap 'echo "emulate: line $LINENO failed" >&2; exit 125' ERR

env=() files=()
while [[ $# -gt 0 && ( $1 == *=* || -d $1 ) ]]; do
  if [[ -d $1 ]]; then files+=("$(realpath "$1")"); else env+=("$1"); fi
  shift
done
if [[ ! -x ${1:-} ]]; then
  sed -n '2,/^set/{/^#/s/^# \?//p}' "$0" >&2
  exit 125
fi
program=$(realpath "$1")
shift

kept=${DPO_LORA_CACHE:-$HOME/.cache/dpo-lora}/emulator
mkdir -p "$kept"
kept=$(realpath "$kept")
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT

# packages FOLDER OPTION... NAME...: extracts packages, and what they depend on, into a folder. Nothing is installed.
packages() {
  local folder=$1 archives=$here/archives
  shift
  rm -rf "$archives"
  mkdir -p "$archives/partial" "$folder.part"
  apt-get -qq -y --no-install-recommends --download-only -o Dir::State::status=/dev/null \
    -o Dir::Cache::archives="$archives" -o APT::Sandbox::User=root install "$@" >&2
  for package in "$archives"/*.deb; do dpkg -x "$package" "$folder.part"; done
  mv "$folder.part" "$folder"
}

# The address of this machine's Debian mirror.
mirror() {
  apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | sed -n 1p
}

# What puts Linux on a disc for Bochs to boot.
[[ -d $kept/tools ]] || packages "$kept/tools" xorriso isolinux syslinux-common cpio bochsbios vgabios

# Linux 6.1 and 6.12 hang in this emulator while they boot, so the kernel is that of Debian 14.
if [[ ! -d $kept/linux ]]; then
  mkdir -p "$here/lists/partial"
  echo "deb $(mirror) forky main" >"$here/sources.list"
  forky=(-o Dir::Etc::sourcelist="$here/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::State::lists="$here/lists" -o Acquire::Languages=none -o APT::Sandbox::User=root)
  apt-get -qq "${forky[@]}" update >&2
  packages "$kept/linux" "${forky[@]}" linux-image-cloud-amd64
fi

# Bochs 3.0 is built here, for Debian's has a debugger in it, and three things to be mended.
if [[ ! -x $kept/bochs ]]; then
  source=pool/main/b/bochs/bochs_3.0+dfsg.orig.tar.xz
  digest=78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b
  /usr/lib/apt/apt-helper -qq -o APT::Sandbox::User=root \
    download-file "$(mirror)$source" "$here/bochs.tar.xz" "SHA256:$digest" >&2
  tar -xf "$here/bochs.tar.xz" -C "$here"
  (
    cd "$here/bochs-3.0"
    # vcvtne2ps2bf16: the upper half comes from the first operand's beginning; it was read from behind its end
    sed -i 's/bfloat16(op1.vmm32u(n))/bfloat16(op1.vmm32u(n - DWORD_ELEMENTS(len)))/' cpu/avx/avx512_bf16.cc
    # tdpbssd: both sides' bytes have signs
    sed -i '/ DPBDSS(/,/^}/s/Bit8u/Bit8s/g' cpu/avx/amx.cc
    # Linux saves no tiles unless it can forbid them to threads (XFD). Here it only believes it can: what it writes
    # to that register is ignored. So tiles are never saved; see below.
    sed -i 's/leaf->eax |= (1<<3);/leaf->eax |= (1<<3) | (1<<4);/' cpu/cpuid.cc
    ./configure --with-nogui --enable-cpu-level=6 --enable-x86-64 --enable-avx --enable-evex --enable-amx \
      --enable-all-optimizations --enable-memtype --enable-vmx=2 --enable-protection-keys --enable-uintr \
      --enable-cet --enable-pci --disable-docbook CFLAGS=-O2 CXXFLAGS=-O2
    make "-j$(nproc)" bochs
  ) >"$kept/build.log" 2>&1
  mv "$here/bochs-3.0/bochs" "$kept/bochs"
fi

# The first process. Tiles are not saved where one thread makes way for another, so none does before it waits.
cat >"$here/init.c" <<'END'
#include <sched.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

int main(int count, char **arguments) {
  (void)count;
  const struct sched_param first = {.sched_priority = 1};
  int status = 125 << 8;
  pid_t child = -1;
  mount("proc", "/proc", "proc", 0, 0);
  /* ARCH_REQ_XCOMP_PERM of tile data: a run without tiles would show nothing */
  if (syscall(SYS_arch_prctl, 0x1023, 18L) != 0) {
    puts("emulate: no tiles");
  } else if (sched_setscheduler(0, SCHED_FIFO, &first) != 0 || (child = fork()) < 0) {
    perror("emulate");
  } else if (child == 0) {
    execv("/test", arguments);
    perror("/test");
    _exit(125);
  } else {
    while (wait(&status) != child) {
    }
  }
  printf("\nexit status %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  fflush(stdout);
  tcdrain(STDOUT_FILENO);
  reboot(RB_POWER_OFF);
}
END

root=$here/root disc=$here/disc
mkdir -p "$root"/{dev,proc,tmp} "$disc"
"${CC:-cc}" -O2 -static -o "$root/init" "$here/init.c"
cp "$program" "$root/test"
strip "$root/test"
for folder in "${files[@]}"; do
  mkdir -p "$root$(dirname "$folder")"
  cp -r "$folder" "$root$folder"
done
tools=$kept/tools/usr
(cd "$root" && find . | "$(find "$kept/tools" -path '*/bin/cpio')" --quiet -o -H newc >"$disc/initrd")
cp "$(find "$kept/linux" -name 'vmlinuz*' | head -n 1)" "$disc/vmlinuz"
cp "$tools/lib/ISOLINUX/isolinux.bin" "$tools/lib/syslinux/modules/bios/ldlinux.c32" "$disc"
# Linux hands what it does not know itself to the first process: variables before --, arguments behind it
words=$(printf '"%s" ' "${env[@]}" -- "$@")
cat >"$disc/isolinux.cfg" <<END
default linux
label linux
kernel /vmlinuz
append initrd=/initrd console=ttyS0,115200 quiet loglevel=1 mitigations=off panic=-1 ${words//\"--\"/--}
END
LD_LIBRARY_PATH=$tools/lib/x86_64-linux-gnu "$tools/bin/xorriso" -as mkisofs -quiet -o "$here/disc.iso" \
  -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table "$disc" 2>"$here/xorriso.log"

# la57: Bochs cannot return from system management mode with it, and a kernel enters that mode once.
cat >"$here/bochsrc" <<END
cpu: model=sapphire_rapids, ips=100000000, reset_on_triple_fault=0, exclude_features="la57"
memory: guest=512, host=512
romimage: file=$kept/tools/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=$(realpath "$kept/tools/usr/share/vgabios/vgabios.bin")
ata0-master: type=cdrom, path=$here/disc.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$here/serial
display_library: nogui
log: $here/log
panic: action=fatal
END
touch "$here/serial"
ended=0
# powering off is a panic to Bochs, so its own exit status says nothing
timeout -s KILL "${EMULATE_SECONDS:-1800}" "$kept/bochs" -q -f "$here/bochsrc" >"$here/out" 2>&1 </dev/null || ended=$?
tr -d '\r' <"$here/serial" | sed '/^exit status [0-9]*$/,$d'
status=$(tr -d '\r' <"$here/serial" | sed -n 's/^exit status \([0-9]*\)$/\1/p' | tail -n 1)
if [[ -z $status ]]; then
  tail -n 5 "$here/log" >&2
  [[ $ended == 137 ]] && status=124 || status=125
fi
exit "$status"
