//! Randomness as a function of `(seed, purpose, indices)`, never of a stream's state, so that any step of a run can
//! be replayed alone and in any order.
//!
//! A [`Stream`] is a 128-bit key; its `i`-th number is a keyed hash of `i`: two rounds of the finaliser of
//! SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014; constants of Stafford's
//! variant 13), one half of the key before each. It is fast and well mixed, and not meant for secrets. The numbers
//! are part of the file format of a run: a checkpoint is only replayed exactly while they stay as they are, which
//! is why a test pins them.

/// 2^64 divided by the golden ratio, SplitMix64's increment.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// SplitMix64's finaliser: a bijection of 64 bits in which every input bit moves about half of the output's.
const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Random numbers for one purpose, each reached by its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    before: u64,
    between: u64,
}

impl Stream {
    /// The numbers of `purpose` (such as `"order"` or `"dropout"`) under `seed`.
    pub fn new(seed: u64, purpose: &str) -> Self {
        let root = Self { before: mix(seed.wrapping_add(GOLDEN)), between: mix(!seed) };
        purpose.bytes().fold(root, |stream, byte| stream.at(u64::from(byte)))
    }

    /// The stream of its own that belongs to `index`: an epoch, a step, a layer. Chains: `stream.at(step).at(layer)`.
    #[must_use]
    pub const fn at(self, index: u64) -> Self {
        Self { before: self.bits(index), between: mix(self.between.wrapping_add(GOLDEN) ^ mix(index)) }
    }

    /// 64 random bits.
    pub const fn bits(self, index: u64) -> u64 {
        mix(mix(index.wrapping_mul(GOLDEN).wrapping_add(self.before)) ^ self.between)
    }

    /// A number of `[0, 1)`: a multiple of 2^-53.
    pub fn uniform(self, index: u64) -> f64 {
        (self.bits(index) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// A whole number of `0..n` (0 where `n` is 0), by the high half of a product (Lemire 2019); its bias is below
    /// `n / 2^64`.
    pub const fn below(self, index: u64, n: u64) -> u64 {
        ((self.bits(index) as u128 * n as u128) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_numbers_stay_as_they_are() {
        let stream = Stream::new(0, "order");
        let got = [stream.bits(0), stream.bits(1), stream.at(7).bits(0), Stream::new(1, "order").bits(0)];
        assert_eq!(got, [17367862912179635024, 1977637204106217231, 12377915170152450427, 6881323087730712228]);
    }

    #[test]
    fn neighbours_share_nothing() {
        // Seeds, purposes, substreams and indices that lie side by side give distinct numbers...
        let mut seen = HashSet::new();
        for seed in 0..10 {
            for purpose in ["order", "ordes", "dropout", ""] {
                for sub in 0..10 {
                    for index in 0..50 {
                        assert!(seen.insert(Stream::new(seed, purpose).at(sub).bits(index)));
                    }
                }
            }
        }
        // ...that differ in half of their bits: mean 32, standard deviation of the mean of 10,000 below 0.05.
        let stream = Stream::new(3, "neighbours");
        let flips: u32 = (0..10_000).map(|i| (stream.bits(i) ^ stream.bits(i + 1)).count_ones()).sum();
        assert!((f64::from(flips) / 10_000.0 - 32.0).abs() < 0.25, "{flips}");
    }

    #[test]
    fn uniform_fills_its_range_evenly() {
        let stream = Stream::new(5, "uniform");
        let mut bins = [0u32; 10];
        for i in 0..100_000 {
            let u = stream.uniform(i);
            assert!((0.0..1.0).contains(&u));
            bins[(u * 10.0) as usize] += 1;
        }
        // Each bin holds 10,000 with a standard deviation of 95.
        assert!(bins.iter().all(|&n| n.abs_diff(10_000) < 480), "{bins:?}");
    }

    #[test]
    fn below_stays_below_and_reaches_all() {
        let stream = Stream::new(9, "below");
        let reached: HashSet<u64> = (0..200).map(|i| stream.below(i, 7)).collect();
        assert_eq!(reached, (0..7).collect());
        assert_eq!(stream.below(0, 1), 0);
        assert_eq!(stream.below(0, 0), 0);
    }
}
