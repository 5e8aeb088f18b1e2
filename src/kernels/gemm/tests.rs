use rayon::prelude::*;

use super::*;

fn numbers(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32).map(|i| ((i + seed).wrapping_mul(2654435761) >> 20) as f32 / 2048.0 - 1.0).collect()
}

fn plain([m, n, k]: [usize; 3], a: &[f32], b: &[f32]) -> Vec<f64> {
    let mut c = vec![0f64; m * n];
    for i in 0..m {
        for p in 0..k {
            for j in 0..n {
                c[i * n + j] += f64::from(a[i * k + p]) * f64::from(b[p * n + j]);
            }
        }
    }
    c
}

#[test]
fn equals_the_sum_in_f64_at_every_edge() {
    for [m, n, k] in [[1, 1, 1], [12, 32, 8], [13, 33, 9], [25, 8, 576], [7, 100, 1100], [64, 300, 520]] {
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let exact = plain([m, n, k], &a, &b);
        for threads in [Threads::One, Threads::All] {
            let mut c = vec![f32::NAN; m * n];
            let (lhs, rhs) = (Lhs { data: &a, row: k, col: 1 }, Dense { data: &b, row: n, col: 1 });
            gemm([m, n, k], 0.5, lhs, &rhs, Out::new(&mut c, n, false), threads);
            gemm([m, n, k], 1.0, lhs, &rhs, Out::new(&mut c, n, true), threads);
            for (c, exact) in c.iter().zip(&exact) {
                assert!((f64::from(*c) - 1.5 * exact).abs() < 2e-6 * k as f64, "{c} {exact}");
            }
        }
    }
}

#[test]
fn transposed_sides_give_the_same_bits() {
    let [m, n, k] = [30, 70, 50];
    let (a, b) = (numbers(m * k, 3), numbers(k * n, 4));
    let transpose = |x: &[f32], rows: usize, cols: usize| -> Vec<f32> {
        (0..rows * cols).map(|i| x[(i % rows) * cols + i / rows]).collect()
    };
    let (at, bt) = (transpose(&a, m, k), transpose(&b, k, n));
    let (mut c, mut ct) = (vec![0f32; m * n], vec![0f32; m * n]);
    let (lhs, rhs) = (Lhs { data: &a, row: k, col: 1 }, Dense { data: &b, row: n, col: 1 });
    gemm([m, n, k], 1.0, lhs, &rhs, Out::new(&mut c, n, false), Threads::All);
    let (lhs, rhs) = (Lhs { data: &at, row: 1, col: m }, Dense { data: &bt, row: 1, col: k });
    gemm([m, n, k], 1.0, lhs, &rhs, Out::new(&mut ct, n, false), Threads::One);
    assert_eq!(c, ct);
}

/// Two products at once write columns that interleave, as attention's heads do. Small enough for Miri.
#[test]
fn columns_of_one_matrix_are_filled_side_by_side() {
    let [m, n, k] = [5, 3, 4];
    let (a, b) = (numbers(m * k, 7), numbers(k * n, 8));
    let mut one = vec![0f32; m * n];
    let (lhs, rhs) = (Lhs { data: &a, row: k, col: 1 }, Dense { data: &b, row: n, col: 1 });
    gemm([m, n, k], 1.0, lhs, &rhs, Out::new(&mut one, n, false), Threads::One);
    let mut all = vec![0f32; m * 2 * n];
    let whole = Out::new(&mut all, 2 * n, false);
    let start = |out: &Out| out.data;
    let half = |at: usize, add: bool| {
        // SAFETY: the columns `at..at + n` are this closure's alone.
        let out = unsafe { Out::columns(start(&whole).add(at), (m - 1) * 2 * n + n, 2 * n, add) };
        gemm([m, n, k], 1.0, lhs, &rhs, out, Threads::One);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| half(0, false));
        half(n, true);
    });
    for (row, one) in all.chunks_exact(2 * n).zip(one.chunks_exact(n)) {
        assert_eq!((&row[..n], &row[n..]), (one, one));
    }
    // nothing along k is a sum of nothing
    gemm([m, n, 0], 1.0, lhs, &rhs, Out::new(&mut one, n, false), Threads::One);
    assert_eq!(one, vec![0.0; m * n]);
}

/// Three left-hand sides for two results, the second of which is added to; more than is packed at once.
#[test]
fn sums_over_several_sides_are_those_of_one_after_another() {
    let (m, ks, ns) = (61, [9000, 70, 576], [40, 9]);
    let lefts: Vec<_> = ks.iter().map(|k| numbers(m * k, *k as u32)).collect();
    let side = |k: usize, n: usize| numbers(k * n, (k + n) as u32);
    let numbers_of = |n: usize| ks.map(|k| side(k, n));
    let rights = ns.map(numbers_of);
    assert!(m * ks.iter().sum::<usize>() > LEFT, "one sweep is not several");
    let dense = ns.map(|n| rights[(n == ns[1]) as usize].each_ref().map(|data| Dense { data, row: n, col: 1 }));
    let (mut together, mut apart) = (ns.map(|n| vec![1f32; m * n]), ns.map(|n| vec![1f32; m * n]));
    let of = |i: usize| (Lhs { data: &lefts[i], row: ks[i], col: 1 }, ks[i]);
    for threads in [Threads::One, Threads::All] {
        let [first, second] = &mut together;
        let sides = dense.each_ref().map(|sides| sides.each_ref().map(|side| side as &dyn Rhs));
        let outs = [Out::new(first, ns[0], false), Out::new(second, ns[1], true)];
        let both = outs.into_iter().zip(&sides).zip(ns).map(|((out, sides), n)| Right { sides, n, out });
        products(m, 0.5, &[of(0), of(1), of(2)], &both.collect::<Vec<_>>(), threads);
        for (result, sides) in dense.iter().enumerate() {
            for (i, side) in sides.iter().enumerate() {
                let out = Out::new(&mut apart[result], ns[result], i > 0 || result == 1);
                gemm([m, ns[result], ks[i]], 0.5, of(i).0, side, out, Threads::One);
            }
        }
        assert_eq!(together, apart);
    }
}

/// What is packed at once grows with the rows and falls again where all blocks are too many: whatever comes, so many
/// words are enough, and not many more than some number of rows takes.
#[test]
fn no_number_of_rows_packs_more_than_is_said() {
    let computes: &[_] =
        if Compute::bf16_or_f32() == Compute::Bf16 { &[Compute::F32, Compute::Bf16] } else { &[Compute::F32] };
    let sides: [&[usize]; 7] = [&[24], &[384, 384], &[576, 192, 192], &[1760], &[1536, 1536], &[33, 9000], &[49_152]];
    for (&compute, depths) in computes.iter().flat_map(|compute| sides.map(|depths| (compute, depths))) {
        let blocks: Vec<_> = depths.iter().flat_map(|k| blocks(0, *k, compute)).collect();
        let mut most = 0;
        for m in 1..=1000 {
            let sweep = Sweep { m, mr: Micro::choose(m, 64, compute).mr, compute, blocks: &blocks };
            let parts: Vec<_> = sweep.parts().collect();
            assert_eq!(parts.iter().map(|part| part.blocks.len()).sum::<usize>(), blocks.len());
            most = parts.iter().map(Sweep::words).fold(most, usize::max);
            let said = left_words(m, depths, compute);
            assert!(most <= said && said - most <= said / 12, "{m} rows of {depths:?}: {most} of {said}");
        }
        let deepest = blocks.iter().map(|block| block.k.len().div_ceil(compute.per_step())).max();
        assert_eq!(deepest, depths.iter().map(|k| block_steps(*k, compute)).max());
    }
}

/// Packs slowly now and then, so that threads wait for one another.
struct Slow<'a>(Dense<'a>);

impl Rhs for Slow<'_> {
    fn pack(&self, k: Range<usize>, n: Range<usize>, nr: usize, out: &mut [u32]) {
        if n.start > 0 {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        self.0.pack(k, n, nr, out);
    }
}

#[test]
fn a_thread_that_waits_within_a_product_may_begin_another() {
    let [m, n, k] = [64, 64, SERIAL / 64 / 64];
    let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
    let product = |_| {
        let mut c = vec![0f32; m * n];
        let (lhs, rhs) = (Lhs { data: &a, row: k, col: 1 }, Slow(Dense { data: &b, row: n, col: 1 }));
        gemm([m, n, k], 1.0, lhs, &rhs, Out::new(&mut c, n, false), Threads::All);
        c
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
    let all: Vec<_> = pool.install(|| (0..50).into_par_iter().map(product).collect());
    assert!(all.iter().all(|c| *c == all[0]));
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let [m, n, k] = [37, 65, 700];
    let (a, b) = (numbers(m * k, 5), numbers(k * n, 6));
    let rhs = Dense { data: &b, row: n, col: 1 };
    let mut all = vec![0f32; m * n];
    gemm([m, n, k], 1.0, Lhs { data: &a, row: k, col: 1 }, &rhs, Out::new(&mut all, n, false), Threads::All);
    for i in 0..m {
        let mut one = vec![0f32; n];
        let lhs = Lhs { data: &a[i * k..], row: k, col: 1 };
        gemm([1, n, k], 1.0, lhs, &rhs, Out::new(&mut one, n, false), Threads::One);
        assert_eq!(one, all[i * n..(i + 1) * n]);
    }
}
