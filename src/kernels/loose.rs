//! Products whose sides lie as they should be read: the left one anywhere, the right one in panels that another product
//! may have written. For small products of which there are many, where packing would cost as much as multiplying.

use super::{
    gemm::{Lhs, Out},
    micro::{self, MAX_TILE},
};

/// Columns of a panel on this processor.
pub fn columns() -> usize {
    micro::loose().1
}

/// `out (+)= a[m, k] · b[k, n]`, in f32 on this thread. `b` lies in panels of [`columns`] columns,
/// `[panel][k][column]`, whatever it holds beyond the last.
///
/// # Panics
/// Where a matrix does not hold the elements that the shape names.
pub fn product([m, n, k]: [usize; 3], a: Lhs, b: &[f32], out: Out) {
    let (kernels, nr) = micro::loose();
    out.check(m, n);
    assert!(k > 0 && b.len() >= n.div_ceil(nr) * k * nr, "the panels are too small");
    assert!(m == 0 || a.data.len() > (m - 1) * a.row + (k - 1) * a.col, "the left-hand side is too small");
    let mut i = 0;
    while let Some((rows, kernel)) = kernels.iter().find(|(rows, _)| *rows <= m - i) {
        for (panel, j) in b.chunks_exact(k * nr).zip((0..n).step_by(nr)) {
            let columns = nr.min(n - j);
            let (left, right) = (a.data[i * a.row..].as_ptr().cast(), panel.as_ptr().cast());
            // SAFETY: the rows and steps on the left, the panel and the result's rows and columns are there, as was
            // checked; words are the bits of floats; `loose` gives what the processor has.
            unsafe {
                let c = out.data.add(i * out.ld + j);
                if columns == nr {
                    kernel(k, left, [a.row, a.col], right, c, out.ld, out.add);
                    continue;
                }
                let mut whole = [0f32; MAX_TILE];
                kernel(k, left, [a.row, a.col], right, whole.as_mut_ptr(), nr, false);
                out.put(&whole, nr, [i, j], [*rows, columns], out.add);
            }
        }
        i += rows;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_and_ends_make_no_difference() {
        let nr = columns();
        for (m, n, k) in [(1, 1, 1), (3, nr, 5), (12, nr + 3, 2), (29, 2 * nr, 7), (8, nr, 4), (10, nr - 1, 40)] {
            let (a, b) = (
                |i: usize, p: usize| ((i * 5 + p * 3) % 7) as f32 - 3.0,
                |p: usize, j: usize| ((p + j * 3) % 5) as f32 - 2.0,
            );
            let mut panels = vec![f32::NAN; n.div_ceil(nr) * k * nr];
            for (p, j) in (0..k).flat_map(|p| (0..n).map(move |j| (p, j))) {
                panels[(j / nr * k + p) * nr + j % nr] = b(p, j);
            }
            for (row, col) in [(k + 2, 1), (1, m + 3)] {
                let mut data = vec![0.0; (m - 1) * row + (k - 1) * col + 1];
                (0..m).for_each(|i| (0..k).for_each(|p| data[i * row + p * col] = a(i, p)));
                for add in [false, true] {
                    let ld = n + 2;
                    let mut out = vec![1f32; (m - 1) * ld + n];
                    product([m, n, k], Lhs { data: &data, row, col }, &panels, Out::new(&mut out, ld, add));
                    for (at, got) in out.iter().enumerate() {
                        let (i, j) = (at / ld, at % ld);
                        let sum: f32 = (0..k).map(|p| a(i, p) * b(p, j)).sum();
                        let due = if j >= n { 1.0 } else { sum + if add { 1.0 } else { 0.0 } };
                        assert_eq!(*got, due, "{m} {n} {k} at {i}, {j}");
                    }
                }
            }
        }
    }
}
