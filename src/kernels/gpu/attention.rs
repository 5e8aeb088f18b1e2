//! Attention on a GPU: cuts queries and keys into the blocks that threadgroups
//! take, and says which queries see which keys.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::launch::{Launch, run};
use crate::kernels::{
    attention::{Attended, Heads, Span},
    profile::{Part, Timed},
};

/// Simdgroups of a threadgroup.
const SIMDS: usize = 8;

/// The kernels for a head's size: their names' end, and rows that a threadgroup takes at once.
struct Size {
    forward: &'static str,
    dq: &'static str,
    dkv: &'static str,
    rows: usize,
}

const SIZES: [(usize, Size); 3] = [
    (64, Size { forward: "attention_64", dq: "attention_dq_64", dkv: "attention_dkv_64", rows: 4 * SIMDS }),
    (128, Size { forward: "attention_128", dq: "attention_dq_128", dkv: "attention_dkv_128", rows: 4 * SIMDS }),
    (256, Size { forward: "attention_256", dq: "attention_dq_256", dkv: "attention_dkv_256", rows: 2 * SIMDS }),
];

fn size(heads: Heads) -> Option<&'static Size> {
    SIZES.iter().find(|(dim, _)| heads.dim <= *dim).map(|(_, size)| size)
}

/// Whether there is a kernel for heads of this size.
#[cfg(any(feature = "cuda", feature = "metal"))]
pub fn takes(heads: Heads) -> bool {
    size(heads).is_some()
}

/// See [`crate::kernels::attention::attention`]; the tensors fit each other.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, spans: &[Span], heads: Heads) -> Result<Attended> {
    let _timed = Timed::start(Part::Attention);
    let size = sized(heads)?;
    let blocks = query_blocks(spans, size.rows);
    let values = Tensor::zeros((q.dim(0)?, heads.n * heads.dim), q.dtype(), q.device())?;
    let lse = Tensor::zeros((q.dim(0)?, heads.n), q.dtype(), q.device())?;
    let groups = [blocks.len() / QUERY_BLOCK, heads.n, 1];
    let launch = Launch { kernel: size.forward, groups, words: &words(heads, q)? };
    run(&launch, &[q, k, v, &table(blocks, q)?], &[&values, &lse])?;
    Ok(Attended { values, lse })
}

/// See [`crate::kernels::attention::attention_backward`]; the tensors fit each other.
pub fn attention_backward(
    [q, k, v]: [&Tensor; 3],
    out: &Attended,
    d_values: &Tensor,
    spans: &[Span],
    heads: Heads,
) -> Result<[Tensor; 3]> {
    let _timed = Timed::start(Part::Attention);
    let size = sized(heads)?;
    let (queries, keys) = (q.dim(0)?, k.dim(0)?);
    let words = words(heads, q)?;
    let zeros = |like: &Tensor| Tensor::zeros(like.dims(), like.dtype(), like.device());
    let (dq, dk, dv, delta) = (zeros(q)?, zeros(k)?, zeros(v)?, zeros(&out.lse)?);

    let groups = [(queries * heads.n).div_ceil(SIMDS), 1, 1];
    run(&Launch { kernel: "attention_delta", groups, words: &words }, &[&out.values, d_values], &[&delta])?;

    let inputs = [q, k, v, d_values, &out.lse, &delta];
    let blocks = query_blocks(spans, size.rows);
    let groups = [blocks.len() / QUERY_BLOCK, heads.n, 1];
    let blocks = table(blocks, q)?;
    run(&Launch { kernel: size.dq, groups, words: &words }, &[&inputs[..], &[&blocks]].concat(), &[&dq])?;

    let (blocks, meetings) = key_blocks(spans, keys, size.rows, heads.window);
    let groups = [blocks.len() / KEY_BLOCK, heads.kv, 1];
    let (blocks, meetings) = (table(blocks, q)?, table(meetings, q)?);
    let launch = Launch { kernel: size.dkv, groups, words: &words };
    run(&launch, &[&inputs[..], &[&blocks, &meetings]].concat(), &[&dk, &dv])?;
    Ok([dq, dk, dv])
}

fn sized(heads: Heads) -> Result<&'static Size> {
    size(heads).ok_or_else(|| candle_core::Error::Msg(format!("no attention kernel for {heads:?}")))
}

/// The fields of `AttentionShape`.
fn words(heads: Heads, q: &Tensor) -> Result<[u32; 7]> {
    let window = heads.window.map_or(u32::MAX, |window| window.min(u32::MAX as usize) as u32);
    let (scale, cap) = (heads.scale as f32, heads.cap.unwrap_or(0.0) as f32);
    let rows = q.dim(0)? * heads.n;
    Ok([heads.n as u32, heads.kv as u32, heads.dim as u32, window, scale.to_bits(), cap.to_bits(), rows as u32])
}

/// A table of 32-bit numbers where the tensors are. Never empty: Metal knows no empty buffer.
fn table(mut words: Vec<u32>, like: &Tensor) -> Result<Tensor> {
    if words.is_empty() {
        words.push(0);
    }
    let n = words.len();
    Tensor::from_vec(words, n, like.device())
}

/// Words of a `QueryBlock`.
const QUERY_BLOCK: usize = 6;

/// The spans' queries, `rows` at a time.
fn query_blocks(spans: &[Span], rows: usize) -> Vec<u32> {
    let mut blocks = Vec::new();
    for span in spans {
        let (n, seen) = (span.queries.len(), span.prefix.len() + span.own.len());
        for start in (0..n).step_by(rows) {
            let block = [
                span.queries.start + start,
                rows.min(n - start),
                span.prefix.start,
                span.prefix.len(),
                span.own.start,
                seen - (n - 1 - start),
            ];
            blocks.extend(block.map(|word| word as u32));
        }
    }
    blocks
}

/// Words of a `KeyBlock`.
const KEY_BLOCK: usize = 4;
/// Words of a `Meeting`.
const MEETING: usize = 4;

/// All keys, `rows` at a time, no block across a border of what some span sees; and for each block the queries that see it.
fn key_blocks(spans: &[Span], keys: usize, rows: usize, window: Option<usize>) -> (Vec<u32>, Vec<u32>) {
    let parts = |span: &Span| [span.prefix.clone(), span.own.clone()];
    let mut borders: Vec<usize> =
        spans.iter().flat_map(parts).flat_map(|part| [part.start, part.end]).chain([0, keys]).collect();
    borders.sort_unstable();
    borders.dedup();
    let (mut blocks, mut meetings) = (Vec::new(), Vec::new());
    for pair in borders.windows(2) {
        for start in (pair[0]..pair[1]).step_by(rows) {
            let block = start..pair[1].min(start + rows);
            let first = meetings.len() / MEETING;
            for span in spans {
                for (part, before) in parts(span).into_iter().zip([0, span.prefix.len()]) {
                    if part.start <= block.start && block.end <= part.end {
                        let at = before + block.start - part.start;
                        meetings.extend(meeting(span, at..at + block.len(), window).into_iter().flatten());
                    }
                }
            }
            let end = meetings.len() / MEETING;
            blocks.extend([block.start, block.len(), first, end].map(|word| word as u32));
        }
    }
    (blocks, meetings)
}

/// The queries of a span that see some of its keys `at`, counted prefix first.
fn meeting(span: &Span, at: Range<usize>, window: Option<usize>) -> Option<[u32; MEETING]> {
    let n = span.queries.len();
    // query i sees the keys before `more + i`
    let more = span.prefix.len() + span.own.len() + 1 - n;
    let first = (at.start + 1).saturating_sub(more);
    let end = window.map_or(n, |window| n.min((at.end + window).saturating_sub(more)));
    (first < end).then(|| [span.queries.start + first, end - first, at.start, more + first].map(|word| word as u32))
}

#[cfg(test)]
mod tests {
    use super::{super::host::on, *};
    use crate::kernels::{
        attention as cpu,
        oracle::{random, worst},
    };

    fn spans<const N: usize>(parts: [(Range<usize>, Range<usize>); N]) -> Vec<Span> {
        parts.map(|(own, prefix)| Span { queries: own.clone(), prefix, own }).to_vec()
    }

    fn holds(spans: &[Span], groups: &[Range<usize>], rows: usize, heads: Heads) -> Result<()> {
        let [q, k, v, d] = [(heads.n, 1), (heads.kv, 2), (heads.kv, 3), (heads.n, 4)]
            .map(|(n, seed)| (random((rows, n * heads.dim), seed) * 2.0).unwrap());
        on([&q, &k, &v, &d], |[q_there, k_there, v_there, d_there]| {
            let ours = attention(q_there, k_there, v_there, spans, heads)?;
            let theirs = cpu::attention(&q, &k, &v, spans, heads)?;
            assert!(worst(&ours.values, &theirs.values) < 5e-6, "{heads:?}: {}", worst(&ours.values, &theirs.values));
            assert!(worst(&ours.lse, &theirs.lse) < 5e-6, "{heads:?}");
            let ours = attention_backward([q_there, k_there, v_there], &ours, d_there, spans, heads)?;
            let theirs = cpu::attention_backward([&q, &k, &v], &theirs, &d, spans, groups, heads)?;
            for (i, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                assert!(worst(ours, theirs) < 5e-5, "gradient {i} of {heads:?}: {}", worst(ours, theirs));
            }
            Ok(())
        })
    }

    #[test]
    fn equals_the_cpus_forward_and_backward() -> Result<()> {
        // two pairs: prompt, chosen, rejected each; the second with a prompt of one token and an answer of one
        let spans = spans([(0..70, 0..0), (70..130, 0..70), (130..133, 0..70), (133..134, 0..0), (134..135, 133..134)]);
        for (n, kv, dim, window, cap) in [
            (4, 2, 8, None, None),
            (3, 3, 64, Some(5), None),
            (6, 1, 20, Some(64), Some(1.5)),
            (2, 1, 65, None, Some(2.0)),
            (2, 2, 80, Some(33), None),
            (2, 1, 128, Some(1), None),
            (2, 1, 136, None, None),
            (1, 1, 192, Some(40), Some(1.0)),
            (2, 1, 256, None, None),
        ] {
            let scale = 1.0 / (dim as f64).sqrt();
            holds(&spans, &[0..3, 3..5], 135, Heads { n, kv, dim, scale, window, cap })?;
        }
        Ok(())
    }

    #[test]
    fn blocks_of_every_length_equal_the_cpus() -> Result<()> {
        for (prompt, chosen, rejected) in [(1, 1, 1), (31, 32, 33), (64, 1, 95), (32, 96, 2)] {
            let (a, b) = (prompt + chosen, prompt + chosen + rejected);
            let spans = spans([(0..prompt, 0..0), (prompt..a, 0..prompt), (a..b, 0..prompt)]);
            for window in [None, Some(31), Some(32), Some(1000)] {
                let heads = Heads { n: 2, kv: 1, dim: 16, scale: 0.3, window, cap: None };
                holds(&spans, std::slice::from_ref(&(0..3)), b, heads)?;
            }
        }
        Ok(())
    }

    #[test]
    fn fewer_queries_than_keys_and_rows_of_no_span_equal_the_cpus() -> Result<()> {
        // generation: the last queries of what was seen; rows 0..2 are nobody's queries, 40..43 nobody's keys
        let spans =
            vec![Span { queries: 2..5, prefix: 0..0, own: 0..40 }, Span { queries: 5..6, prefix: 3..9, own: 43..44 }];
        let heads = Heads { n: 4, kv: 2, dim: 12, scale: 0.3, window: Some(20), cap: None };
        let [q, k, v, d] =
            [(6, 48, 1), (44, 24, 2), (44, 24, 3), (6, 48, 4)].map(|(rows, width, seed)| random((rows, width), seed));
        on([&q, &k, &v, &d], |[q_there, k_there, v_there, d_there]| {
            let (ours, theirs) =
                (attention(q_there, k_there, v_there, &spans, heads)?, cpu::attention(&q, &k, &v, &spans, heads)?);
            assert!(worst(&ours.values, &theirs.values) < 5e-6 && worst(&ours.lse, &theirs.lse) < 5e-6);
            let ours = attention_backward([q_there, k_there, v_there], &ours, d_there, &spans, heads)?;
            // both spans see the keys 3..9: one run
            let theirs =
                cpu::attention_backward([&q, &k, &v], &theirs, &d, &spans, std::slice::from_ref(&(0..2)), heads)?;
            for (ours, theirs) in ours.iter().zip(&theirs) {
                assert!(worst(ours, theirs) < 2e-5);
            }
            Ok(())
        })
    }

    #[test]
    fn every_key_is_met_by_the_queries_that_see_it() {
        let spans = spans([(0..70, 0..0), (70..130, 0..70), (130..133, 0..70)]);
        for window in [None, Some(1), Some(40)] {
            let (blocks, meetings) = key_blocks(&spans, 133, 32, window);
            let mut met = std::collections::BTreeSet::new();
            for block in blocks.chunks(KEY_BLOCK) {
                for meeting in meetings[block[2] as usize * MEETING..block[3] as usize * MEETING].chunks(MEETING) {
                    for (i, j) in (0..meeting[1]).flat_map(|i| (0..block[1]).map(move |j| (i, j))) {
                        let (end, key) = (meeting[3] + i, meeting[2] + j);
                        if key < end && window.is_none_or(|window| (end - key) as usize <= window) {
                            assert!(met.insert((meeting[0] + i, block[0] + j)), "met twice");
                        }
                    }
                }
            }
            let sees = |query: u32, key: u32| {
                let (place, key_place) = match query {
                    0..70 => (query, key),
                    70..130 => (query, key),
                    _ => (query - 60, if key < 70 { key } else { key.wrapping_sub(60) }),
                };
                let own = if query < 70 {
                    0..70
                } else if query < 130 {
                    70..130
                } else {
                    130..133
                };
                (key < 70 || own.contains(&key))
                    && key_place <= place
                    && window.is_none_or(|w| ((place - key_place) as usize) < w)
            };
            for (query, key) in (0..133).flat_map(|query| (0..133).map(move |key| (query, key))) {
                assert_eq!(met.contains(&(query, key)), sees(query, key), "{query} {key} {window:?}");
            }
        }
    }
}
