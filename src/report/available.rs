//! How much memory this process could still take: what the system calls available, or less where a control group caps
//! it.

use std::path::Path;

/// Memory that is free, or that pages of files could make way for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Available {
    /// How much, in bytes.
    pub bytes: u64,
    /// Who says so.
    pub by: &'static str,
}

/// What could be taken now; none where the system does not tell.
pub fn available() -> Option<Available> {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let system = mem_available(&read(Path::new("/proc/meminfo"))?)?;
    let group = cgroup(&read(Path::new("/proc/self/cgroup")).unwrap_or_default(), &read);
    Some(match group {
        Some(bytes) if bytes < system => Available { bytes, by: "the control group's limit" },
        _ => Available { bytes: system, by: "the system" },
    })
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn mem_available(meminfo: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The least room under the limits of this process's group and of those around it; none where nothing is limited.
fn cgroup(groups: &str, read: &impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let mut room: Option<u64> = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, limits, [usage, inactive, active]) = match controllers {
            "" => (
                "/sys/fs/cgroup",
                &["memory.max", "memory.high"][..],
                ["memory.current", "inactive_file", "active_file"],
            ),
            "memory" => (
                "/sys/fs/cgroup/memory",
                &["memory.limit_in_bytes"][..],
                ["memory.usage_in_bytes", "total_inactive_file", "total_active_file"],
            ),
            _ => continue,
        };
        for group in Path::new(path).ancestors() {
            let folder = Path::new(root).join(group.strip_prefix("/").unwrap_or(group));
            let number = |name: &str| read(&folder.join(name))?.trim().parse::<u64>().ok();
            // beyond memory.high pages are taken back and the process is slowed down
            let limit = limits.iter().filter_map(|name| number(name)).min();
            let (Some(limit), Some(used)) = (limit, number(usage)) else { continue };
            let stat = read(&folder.join("memory.stat")).unwrap_or_default();
            let pages = |name: &str| {
                let value = stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
                value.unwrap_or(0)
            };
            // pages of files make way
            let held = used.saturating_sub(pages(inactive) + pages(active));
            let left = limit.saturating_sub(held);
            room = Some(room.map_or(left, |room| room.min(left)));
        }
    }
    room
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_found_or_nothing_is_said() {
        assert_eq!(mem_available("MemTotal: 9 kB\nMemAvailable:    512 kB\n"), Some(512 * 1024));
        assert_eq!(mem_available("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn the_tightest_group_counts_and_its_file_pages_make_way() {
        let files = |path: &Path| {
            let text = match path.to_str()? {
                "/sys/fs/cgroup/a/b/memory.max" => "max\n",
                "/sys/fs/cgroup/a/b/memory.current" => "50\n",
                "/sys/fs/cgroup/slow/memory.max" => "max\n",
                "/sys/fs/cgroup/slow/memory.high" => "600\n",
                "/sys/fs/cgroup/slow/memory.current" => "100\n",
                "/sys/fs/cgroup/a/memory.max" => "1000\n",
                "/sys/fs/cgroup/a/memory.current" => "400\n",
                "/sys/fs/cgroup/a/memory.stat" => "anon 100\ninactive_file 200\nactive_file 50\n",
                _ => return None,
            };
            Some(text.to_string())
        };
        assert_eq!(cgroup("0::/a/b\n", &files), Some(1000 - (400 - 250)));
        assert_eq!(cgroup("0::/slow\n", &files), Some(500));
        assert_eq!(cgroup("0::/elsewhere\n", &files), None);
        let old = |path: &Path| {
            let text = match path.to_str()? {
                "/sys/fs/cgroup/memory/job/memory.limit_in_bytes" => "700",
                "/sys/fs/cgroup/memory/job/memory.usage_in_bytes" => "300",
                "/sys/fs/cgroup/memory/job/memory.stat" => "total_inactive_file 100\n",
                _ => return None,
            };
            Some(text.to_string())
        };
        assert_eq!(cgroup("9:name=systemd:/\n4:memory:/job\n0::/\n", &old), Some(500));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_system_tells() {
        assert!(available().is_some_and(|available| available.bytes > 1 << 20));
    }
}
