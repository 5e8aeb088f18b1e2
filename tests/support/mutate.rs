//! Changes to a file, told by a number alone.

use dpo_lora::random::Stream;

use crate::openers::Kind;

/// Whole numbers at which sizes, counts and offsets go wrong.
const NUMBERS: [u64; 14] =
    [0, 1, 7, 8, 127, 255, 256, 65_535, 1 << 20, (1 << 31) - 1, 1 << 32, (1 << 53) + 1, i64::MAX as u64, u64::MAX];

/// Random choices, one after the other.
struct Choices {
    stream: Stream,
    at: u64,
}

impl Choices {
    /// Below `n`; 0 where `n` is 0.
    fn below(&mut self, n: usize) -> usize {
        self.at += 1;
        self.stream.below(self.at, n as u64) as usize
    }

    fn of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    /// A range within `length`, more often a short one.
    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let most = self.of(&[4, 32, usize::MAX]).min(length);
        let start = self.below(length + 1);
        start..(start + self.below(most + 1)).min(length)
    }
}

/// The mutation of this number: one of the seeds after a few changes.
pub fn mutated(kind: Kind, seeds: &[Vec<u8>], number: u64) -> Vec<u8> {
    let mut choose = Choices { stream: Stream::new(number, kind.file()), at: 0 };
    let mut bytes = seeds[choose.below(seeds.len())].clone();
    for _ in 0..choose.of(&[1, 1, 1, 2, 4]) {
        change(&mut bytes, kind, seeds, &mut choose);
    }
    bytes
}

fn change(bytes: &mut Vec<u8>, kind: Kind, seeds: &[Vec<u8>], choose: &mut Choices) {
    // most of a GGUF file is numbers, of which nothing depends on any
    let most = if kind == Kind::Gguf { bytes.len().min(16 << 10) } else { bytes.len() };
    let at = choose.below(most);
    match choose.below(11) {
        0 if !bytes.is_empty() => bytes[at] ^= 1 << choose.below(8),
        1 if !bytes.is_empty() => bytes[at] = choose.of(&[0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'[', b'\\', b'\n']),
        2 => drop(bytes.drain(choose.range(bytes.len()))),
        3 => {
            let copy = bytes[choose.range(bytes.len())].to_vec();
            drop(bytes.splice(at..at, copy));
        }
        4 => {
            let other = &seeds[choose.below(seeds.len())];
            let copy = other[choose.range(other.len())].to_vec();
            drop(bytes.splice(choose.range(bytes.len()), copy));
        }
        5 => bytes.truncate(at),
        6 => {
            let number = choose.of(&NUMBERS).to_le_bytes();
            let number = &number[..choose.of(&[2, 4, 8])];
            bytes.iter_mut().skip(at).zip(number).for_each(|(byte, new)| *byte = *new);
        }
        // a number in figures becomes another one
        7 | 8 => {
            let is_digit = |at: &usize| bytes[*at].is_ascii_digit();
            if let Some(start) = (at..bytes.len()).chain(0..at).find(is_digit) {
                let end = (start..bytes.len()).find(|at| !is_digit(at)).unwrap_or(bytes.len());
                drop(bytes.splice(start..end, choose.of(&NUMBERS).to_string().into_bytes()));
            }
        }
        9 => {
            let word = choose.of(kind.words()).as_bytes().to_vec();
            let times = choose.of(&[1, 1, 1, 300]);
            drop(bytes.splice(at..at, word.repeat(times)));
        }
        _ => {
            let word = choose.of(kind.words()).as_bytes().to_vec();
            drop(bytes.splice(choose.range(bytes.len()), word));
        }
    }
}
