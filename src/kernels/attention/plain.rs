//! The same in candle's operations, for devices without a kernel of ours and as the kernel's test.

use std::ops::Range;

use candle_core::{D, Device, Result, Tensor};

use super::{Attended, Heads, Span};

/// A span's queries, keys and values by head, and what hides unseen keys.
struct Parts {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
}

fn parts(q: &Tensor, k: &Tensor, v: &Tensor, span: &Span, heads: Heads) -> Result<Parts> {
    let rows = |x: &Tensor, range: &Range<usize>| x.narrow(0, range.start, range.len());
    let by_head = |x: Tensor, n: usize| x.reshape((x.dim(0)?, n, heads.dim))?.transpose(0, 1)?.contiguous();
    // each key head stands once for every query head that it serves
    let repeat = |x: Tensor| {
        let (kv, keys, dim) = x.dims3()?;
        x.unsqueeze(1)?.expand((kv, heads.group(), keys, dim))?.reshape((heads.n, keys, dim))
    };
    let joined = |x: &Tensor| match span.prefix.is_empty() {
        true => rows(x, &span.own),
        false => Tensor::cat(&[rows(x, &span.prefix)?, rows(x, &span.own)?], 0),
    };
    let keys = span.prefix.len() + span.own.len();
    let mask: Vec<f32> = (0..span.queries.len())
        .flat_map(|i| {
            let seen = span.visible(i, heads.window);
            (0..keys).map(move |j| if seen.contains(&j) { 0.0 } else { f32::NEG_INFINITY })
        })
        .collect();
    Ok(Parts {
        q: by_head(rows(q, &span.queries)?, heads.n)?,
        k: repeat(by_head(joined(k)?, heads.kv)?)?.contiguous()?,
        v: repeat(by_head(joined(v)?, heads.kv)?)?.contiguous()?,
        mask: Tensor::from_vec(mask, (1, span.queries.len(), keys), &Device::Cpu)?.to_device(q.device())?,
    })
}

/// Scaled and capped scores, before they are hidden.
fn open_scores(parts: &Parts, heads: Heads) -> Result<Tensor> {
    let scores = (parts.q.matmul(&parts.k.t()?.contiguous()?)? * heads.scale)?;
    match heads.cap {
        Some(cap) => (scores / cap)?.tanh()? * cap,
        None => Ok(scores),
    }
}

fn scores(parts: &Parts, heads: Heads) -> Result<Tensor> {
    open_scores(parts, heads)?.broadcast_add(&parts.mask)
}

fn rejoin(x: &Tensor) -> Result<Tensor> {
    let (n, rows, dim) = x.dims3()?;
    x.transpose(0, 1)?.contiguous()?.reshape((rows, n * dim))
}

pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, spans: &[Span], heads: Heads) -> Result<Attended> {
    let values = Tensor::zeros((q.dim(0)?, heads.width()), q.dtype(), q.device())?;
    let lse = Tensor::zeros((q.dim(0)?, heads.n), q.dtype(), q.device())?;
    for span in spans {
        let parts = parts(q, k, v, span, heads)?;
        let scores = scores(&parts, heads)?;
        let log_sums = scores.log_sum_exp(D::Minus1)?;
        let weights = scores.broadcast_sub(&log_sums.unsqueeze(D::Minus1)?)?.exp()?;
        values.slice_set(&rejoin(&weights.matmul(&parts.v)?)?, 0, span.queries.start)?;
        lse.slice_set(&log_sums.t()?.contiguous()?, 0, span.queries.start)?;
    }
    Ok(Attended { values, lse })
}

pub fn attention_backward(
    [q, k, v]: [&Tensor; 3],
    out: &Attended,
    d_values: &Tensor,
    spans: &[Span],
    heads: Heads,
) -> Result<[Tensor; 3]> {
    let (dq, dk, dv) = (q.zeros_like()?, k.zeros_like()?, v.zeros_like()?);
    // the query heads of a group add up in their key head
    let gather = |x: Tensor| {
        let (n, keys, dim) = x.dims3()?;
        rejoin(&x.reshape((n / heads.group(), heads.group(), keys, dim))?.sum(1)?)
    };
    let add = |to: &Tensor, rows: &Range<usize>, x: &Tensor, from: usize| {
        if rows.is_empty() {
            return Ok(());
        }
        let sum = (to.narrow(0, rows.start, rows.len())? + x.narrow(0, from, rows.len())?)?;
        to.slice_set(&sum, 0, rows.start)
    };
    let by_head = |x: &Tensor, span: &Span| {
        let rows = x.narrow(0, span.queries.start, span.queries.len())?;
        rows.reshape((rows.dim(0)?, heads.n, ()))?.transpose(0, 1)?.contiguous()
    };
    for span in spans {
        let parts = parts(q, k, v, span, heads)?;
        let open = open_scores(&parts, heads)?;
        let weights = open.broadcast_add(&parts.mask)?.broadcast_sub(&by_head(&out.lse, span)?)?.exp()?;
        let d_out = by_head(d_values, span)?;
        let delta = (&d_out * by_head(&out.values, span)?)?.sum_keepdim(D::Minus1)?;
        let d_weights = d_out.matmul(&parts.v.t()?.contiguous()?)?;
        let mut d_scores = ((&weights * d_weights.broadcast_sub(&delta)?)? * heads.scale)?;
        if let Some(cap) = heads.cap {
            d_scores = (d_scores * (1.0 - (open / cap)?.sqr()?)?)?;
        }
        dq.slice_set(&rejoin(&d_scores.matmul(&parts.k)?)?, 0, span.queries.start)?;
        let dk_span = gather(d_scores.t()?.contiguous()?.matmul(&parts.q)?)?;
        let dv_span = gather(weights.t()?.contiguous()?.matmul(&d_out)?)?;
        for (to, x) in [(&dk, &dk_span), (&dv, &dv_span)] {
            add(to, &span.prefix, x, 0)?;
            add(to, &span.own, x, span.prefix.len())?;
        }
    }
    Ok([dq, dk, dv])
}
