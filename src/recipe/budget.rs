//! A size of memory as a person writes it: `6GiB`, `1.5 GiB`, `800MB`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The most memory that a run may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Budget {
    /// What the machine or the device has free, less a margin.
    Auto,
    /// So many bytes.
    Bytes(u64),
}

const UNITS: [(&str, u64); 7] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];

/// The least size that is taken for one: less is a slip, like `6` for `6GiB`.
const LEAST: u64 = 1 << 20;

impl FromStr for Budget {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let (unit, bytes) = UNITS.iter().find(|(unit, _)| text.ends_with(unit)).ok_or(())?;
        let number = text[..text.len() - unit.len()].trim_end();
        let digits = |c: char| c.is_ascii_digit() || c == '.';
        let number: f64 = number.parse().ok().filter(|_| number.chars().all(digits)).ok_or(())?;
        let size = number * *bytes as f64;
        // f64 holds whole numbers up to 2^53; a part of a byte is none
        match (LEAST as f64..=9e15).contains(&size) {
            true => Ok(Self::Bytes(size as u64)),
            false => Err(()),
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => out.write_str("auto"),
            Self::Bytes(bytes) => {
                let whole = UNITS[..3].iter().find(|(_, unit)| bytes.is_multiple_of(*unit));
                let (name, unit) = whole.unwrap_or(&("B", 1));
                write!(out, "{}{name}", bytes / unit)
            }
        }
    }
}

impl Serialize for Budget {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Budget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|()| serde::de::Error::custom(format!("{text:?} is no size of memory")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_come_back() {
        for (text, bytes, again) in [
            ("6GiB", 6 << 30, "6GiB"),
            ("1.5 GiB", 3 << 29, "1536MiB"),
            ("200MiB", 200 << 20, "200MiB"),
            ("8GB", 8_000_000_000, "7812500KiB"),
            ("1048577B", 1_048_577, "1048577B"),
            ("0.1GiB", 107_374_182, "107374182B"),
        ] {
            let budget: Budget = text.parse().unwrap();
            assert_eq!(budget, Budget::Bytes(bytes), "{text}");
            assert_eq!(budget.to_string(), again);
            assert_eq!(again.parse(), Ok(budget));
        }
        assert_eq!("auto".parse(), Ok(Budget::Auto));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "6",
            "GiB",
            "-1GiB",
            "1e3GiB",
            "nanGiB",
            "infGiB",
            "6gib",
            "6 Gi",
            "1KiB",
            "99999999999GiB",
            "1.2.3GiB",
        ] {
            assert_eq!(text.parse::<Budget>(), Err(()), "{text}");
        }
    }
}
