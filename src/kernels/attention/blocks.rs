//! Attention in pieces that fit the caches, and in tasks that share nothing: which queries meet which keys, and when.

use std::ops::Range;

use super::{Heads, Span};
use crate::kernels::loose::columns;

/// Keys that a block meets at once: their scores take 24 KiB.
pub const KEYS: usize = 192;

/// Keys of a long group for which tasks of their own sum gradients.
const RANGE: usize = 2 * KEYS;
/// The most such ranges.
const MAX_RANGES: usize = 8;

/// Queries of the heads that one key head serves, as many as a panel has columns: first all heads of the first query.
pub struct Block<'a> {
    span: &'a Span,
    /// Columns: head `c % group` of the key head's at query `c / group` of the span.
    pub columns: Range<usize>,
    /// The key head.
    kv: usize,
    pub heads: Heads,
}

/// Keys that a block meets at once: of the `KEYS` rows from `cell` on those that some query sees.
pub struct Piece {
    /// Rows of keys.
    pub rows: Range<usize>,
    /// The place of the first among the span's.
    first: usize,
    /// The same for every block that meets a key: pieces of other cells share no rows with it.
    pub cell: usize,
}

impl<'a> Block<'a> {
    /// The blocks that meet a key head.
    pub fn all(span: &'a Span, kv: usize, heads: Heads) -> impl Iterator<Item = Self> {
        let n = span.queries.len() * heads.group();
        let block = move |start: usize| Self { span, columns: start..n.min(start + columns()), kv, heads };
        (0..n).step_by(columns()).map(block)
    }

    /// The row of each column's query, and its head.
    pub fn queries(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (first, kv, group) = (self.span.queries.start, self.kv, self.heads.group());
        self.columns.clone().map(move |c| (first + c / group, kv * group + c % group))
    }

    /// Where each column's part starts in rows of all heads.
    pub fn places(&self) -> impl Iterator<Item = usize> + use<> {
        let heads = self.heads;
        self.queries().map(move |(row, head)| row * heads.width() + head * heads.dim)
    }

    /// Where a piece's first key or value starts.
    pub fn key(&self, piece: &Piece) -> usize {
        piece.rows.start * self.heads.kv_width() + self.kv * self.heads.dim
    }

    /// The keys that some query of it sees.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> + use<> {
        let group = self.heads.group();
        let queries = self.columns.start / group..self.columns.end.div_ceil(group);
        let met = self.span.met(&queries, self.heads.window);
        let (prefix, own) = (self.span.prefix.clone(), self.span.own.clone());
        [(prefix.clone(), 0), (own, prefix.len())].into_iter().flat_map(move |(part, before)| {
            let met = met.clone();
            part.clone().step_by(KEYS).filter_map(move |cell| {
                let place = before + cell - part.start;
                let places = place.max(met.start)..(place + KEYS.min(part.end - cell)).min(met.end);
                let rows = cell + places.start - place..cell + places.end.saturating_sub(place);
                (!places.is_empty()).then_some(Piece { rows, first: places.start, cell })
            })
        })
    }

    /// Writes `hidden` over the scores of keys that a query does not see.
    pub fn hide(&self, piece: &Piece, scores: &mut [f32], hidden: f32) {
        // the span's first query sees the keys before `end`, and each further one a key more
        let end = self.span.visible(0, None).end;
        let column =
            |query: usize| (query * self.heads.group()).saturating_sub(self.columns.start).min(self.columns.len());
        for (key, scores) in (piece.first..).zip(scores.chunks_exact_mut(columns())) {
            scores[..column((key + 1).saturating_sub(end))].fill(hidden);
            if let Some(window) = self.heads.window {
                let last = column((key + 1 + window).saturating_sub(end));
                scores[last..self.columns.len()].fill(hidden);
            }
        }
    }
}

/// Keys of a group, and the blocks whose gradients meet there in one round.
pub struct Task<'a> {
    group: &'a [Span],
    heads: Heads,
    /// The blocks are dealt out to as many shares as there are query heads; each sums gradients of keys on its own.
    pub share: usize,
    /// Every so many blocks of the share, from this one on.
    turns: usize,
    turn: usize,
    /// Rows in which pieces have their cells.
    pub cells: Range<usize>,
}

impl<'a> Task<'a> {
    /// One round after another, whose tasks differ in share, or in both blocks and cells.
    pub fn rounds(spans: &'a [Span], groups: &[Range<usize>], heads: Heads) -> impl Iterator<Item = Vec<Self>> {
        let of_round = move |round| {
            let tasks = groups.iter().flat_map(|group| Self::of_group(&spans[group.clone()], round, heads));
            tasks.collect::<Vec<_>>()
        };
        (0..).map(of_round).take_while(|tasks| !tasks.is_empty())
    }

    /// The keys are cut into ranges, and the blocks of each share into as many turns: every round, a range meets
    /// another turn.
    fn of_group(group: &'a [Span], round: usize, heads: Heads) -> impl Iterator<Item = Self> {
        let rows = || group.iter().flat_map(|span| [&span.prefix, &span.own]).filter(|rows| !rows.is_empty());
        let start = rows().map(|rows| rows.start).min().unwrap_or(0);
        let len = rows().map(|rows| rows.end).max().map_or(0, |end| end - start);
        let turns = (len / RANGE).clamp(1, MAX_RANGES);
        let cells = move |range: usize| start + len * range / turns..start + len * (range + 1) / turns;
        let of_share = move |share| {
            let task = move |turn| Self { group, heads, share, turns, turn, cells: cells((turn + round) % turns) };
            (0..turns).map(task)
        };
        (0..heads.n).flat_map(of_share).take(if round < turns { usize::MAX } else { 0 })
    }

    /// The blocks of its turn.
    pub fn blocks(&self) -> impl Iterator<Item = Block<'a>> {
        let (heads, group) = (self.heads, self.heads.group());
        let (kv, first) = (self.share / group, self.share % group);
        let blocks = self.group.iter().flat_map(move |span| Block::all(span, kv, heads));
        blocks.skip(first + self.turn * group).step_by(group * self.turns)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::kernels::compute::Compute;

    /// What the `unsafe` of the backward pass rests on.
    #[test]
    fn tasks_of_a_round_share_nothing_and_all_rounds_meet_every_key_once() {
        let spans =
            [(0..900, 0..0), (900..1300, 0..900), (1300..1650, 0..900), (1650..1700, 0..0), (1700..1730, 1650..1700)]
                .map(|(own, prefix)| Span { queries: own.clone(), prefix, own });
        for (n, kv, window) in [(1, 1, None), (6, 2, None), (2, 2, Some(250))] {
            let heads = Heads { n, kv, dim: 4, scale: 0.5, window, cap: None, compute: Compute::F32 };
            let mut met = BTreeSet::new();
            for tasks in Task::rounds(&spans, &[0..3, 3..5], heads) {
                let (mut queries, mut keys) = (BTreeSet::new(), BTreeSet::new());
                for (number, task) in tasks.iter().enumerate() {
                    for block in task.blocks() {
                        let pieces = block.pieces().filter(|piece| task.cells.contains(&piece.cell));
                        let rows: Vec<_> = pieces.flat_map(|piece| piece.rows).collect();
                        for place in block.places() {
                            queries.insert((place, number));
                            rows.iter().for_each(|row| assert!(met.insert((place, *row)), "met twice"));
                        }
                        keys.extend(rows.iter().map(|row| (*row, task.share, number)));
                    }
                }
                let places: BTreeSet<_> = queries.iter().map(|(place, _)| place).collect();
                assert_eq!(places.len(), queries.len(), "a query of two tasks");
                let shares: BTreeSet<_> = keys.iter().map(|(row, share, _)| (row, share)).collect();
                assert_eq!(shares.len(), keys.len(), "a share of a key of two tasks");
            }
            let blocks = || spans.iter().flat_map(|span| (0..kv).flat_map(move |kv| Block::all(span, kv, heads)));
            let pairs = |block: Block| {
                let keys: usize = block.pieces().map(|piece| piece.rows.len()).sum();
                block.columns.len() * keys
            };
            assert_eq!(met.len(), blocks().map(pairs).sum::<usize>());
        }
    }
}
