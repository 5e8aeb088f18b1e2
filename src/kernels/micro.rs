//! The innermost product: a tile of `mr × nr` sums held in registers.
//!
//! Every element is a chain of fused multiply-adds in the order of k, whatever the tile's place in the matrix, so a
//! row's result does not depend on what else is in the batch.

/// Computes `c[mr, nr] (+)= a · b` over `k` steps.
///
/// `a` is packed `[k][mr]`, `b` is packed `[k][nr]`, `c` is row-major with `ldc` floats a row.
///
/// # Safety
/// `a` and `b` hold `k·mr` and `k·nr` floats, `c` is writable over `mr` rows of `nr` floats `ldc` apart, and the
/// processor has the features that the kernel was chosen by.
pub type Tile = unsafe fn(k: usize, a: *const f32, b: *const f32, c: *mut f32, ldc: usize, add: bool);

/// A micro-kernel and the shape of its tile.
#[derive(Clone, Copy)]
pub struct Micro {
    /// Rows of the tile.
    pub mr: usize,
    /// Columns of the tile.
    pub nr: usize,
    /// The kernel.
    pub tile: Tile,
}

/// The largest tile of any kernel, in floats.
pub const MAX_TILE: usize = 12 * 32;

impl Micro {
    /// The best kernel of this processor for a product with `n` columns.
    pub fn choose(n: usize) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return match n {
                    0..=16 => Self { mr: 12, nr: 16, tile: x86::avx512_12x16 },
                    _ => Self { mr: 12, nr: 32, tile: x86::avx512_12x32 },
                };
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return match n {
                    0..=8 => Self { mr: 6, nr: 8, tile: x86::avx2_6x8 },
                    _ => Self { mr: 6, nr: 16, tile: x86::avx2_6x16 },
                };
            }
        }
        let _ = n;
        Self { mr: 4, nr: 16, tile: tile_portable }
    }
}

/// Plain Rust that the compiler vectorises: NEON on ARM, SSE2 on an old x86.
unsafe fn tile_portable(k: usize, a: *const f32, b: *const f32, c: *mut f32, ldc: usize, add: bool) {
    const MR: usize = 4;
    const NR: usize = 16;
    let mut sums = [[0f32; NR]; MR];
    // SAFETY: the caller vouches for `k` steps of both panels and for the tile of `c`.
    unsafe {
        let a = std::slice::from_raw_parts(a, k * MR);
        let b = std::slice::from_raw_parts(b, k * NR);
        for (a, b) in a.chunks_exact(MR).zip(b.chunks_exact(NR)) {
            for (row, &a) in sums.iter_mut().zip(a) {
                for (sum, &b) in row.iter_mut().zip(b) {
                    // a fused multiply-add is a library call where the target has none
                    *sum = if cfg!(target_arch = "aarch64") { a.mul_add(b, *sum) } else { *sum + a * b };
                }
            }
        }
        for (i, row) in sums.iter().enumerate() {
            let c = std::slice::from_raw_parts_mut(c.add(i * ldc), NR);
            for (c, sum) in c.iter_mut().zip(row) {
                *c = if add { *c + sum } else { *sum };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// A kernel whose rows and vectors are written out one by one: sums that are indexed by a loop's variable stay in
    /// memory unless the compiler happens to unroll it, at a fifth of the speed.
    macro_rules! tile {
        ($name:ident, $feature:literal, $lanes:literal, $vector:ty,
         $zero:ident, $load:ident, $store:ident, $broadcast:ident, $fma:ident, $add:ident,
         [$($row:literal),+], $vectors:tt) => {
            #[target_feature(enable = $feature)]
            pub unsafe fn $name(k: usize, mut a: *const f32, mut b: *const f32, c: *mut f32, ldc: usize, add: bool) {
                const ROWS: usize = [$($row),+].len();
                const VECTORS: usize = $vectors.len();
                let mut sums: [[$vector; VECTORS]; ROWS] = [[$zero(); VECTORS]; ROWS];
                // SAFETY: the caller vouches for `k` steps of both panels and for the tile of `c`.
                unsafe {
                    for _ in 0..k {
                        tile!(@load b, $load, $lanes, $vectors, columns);
                        $(
                            let left = $broadcast(*a.add($row));
                            tile!(@fma sums, $row, left, columns, $fma, $vectors);
                        )+
                        a = a.add(ROWS);
                        b = b.add($lanes * VECTORS);
                    }
                    for (i, row) in sums.iter().enumerate() {
                        for (v, &sum) in row.iter().enumerate() {
                            let at = c.add(i * ldc + $lanes * v);
                            $store(at, if add { $add($load(at), sum) } else { sum });
                        }
                    }
                }
            }
        };
        (@load $b:ident, $load:ident, $lanes:literal, [$($v:literal),+], $columns:ident) => {
            let $columns = [$($load($b.add($lanes * $v))),+];
        };
        (@fma $sums:ident, $row:literal, $left:ident, $columns:ident, $fma:ident, [$($v:literal),+]) => {
            $($sums[$row][$v] = $fma($left, $columns[$v], $sums[$row][$v]);)+
        };
    }

    macro_rules! avx512 {
        ($name:ident, $vectors:tt) => {
            tile!(
                $name,
                "avx512f",
                16,
                __m512,
                _mm512_setzero_ps,
                _mm512_loadu_ps,
                _mm512_storeu_ps,
                _mm512_set1_ps,
                _mm512_fmadd_ps,
                _mm512_add_ps,
                [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
                $vectors
            );
        };
    }

    macro_rules! avx2 {
        ($name:ident, $vectors:tt) => {
            tile!(
                $name,
                "avx2,fma",
                8,
                __m256,
                _mm256_setzero_ps,
                _mm256_loadu_ps,
                _mm256_storeu_ps,
                _mm256_set1_ps,
                _mm256_fmadd_ps,
                _mm256_add_ps,
                [0, 1, 2, 3, 4, 5],
                $vectors
            );
        };
    }

    avx512!(avx512_12x32, [0, 1]);
    avx512!(avx512_12x16, [0]);
    avx2!(avx2_6x16, [0, 1]);
    avx2!(avx2_6x8, [0]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernels() -> Vec<Micro> {
        let portable = Micro { mr: 4, nr: 16, tile: tile_portable };
        let mut all = vec![portable, Micro::choose(8), Micro::choose(64)];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(Micro { mr: 6, nr: 16, tile: x86::avx2_6x16 });
            all.push(Micro { mr: 6, nr: 8, tile: x86::avx2_6x8 });
        }
        all
    }

    #[test]
    fn every_kernel_multiplies_and_adds() {
        for Micro { mr, nr, tile } in kernels() {
            let k = 5;
            let a: Vec<f32> = (0..k * mr).map(|i| (i % 7) as f32 - 3.0).collect();
            let b: Vec<f32> = (0..k * nr).map(|i| (i % 5) as f32 - 2.0).collect();
            let mut c = vec![1f32; mr * (nr + 3)];
            // SAFETY: the buffers have the sizes that the kernel states.
            unsafe { tile(k, a.as_ptr(), b.as_ptr(), c.as_mut_ptr(), nr + 3, true) };
            for i in 0..mr {
                for j in 0..nr {
                    let sum: f32 = (0..k).map(|p| a[p * mr + i] * b[p * nr + j]).sum();
                    assert_eq!(c[i * (nr + 3) + j], 1.0 + sum, "{mr}x{nr} at {i},{j}");
                }
                assert_eq!(c[i * (nr + 3) + nr], 1.0, "wrote past the tile");
            }
        }
    }
}
