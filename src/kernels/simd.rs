//! Loops compiled once more for the vector units that the processor turns out to have.
//!
//! A crate is compiled for the oldest processor of its target. [`multiversion!`] writes a function's body out for newer
//! ones as well and picks at run time. The arithmetic is the same in each (a multiplication and an addition are fused
//! where `mul_add` is written and nowhere else), so results do not depend on what was picked.

/// The mask of the first `n` lanes of sixteen.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn first(n: usize) -> u16 {
    if n >= 16 { u16::MAX } else { (1 << n) - 1 }
}

/// A cache near the processor.
#[derive(Clone, Copy)]
pub enum Cache {
    /// For what is read next.
    First,
    /// For what is read soon.
    Second,
}

/// Asks for these bytes to come to a cache. A hint: nothing depends on it.
#[inline(always)]
pub fn fetch(bytes: &[u8], to: Cache) {
    fetch_at(bytes.as_ptr(), bytes.len(), to);
}

/// The same of `n` elements from `start` on, wherever that is.
#[inline(always)]
pub fn fetch_at<T>(start: *const T, n: usize, to: Cache) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..n).step_by(64 / size_of::<T>()).map(|i| start.wrapping_add(i)) {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        let line = line.cast();
        // SAFETY: a prefetch reads nothing, and every x86-64 processor has it.
        unsafe {
            match to {
                Cache::First => _mm_prefetch::<_MM_HINT_T0>(line),
                Cache::Second => _mm_prefetch::<_MM_HINT_T1>(line),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, n, to);
}

/// Defines functions whose bodies are compiled for AVX-512, for AVX2 and for the target's baseline.
///
/// What a body calls must be inlined into it to be compiled with it: other functions are marked `#[inline(always)]`.
macro_rules! multiversion {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)+) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                {
                    // SAFETY: the processor has the features.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the processor has the features.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    )+};
}

pub(crate) use multiversion;
