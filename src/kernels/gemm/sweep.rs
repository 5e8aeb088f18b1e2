//! Blocks of k of all rows on the left, packed together, and what they are multiplied with.

use std::{cell::RefCell, ops::Range};

use rayon::prelude::*;

use super::{LEFT, Lhs, Out, PANELS, Right, Threads};
use crate::kernels::{
    compute::Compute,
    micro::{MAX_TILE, Micro},
    pack::{Floats, Rounded, pair, rounded, transpose},
    simd::{Cache, fetch_at},
    words::Words,
};

thread_local! {
    static RIGHT: RefCell<Words> = const { RefCell::new(Words::new()) };
}

/// Row panels from which on multiplying takes so long that what is packed next comes meanwhile.
const FETCH_FROM: usize = 4;

/// A range of k of one of the left-hand sides.
pub struct Block {
    /// Its number.
    pub left: usize,
    /// The range.
    pub k: Range<usize>,
}

/// Blocks that are packed together.
#[derive(Clone, Copy)]
pub struct Sweep<'a> {
    /// Rows.
    pub m: usize,
    /// Rows of a panel.
    pub mr: usize,
    /// What is multiplied.
    pub compute: Compute,
    /// The blocks.
    pub blocks: &'a [Block],
}

impl<'a> Sweep<'a> {
    /// What is packed at once, one after the other: as many blocks as [`LEFT`] words hold, or one.
    pub fn parts(self) -> impl Iterator<Item = Self> + use<'a> {
        let mut rest = self.blocks;
        std::iter::from_fn(move || {
            let of = |blocks: usize| Self { blocks: &rest[..blocks], ..self };
            let most = (2..=rest.len()).take_while(|blocks| of(*blocks).words() <= LEFT).last().unwrap_or(1);
            let part = of(most.min(rest.len()));
            rest = &rest[part.blocks.len()..];
            (!part.blocks.is_empty()).then_some(part)
        })
    }

    fn steps_of(&self, block: &Block) -> usize {
        block.k.len().div_ceil(self.compute.per_step())
    }

    /// Words a row of all blocks.
    fn steps(&self) -> usize {
        self.blocks.iter().map(|block| self.steps_of(block)).sum()
    }

    /// Words of all rows.
    pub fn words(&self) -> usize {
        self.m.next_multiple_of(self.mr) * self.steps()
    }

    /// Packs `[panel of rows][block][step][mr]` as the kernel wants it, scaled, zero beyond the last row.
    pub fn pack(&self, alpha: f32, lefts: &[(Lhs, usize)], packed: &mut [u32], threads: Threads) {
        let fill = |(panel, mut out): (usize, &mut [u32])| {
            let rows = panel * self.mr..self.m.min((panel + 1) * self.mr);
            for block in self.blocks {
                let (words, rest) = out.split_at_mut(self.mr * self.steps_of(block));
                self.pack_rows(alpha, lefts[block.left].0, rows.clone(), &block.k, words);
                out = rest;
            }
        };
        let size = self.mr * self.steps();
        match threads {
            Threads::One => packed.chunks_exact_mut(size).enumerate().for_each(fill),
            Threads::All => packed.par_chunks_exact_mut(size).enumerate().with_min_len(4).for_each(fill),
        }
    }

    fn pack_rows(&self, alpha: f32, a: Lhs, rows: Range<usize>, k: &Range<usize>, panel: &mut [u32]) {
        let (mr, count) = (self.mr, rows.len());
        if a.col == 1 {
            let data = &a.data[rows.start * a.row + k.start..];
            let floats = Floats { data, stride: a.row, k: k.len(), alpha };
            return match self.compute {
                Compute::F32 => transpose(floats, count, mr, panel),
                Compute::Bf16 => transpose(Rounded(floats), count, mr, panel),
            };
        }
        if count < mr {
            panel.fill(0);
        }
        let element = |r: usize, p: usize| alpha * a.data[(rows.start + r) * a.row + p * a.col];
        let word = |r: usize, p: usize| {
            let second = if p + 1 < k.end { rounded(element(r, p + 1)) } else { 0 };
            pair(rounded(element(r, p)), second)
        };
        for (step, out) in panel.chunks_exact_mut(mr).enumerate() {
            let p = k.start + step * self.compute.per_step();
            match self.compute {
                Compute::F32 if a.row == 1 => {
                    let from = &a.data[rows.start + p * a.col..][..count];
                    out.iter_mut().zip(from).for_each(|(out, x)| *out = (alpha * x).to_bits());
                }
                Compute::F32 => (0..count).for_each(|r| out[r] = element(r, p).to_bits()),
                Compute::Bf16 => (0..count).for_each(|r| out[r] = word(r, p)),
            }
        }
    }

    /// Multiplies all rows with all columns; panels of those are packed by the task that multiplies them.
    pub fn multiply(&self, packed: &[u32], rights: &[Right], add: bool, threads: Threads) {
        let micro = |right: &Right| Micro::choose(self.m, right.n, self.compute);
        let panels_of = |right: &Right| right.n.div_ceil(micro(right).nr);
        let (row_panels, panels) = (self.m.div_ceil(self.mr), rights.iter().map(panels_of).sum::<usize>());
        let workers = if threads == Threads::One { 1 } else { rayon::current_num_threads() };
        // columns are cut evenly over the workers; where there are too few, rows are cut as well
        let column_tasks = panels.div_ceil(PANELS).next_multiple_of(workers).min(panels);
        let row_tasks = workers.div_ceil(column_tasks).min(row_panels);
        let cut = |parts: usize, total: usize, i: usize| i * total / parts..(i + 1) * total / parts;
        let task = |index: usize| {
            let rows = cut(row_tasks, row_panels, index % row_tasks);
            // of one result after another
            let mut columns = cut(column_tasks, panels, index / row_tasks);
            for right in rights {
                let n = panels_of(right);
                let here = columns.start.min(n)..columns.end.min(n);
                if !here.is_empty() {
                    self.tiles(packed, rows.clone(), right, micro(right), here, add);
                }
                columns = columns.start.saturating_sub(n)..columns.end.saturating_sub(n);
            }
        };
        match threads {
            Threads::One => (0..column_tasks * row_tasks).for_each(task),
            Threads::All => (0..column_tasks * row_tasks).into_par_iter().with_max_len(1).for_each(task),
        }
    }

    /// Multiplies the row panels with column panels of one result.
    fn tiles(
        &self,
        packed: &[u32],
        row_panels: Range<usize>,
        right: &Right,
        micro: Micro,
        panels: Range<usize>,
        mut add: bool,
    ) {
        let (mr, nr) = (self.mr, micro.nr);
        let (all, mut before) = (self.steps(), 0);
        let columns = panels.start * nr..right.n.min(panels.end * nr);
        // what follows for this thread, as far as it can be foreseen: the columns of its next task
        let ahead = columns.end..right.n.min(columns.end + columns.len());
        let parts = row_panels.len();
        RIGHT.with_borrow_mut(|words| {
            for (index, block) in self.blocks.iter().enumerate() {
                let steps = self.steps_of(block);
                let words = words.first(panels.len() * nr * steps);
                right.sides[block.left].pack(block.k.clone(), columns.clone(), nr, words);
                let (next, there) = match self.blocks.get(index + 1) {
                    Some(next) => (next, &columns),
                    None => (&self.blocks[0], &ahead),
                };
                for (part, row_panel) in row_panels.clone().enumerate() {
                    // memory has nothing else to do while this multiplies
                    if parts >= FETCH_FROM {
                        right.sides[next.left].fetch(next.k.clone(), there.clone(), part, parts);
                    }
                    let left = &packed[mr * (row_panel * all + before)..][..mr * steps];
                    for (panel, side) in panels.clone().zip(words.chunks_exact(nr * steps)) {
                        let [i, j] = [row_panel * mr, panel * nr];
                        let shape = [mr.min(self.m - i), nr.min(right.n - j)];
                        tile(micro, steps, [left, side], &right.out, [i, j], shape, add || right.out.add);
                    }
                }
                (before, add) = (before + steps, true);
            }
        });
    }
}

/// One tile of the result, of which `rows × columns` are there.
fn tile(
    micro: Micro,
    steps: usize,
    [left, right]: [&[u32]; 2],
    out: &Out,
    [i, j]: [usize; 2],
    [rows, columns]: [usize; 2],
    add: bool,
) {
    let (nr, (computed, tile)) = (micro.nr, micro.of_rows(rows));
    // SAFETY: `products` checked that the result holds the rows and columns; this tile is this task's alone; the panels
    // hold steps·mr and steps·nr words; `Micro::choose` checked the processor.
    unsafe {
        let c = out.data.add(i * out.ld + j);
        if rows == computed && columns == nr {
            // what is written comes while it is summed up
            (0..rows).for_each(|row| fetch_at(c.wrapping_add(row * out.ld), columns, Cache::First));
            return tile(steps, left.as_ptr(), right.as_ptr(), c, out.ld, add);
        }
        let mut whole = [0f32; MAX_TILE];
        tile(steps, left.as_ptr(), right.as_ptr(), whole.as_mut_ptr(), nr, false);
        out.put(&whole, nr, [i, j], [rows, columns], add);
    }
}
