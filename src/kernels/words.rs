//! Scratch of packed words, aligned as the processor's widest loads like it.

use std::sync::{Mutex, PoisonError};

/// A line of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// A buffer that grows and stays.
#[derive(Default)]
pub struct Words(Vec<Line>);

impl Words {
    /// An empty buffer.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Its first `n` words, whatever they hold.
    pub fn first(&mut self, n: usize) -> &mut [u32] {
        let lines = n.div_ceil(16);
        if self.0.len() < lines {
            // what it held goes first: nobody needs it, and both at once would be the peak of a run
            self.0 = Vec::new();
            self.0.resize(lines, Line([0; 16]));
        }
        // SAFETY: a line is sixteen words and nothing else; the borrow is of the whole buffer.
        let all = unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast::<u32>(), self.0.len() * 16) };
        &mut all[..n]
    }

    /// The same as floats.
    pub fn floats(&mut self, n: usize) -> &mut [f32] {
        let words = self.first(n);
        // SAFETY: any word is a float's bits; the borrow is of the words.
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) }
    }
}

/// A buffer for the one product that is under way, on whichever thread: it stays for the next one. A product that comes
/// meanwhile makes one of its own, and the larger stays.
pub struct One(Mutex<Words>);

impl One {
    /// An empty one.
    pub const fn new() -> Self {
        Self(Mutex::new(Words::new()))
    }

    /// Takes the buffer.
    pub fn take(&self) -> Words {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Gives a buffer back that was taken.
    pub fn give_back(&self, words: Words) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if held.0.len() < words.0.len() {
            *held = words;
        }
    }
}

/// Floats as their bits.
pub fn bits(floats: &mut [f32]) -> &mut [u32] {
    // SAFETY: a float is a word, and any word is a float's bits; the borrow is of the floats.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), floats.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_buffer_stays_however_many_threads_take_it_in_turn() {
        static ONE: One = One::new();
        let held = || {
            let words = ONE.take();
            let lines = words.0.len();
            ONE.give_back(words);
            lines
        };
        for lines in 1..4 {
            let product = move || {
                let mut words = ONE.take();
                words.first(16 * lines);
                ONE.give_back(words);
            };
            std::thread::spawn(product).join().expect("a product");
            assert_eq!(held(), lines);
        }
        let (mut first, mut second) = (ONE.take(), ONE.take());
        assert_eq!((first.0.len(), second.0.len()), (3, 0));
        first.first(16 * 5);
        second.first(16 * 4);
        ONE.give_back(first);
        ONE.give_back(second);
        assert_eq!(held(), 5);
    }

    #[test]
    fn it_grows_and_keeps_its_alignment() {
        let mut words = Words::new();
        assert_eq!(words.first(0), [0u32; 0]);
        for n in [1, 16, 17, 40, 3] {
            let first = words.first(n);
            assert_eq!((first.len(), first.as_ptr() as usize % 64), (n, 0));
            first.fill(n as u32);
        }
        assert_eq!(words.first(40), [&[3u32; 3][..], &[40; 37]].concat());
    }
}
