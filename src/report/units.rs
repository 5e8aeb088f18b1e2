//! Durations and sizes as a person reads them.

use std::time::Duration;

/// `8.2 s`, `3 min 05 s`, `2 h 07 min`.
pub(super) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// `312 MiB`, `6.20 GiB`: the units in which memory is sold and measured.
pub(crate) fn bytes(bytes: u64) -> String {
    let mib = bytes as f64 / (1 << 20) as f64;
    match mib {
        ..10.0 => format!("{mib:.1} MiB"),
        ..1024.0 => format!("{mib:.0} MiB"),
        _ => format!("{:.2} GiB", mib / 1024.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_reads_them() {
        assert_eq!(duration(Duration::from_millis(8_240)), "8.2 s");
        assert_eq!(duration(Duration::from_secs(185)), "3 min 05 s");
        assert_eq!(duration(Duration::from_secs(7_650)), "2 h 07 min");
        assert_eq!(bytes(3 << 19), "1.5 MiB");
        assert_eq!(bytes(312 << 20), "312 MiB");
        assert_eq!(bytes(3 << 29), "1.50 GiB");
    }
}
