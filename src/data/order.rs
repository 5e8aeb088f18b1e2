//! The order in which rows are visited, and which rows are held out: functions of the seed alone.

use super::TokenizedPair;
use crate::random::Stream;

/// The order of `n` rows in `epoch`: a permutation of `0..n` that depends on `(seed, epoch, n)` only, or the rows as
/// they stand where `shuffle` is off.
///
/// Fisher and Yates's shuffle from the last row to the first, row `i` drawing from `Stream(seed, "order").at(epoch)`
/// at index `i`.
pub fn order(seed: u64, epoch: u64, n: usize, shuffle: bool) -> Vec<u32> {
    let mut rows: Vec<u32> = (0..n).map(|row| row as u32).collect();
    if shuffle {
        let stream = Stream::new(seed, "order").at(epoch);
        for i in (1..n).rev() {
            rows.swap(i, stream.below(i as u64, i as u64 + 1) as usize);
        }
    }
    rows
}

/// Splits `pairs` into those to train on and those held out, each in the order given.
///
/// A row is held out where a number of `[0, 1)` drawn from `(seed, file, line)` lies below `fraction`, so that its
/// side does not change when other rows come, go or are refused; the share is therefore met only on average. Of two
/// or more pairs with a `fraction` between 0 and 1 exclusive, at least one lands on each side: the row whose number
/// is the smallest (to hold out) or the largest (to train on).
pub fn split_eval(pairs: Vec<TokenizedPair>, fraction: f64, seed: u64) -> (Vec<TokenizedPair>, Vec<TokenizedPair>) {
    if pairs.is_empty() || fraction <= 0.0 {
        return (pairs, Vec::new());
    }
    let stream = Stream::new(seed, "split");
    let draw = |pair: &TokenizedPair| stream.at(u64::from(pair.origin.0)).uniform(u64::from(pair.origin.1));
    let draws: Vec<f64> = pairs.iter().map(draw).collect();
    let smallest = draws.iter().copied().fold(f64::INFINITY, f64::min);
    let largest = draws.iter().copied().fold(0.0, f64::max);
    let held_out = |u: f64| u < largest && (u < fraction || u == smallest);
    let (mut train, mut eval) = (Vec::new(), Vec::new());
    for (pair, u) in pairs.into_iter().zip(draws) {
        if held_out(u) { eval.push(pair) } else { train.push(pair) }
    }
    (train, eval)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(lines: impl Iterator<Item = u32>) -> Vec<TokenizedPair> {
        let pair = |line| TokenizedPair { prompt: vec![1], chosen: vec![2], rejected: vec![3], origin: (0, line) };
        lines.map(pair).collect()
    }

    #[test]
    fn an_order_is_a_permutation_of_its_own() {
        let first = order(0, 0, 1000, true);
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<u32>>());
        assert_eq!(first, order(0, 0, 1000, true));
        assert_ne!(first, order(0, 1, 1000, true));
        assert_ne!(first, order(1, 0, 1000, true));
        assert_eq!(order(0, 0, 4, false), [0, 1, 2, 3]);
        assert_eq!(order(0, 0, 0, true), [0u32; 0]);
        assert_eq!(order(0, 0, 1, true), [0]);
    }

    #[test]
    fn an_order_stays_as_it_is() {
        assert_eq!(order(0, 0, 8, true), [0, 4, 5, 3, 6, 2, 1, 7]);
    }

    #[test]
    fn every_place_is_as_likely() {
        // Row 0 of 5 lands in each place in 2,000 of 10,000 epochs, with a standard deviation of 40.
        let mut places = [0u32; 5];
        for epoch in 0..10_000 {
            places[order(3, epoch, 5, true).iter().position(|&row| row == 0).unwrap()] += 1;
        }
        assert!(places.iter().all(|&n| n.abs_diff(2000) < 200), "{places:?}");
    }

    #[test]
    fn a_row_keeps_its_side_when_others_go() {
        let (train, eval) = split_eval(pairs(1..1001), 0.2, 7);
        assert_eq!(train.len() + eval.len(), 1000);
        assert!((150..250).contains(&eval.len()), "{}", eval.len());
        let (_, of_half) = split_eval(pairs((1..1001).filter(|line| line % 2 == 0)), 0.2, 7);
        let expected: Vec<_> = eval.into_iter().filter(|pair| pair.origin.1 % 2 == 0).collect();
        assert_eq!(of_half, expected);
    }

    #[test]
    fn neither_side_is_empty() {
        for seed in 0..50 {
            for fraction in [1e-6, 0.5, 0.999_999] {
                let (train, eval) = split_eval(pairs(1..3), fraction, seed);
                assert_eq!((train.len(), eval.len()), (1, 1));
            }
        }
        let (train, eval) = split_eval(pairs(1..3), 0.0, 0);
        assert_eq!((train.len(), eval.len()), (2, 0));
        let (train, eval) = split_eval(pairs(1..2), 0.5, 0);
        assert_eq!((train.len(), eval.len()), (1, 0));
    }
}
