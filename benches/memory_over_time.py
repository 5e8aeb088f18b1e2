#!/usr/bin/env python3
"""Memory and disk traffic of a run over time.

    benches/memory_over_time.py [--binary dpo-lora] [--cap 2GiB] [--cgroup 3GiB] [--evict 60] [--csv FILE] [--svg FILE] -- train RECIPE [...]

Runs dpo-lora with what follows `--` and reads /proc/PID/status and /proc/PID/io every 50 ms: anonymous pages (RssAnon),
pages of files (RssFile) and bytes read from the disk. Prints the peaks.

`--cap` refuses the process more private memory than that (RLIMIT_DATA): it counts what is mapped, used or not, so it is
harder than a cap on what is resident. `--cgroup` runs it in a memory control group with that limit (as root), which counts
pages of files too: the system then takes back what the run does not let go of, and ends it where that is not enough. `--evict` drops the base's files from the page cache before the run and every so many seconds, so that a base that fits
into it is read from the disk as on a machine without room for it; what was read ahead and not used yet is then read twice.
"""
import argparse, os, pathlib, resource, subprocess, sys, threading, time, tomllib

ap = argparse.ArgumentParser()
ap.add_argument("--binary", default=str(pathlib.Path(__file__).resolve().parent.parent / "target/release/dpo-lora"))
ap.add_argument("--cap")
ap.add_argument("--cgroup")
ap.add_argument("--evict", type=float, metavar="SECONDS")
ap.add_argument("--csv", type=pathlib.Path)
ap.add_argument("--svg", type=pathlib.Path)
ap.add_argument("arguments", nargs="+", help="dpo-lora's own, after --")
a = ap.parse_args()
UNITS = {"GiB": 2**30, "MiB": 2**20}


def size(text):
    return int(float(text[:-3]) * UNITS[text[-3:]])


class Group:
    """A memory control group of this run's own, version 1 or 2."""
    def __init__(self, limit):
        second = pathlib.Path("/sys/fs/cgroup/cgroup.controllers").exists()
        self.folder = pathlib.Path("/sys/fs/cgroup", "" if second else "memory", f"dpo-lora-{os.getpid()}")
        self.folder.mkdir()
        (self.folder / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(limit))
        self.highest = self.folder / ("memory.peak" if second else "memory.max_usage_in_bytes")

    def enter(self):
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def leave(self):
        peak = int(self.highest.read_text())
        self.folder.rmdir()
        return peak


def limit():
    if a.cap:
        resource.setrlimit(resource.RLIMIT_DATA, (size(a.cap), size(a.cap)))
    if group:
        group.enter()


def weights():
    recipe = pathlib.Path(a.arguments[1])
    base = recipe.parent / tomllib.loads(recipe.read_text())["model"]["base"]
    return [base] if base.is_file() else sorted(base.glob("*.safetensors"))


def evict(files, ended):
    handles = [os.open(file, os.O_RDONLY) for file in files]
    while True:
        for handle in handles:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        if ended.wait(a.evict):
            return


def fields(path):
    return dict(line.split(":", 1) for line in open(path).read().splitlines())


group = Group(size(a.cgroup)) if a.cgroup else None
process = subprocess.Popen([a.binary, *a.arguments], preexec_fn=limit)
ended = threading.Event()
if a.evict:
    threading.Thread(target=evict, args=(weights(), ended), daemon=True).start()
rows, began = [], time.time()
while process.poll() is None:
    try:
        status, io = fields(f"/proc/{process.pid}/status"), fields(f"/proc/{process.pid}/io")
        kib = lambda name: int(status[name].split()[0])
        rows.append((time.time() - began, kib("RssAnon") / 1024, kib("RssFile") / 1024, int(io["read_bytes"]) / 2**20))
    except (OSError, KeyError, ValueError):
        pass  # the process ended between two looks
    time.sleep(0.05)
ended.set()
if group:
    print(f"control group of {a.cgroup}: peak {group.leave() / 2**20:.0f} MiB, pages of files included")
if not rows:
    sys.exit("the run ended before it could be looked at")
print(f"peak anonymous {max(r[1] for r in rows):.0f} MiB, peak of file pages {max(r[2] for r in rows):.0f} MiB, "
      f"peak of both together {max(r[1] + r[2] for r in rows):.0f} MiB, read from the disk {rows[-1][3]:.0f} MiB "
      f"(the base, which is read once for its fingerprint, has {sum(file.stat().st_size for file in weights()) / 2**20:.0f}), {rows[-1][0]:.0f} s")
if a.csv:
    a.csv.write_text("seconds,anonymous_mib,file_mib,read_mib\n" + "".join("%.2f,%.1f,%.1f,%.1f\n" % row for row in rows))
if a.svg:
    width, height, top = 800, 300, max(r[1] + r[2] for r in rows) or 1
    # the highest of every few looks, so that no peak is lost
    few = max(1, len(rows) // 400)
    highest = lambda of: [max(rows[i:i + few], key=of) for i in range(0, len(rows), few)]
    line = lambda of: " ".join(f"{40 + (width - 50) * r[0] / max(rows[-1][0], 1e-9):.1f},{height - 30 - (height - 50) * of(r) / top:.1f}" for r in highest(of))
    a.svg.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
                     f'<rect width="{width}" height="{height}" fill="#fff"/>'
                     f'<polyline points="{line(lambda r: r[1] + r[2])}" fill="none" stroke="#bbb"/>'
                     f'<polyline points="{line(lambda r: r[1])}" fill="none" stroke="#36c"/>'
                     f'<text x="40" y="14">MiB over {rows[-1][0]:.0f} s: anonymous (blue, at most {max(r[1] for r in rows):.0f}), with file pages (grey, at most {top:.0f})</text></svg>\n')
sys.exit(process.returncode)
