//! Attention on a GPU: cuts queries and keys into the blocks that threadgroups
//! take, and says which queries see which keys.

use std::ops::Range;

use candle_core::{DType, Result, Tensor};

use super::launch::{Launch, a_thread_each, room, run};
use crate::kernels::{
    attention::{Attended, Heads, Span},
    compute::Compute,
    profile::{Part, Timed},
};

/// Simdgroups of a threadgroup.
const SIMDS: usize = 8;

/// The kernels for a head's size.
struct Size {
    /// Coordinates at most.
    dim: usize,
    /// A kernel, and the columns of its result that a threadgroup gives.
    forward: (&'static str, usize),
    dq: (&'static str, usize),
    dkv: (&'static str, usize),
    /// Rows that a threadgroup takes at once.
    rows: usize,
    /// What the kernels read q, k, v and the values' gradient in.
    dtype: DType,
}

const fn plain(dim: usize, [forward, dq, dkv]: [&'static str; 3], rows: usize) -> Size {
    Size { dim, forward: (forward, dim), dq: (dq, dim), dkv: (dkv, dim), rows, dtype: DType::F32 }
}

const fn on_matrix_unit(dim: usize, [forward, dq, dkv]: [&'static str; 3], [out, key_out]: [usize; 2]) -> Size {
    Size { dim, forward: (forward, out), dq: (dq, out), dkv: (dkv, key_out), rows: 16 * SIMDS, dtype: DType::BF16 }
}

const PLAIN: [Size; 3] = [
    plain(64, ["attention_64", "attention_dq_64", "attention_dkv_64"], 4 * SIMDS),
    plain(128, ["attention_128", "attention_dq_128", "attention_dkv_128"], 4 * SIMDS),
    plain(256, ["attention_256", "attention_dq_256", "attention_dkv_256"], 2 * SIMDS),
];

/// With the columns that a threadgroup gives, as `cuda/attention_bf16.cu` has them.
const ON_MATRIX_UNIT: [Size; 3] = [
    on_matrix_unit(64, ["attention_bf16_64", "attention_dq_bf16_64", "attention_dkv_bf16_64"], [64, 64]),
    on_matrix_unit(128, ["attention_bf16_128", "attention_dq_bf16_128", "attention_dkv_bf16_128"], [128, 128]),
    on_matrix_unit(256, ["attention_bf16_256", "attention_dq_bf16_256", "attention_dkv_bf16_256"], [128, 64]),
];

fn size(heads: Heads) -> Option<&'static Size> {
    // rows of heads are read in pieces of eight numbers
    let on_matrix_unit = heads.compute == Compute::Bf16 && heads.dim.is_multiple_of(8) && has_matrix_unit();
    let sizes = if on_matrix_unit { &ON_MATRIX_UNIT } else { &PLAIN };
    sizes.iter().find(|size| heads.dim <= size.dim)
}

/// Whether the kernels on the matrix unit are there: CUDA's are.
fn has_matrix_unit() -> bool {
    #[cfg(test)]
    return super::host::knows_bf16();
    #[cfg(not(test))]
    return cfg!(feature = "cuda");
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
    let (kernel, columns) = size.forward;
    let groups = [blocks.len() / QUERY_BLOCK, heads.n, heads.dim.div_ceil(columns)];
    let launch = Launch { kernel, groups, words: &words(heads, q)? };
    let (q, k, v) = (q.to_dtype(size.dtype)?, k.to_dtype(size.dtype)?, v.to_dtype(size.dtype)?);
    run(&launch, &[&q, &k, &v, &table(blocks, &q)?], &[&values, &lse])?;
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

    let sides = [q, k, v, d_values].map(|side| side.to_dtype(size.dtype));
    let [q, k, v, d_values] = sides;
    let (q, k, v, d_values) = (q?, k?, v?, d_values?);
    let inputs = [&q, &k, &v, &d_values, &out.lse, &delta];
    let blocks = query_blocks(spans, size.rows);
    let (kernel, columns) = size.dq;
    let groups = [blocks.len() / QUERY_BLOCK, heads.n, heads.dim.div_ceil(columns)];
    let blocks = table(blocks, &q)?;
    run(&Launch { kernel, groups, words: &words }, &[&inputs[..], &[&blocks]].concat(), &[&dq])?;

    let (blocks, meetings) = key_blocks(spans, keys, size.rows, heads.window);
    let n = blocks.len() / KEY_BLOCK;
    let (blocks, meetings) = (table(blocks, &q)?, table(meetings, &q)?);
    let (kernel, columns) = size.dkv;
    let parts = heads.dim.div_ceil(columns);
    if size.dtype == DType::F32 {
        let launch = Launch { kernel, groups: [n, heads.kv, parts], words: &words };
        run(&launch, &[&inputs[..], &[&blocks, &meetings]].concat(), &[&dk, &dv])?;
        return Ok([dq, dk, dv]);
    }
    // on the matrix unit every query head is a task of its own, so that there are enough of them
    let (lse, delta) = (out.lse.t()?.contiguous()?, delta.t()?.contiguous()?);
    let launch = Launch { kernel, groups: [n, heads.n, parts], words: &words };
    let inputs = [&q, &k, &v, &d_values, &lse, &delta, &blocks, &meetings];
    if heads.n == heads.kv {
        run(&launch, &inputs, &[&dk, &dv])?;
        return Ok([dq, dk, dv]);
    }
    let shares = || room((keys, heads.n * heads.dim), &dk);
    let (k_shares, v_shares) = (shares()?, shares()?);
    run(&launch, &inputs, &[&k_shares, &v_shares])?;
    let words = [dk.elem_count() as u32, (heads.n / heads.kv) as u32, heads.dim as u32];
    let launch = Launch { kernel: "attention_shares", groups: a_thread_each(dk.elem_count()), words: &words };
    run(&launch, &[&k_shares, &v_shares], &[&dk, &dv])?;
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

/// All keys, `rows` at a time, no block across a border of what some span sees; and for each block the queries that see
/// it.
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
    use candle_core::Device;

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
            holds(&spans, &[0..3, 3..5], 135, Heads { n, kv, dim, scale, window, cap, compute: Compute::F32 })?;
        }
        Ok(())
    }

    #[test]
    fn a_query_that_is_no_number_makes_none_under_a_cap() -> Result<()> {
        let spans = spans([(0..5, 0..0)]);
        let row = Tensor::full(f32::NAN, (1, 16), &Device::Cpu)?;
        for compute in [Compute::F32, Compute::Bf16] {
            let heads = Heads { n: 2, kv: 1, dim: 8, scale: 0.3, window: None, cap: Some(1.5), compute };
            let [q, k, v] = [(16, 1), (8, 2), (8, 3)].map(|(width, seed)| random((5, width), seed));
            let q = q.slice_assign(&[3..4, 0..16], &row)?;
            on([&q, &k, &v], |[q, k, v]| {
                let Attended { values, lse } = attention(q, k, v, &spans, heads)?;
                for rows in [values, lse] {
                    let finite: Vec<bool> =
                        rows.to_vec2::<f32>()?.iter().map(|row| row.iter().all(|x| x.is_finite())).collect();
                    assert_eq!(finite, [true, true, true, false, true], "{compute:?}");
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    #[test]
    fn blocks_of_every_length_equal_the_cpus() -> Result<()> {
        for (prompt, chosen, rejected) in [(1, 1, 1), (31, 32, 33), (64, 1, 95), (32, 96, 2)] {
            let (a, b) = (prompt + chosen, prompt + chosen + rejected);
            let spans = spans([(0..prompt, 0..0), (prompt..a, 0..prompt), (a..b, 0..prompt)]);
            for window in [None, Some(31), Some(32), Some(1000)] {
                let heads = Heads { n: 2, kv: 1, dim: 16, scale: 0.3, window, cap: None, compute: Compute::F32 };
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
        let heads = Heads { n: 4, kv: 2, dim: 12, scale: 0.3, window: Some(20), cap: None, compute: Compute::F32 };
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

    /// How far apart two are, relative to the second's size.
    fn apart(ours: &Tensor, theirs: &Tensor) -> Result<f64> {
        let norm = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f32>().map(|sum| f64::from(sum).sqrt());
        Ok(norm(&(ours.to_device(&Device::Cpu)? - theirs)?)? / norm(theirs)?)
    }

    #[test]
    fn on_the_matrix_unit_equals_the_cpus_to_a_rounding_of_the_weights() -> Result<()> {
        // blocks of queries and of keys that are full, and others
        let spans =
            spans([(0..130, 0..0), (130..150, 0..130), (150..153, 0..130), (153..154, 0..0), (154..155, 153..154)]);
        for (n, kv, dim, window, cap) in [
            (4, 2, 64, None, None),
            (3, 3, 8, Some(5), None),
            (2, 1, 72, Some(64), Some(1.5)),
            (2, 1, 128, Some(140), Some(2.0)),
            (2, 1, 136, Some(33), None),
        ] {
            let heads = Heads { n, kv, dim, scale: 1.0 / (dim as f64).sqrt(), window, cap, compute: Compute::Bf16 };
            let rounded = |(n, seed)| (random((155, n * dim), seed) * 2.0)?.to_dtype(DType::BF16)?.to_dtype(DType::F32);
            let [q, k, v, d] = [(n, 1), (kv, 2), (kv, 3), (n, 4)].map(|side| rounded(side).unwrap());
            on([&q, &k, &v, &d], |[q_there, k_there, v_there, d_there]| {
                let ours = attention(q_there, k_there, v_there, &spans, heads)?;
                let theirs = cpu::attention(&q, &k, &v, &spans, heads)?;
                let lse = worst(&ours.lse, &theirs.lse);
                assert!(lse < 5e-6, "{heads:?}: {lse}");
                let values = apart(&ours.values, &theirs.values)?;
                assert!(values < 3e-3, "{heads:?}: {values}");
                let ours = attention_backward([q_there, k_there, v_there], &ours, d_there, &spans, heads)?;
                let theirs = cpu::attention_backward([&q, &k, &v], &theirs, &d, &spans, &[0..3, 3..5], heads)?;
                for (i, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                    let gradient = apart(ours, theirs)?;
                    assert!(gradient < 5e-3, "gradient {i} of {heads:?}: {gradient}");
                }
                Ok(())
            })?;
        }
        Ok(())
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
