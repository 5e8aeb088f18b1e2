//! Attention against plain tensors, autograd and itself in other orders.

use candle_core::{D, Device};

use super::{
    blocks::Block,
    cpu::{Grads, Shared, Side},
    *,
};
use crate::kernels::oracle::{gradients_hold, random};

fn close(a: &Tensor, b: &Tensor, tolerance: f32) {
    let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(difference < tolerance, "differ by {difference}");
}

#[test]
fn kernel_equals_plain_tensors_forward_and_backward() {
    // pairs: prompt, chosen, rejected; the second with a prompt of one token and an answer of one, the third of so
    // many keys that they are cut into ranges
    let of_two = [(0..70, 0..0), (70..130, 0..70), (130..133, 0..70), (133..134, 0..0), (134..135, 133..134)];
    let long = [(135..935, 0..0), (935..1460, 135..935), (1460..1473, 135..935)];
    let spans: Vec<_> =
        of_two.into_iter().chain(long).map(|(own, prefix)| Span { queries: own.clone(), prefix, own }).collect();
    let groups = [0..3, 3..5, 5..8];
    for (n, kv, window, cap) in
        [(4, 2, None, None), (3, 3, Some(5), None), (6, 1, Some(64), Some(1.5)), (9, 3, Some(300), None)]
    {
        let heads = Heads { n, kv, dim: 8, scale: 0.35, window, cap, compute: Compute::F32 };
        let random = |width: usize| Tensor::randn(0f32, 1.0, (1473, width), &Device::Cpu).unwrap();
        let (q, k, v, d) = (random(n * 8), random(kv * 8), random(kv * 8), random(n * 8));
        let ours = attention(&q, &k, &v, &spans, heads).unwrap();
        let theirs = plain::attention(&q, &k, &v, &spans, heads).unwrap();
        close(&ours.values, &theirs.values, 2e-6);
        close(&ours.lse, &theirs.lse, 2e-6);
        let ours = attention_backward([&q, &k, &v], &ours, &d, &spans, &groups, heads).unwrap();
        let theirs = plain::attention_backward([&q, &k, &v], &theirs, &d, &spans, heads).unwrap();
        for (ours, theirs) in ours.iter().zip(&theirs) {
            close(ours, theirs, 2e-5);
        }
    }
}

/// One head of a long pair has tasks for several threads, whose number does not show.
#[test]
fn one_head_gives_the_same_bits_at_any_number_of_threads() {
    let spans = [(0..900, 0..0), (900..1300, 0..900), (1300..1650, 0..900)].map(|(own, prefix)| Span {
        queries: own.clone(),
        prefix,
        own,
    });
    for window in [None, Some(250)] {
        let heads = Heads { n: 1, kv: 1, dim: 4, scale: 0.5, window, cap: None, compute: Compute::F32 };
        let tensors = [1, 2, 3, 4].map(|seed| random((1650, 4), seed));
        let bits = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let [q, k, v, d] = &tensors;
                let out = attention(q, k, v, &spans, heads).unwrap();
                let grads = attention_backward([q, k, v], &out, d, &spans, std::slice::from_ref(&(0..3)), heads);
                grads.unwrap().map(|grad| grad.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            })
        };
        let [one, five] = [1, 5].map(bits);
        assert_eq!(one, five, "{window:?}");
    }
}

/// What attention's tasks write, without rayon between them: Miri objects to the pool's own code under its default
/// rules. Heads of one matrix are written by two threads at once, to the bits that one thread alone writes.
#[test]
fn heads_side_by_side_touch_their_own_numbers_alone() {
    let spans =
        [(0..3, 0..0), (3..5, 0..3), (5..6, 0..3)].map(|(own, prefix)| Span { queries: own.clone(), prefix, own });
    let heads = Heads { n: 2, kv: 2, dim: 3, scale: 0.5, window: None, cap: None, compute: Compute::F32 };
    let [q, k, v, values, d_values] =
        [1, 2, 3, 4, 5].map(|seed| -> Vec<f32> { random((6, 6), seed).flatten_all().unwrap().to_vec1().unwrap() });
    let lse = [0.5f32; 12];
    let side = Side { q: &q, k: &k, v: &v, heads };
    let run = |at_once: bool| {
        let mut results = [(); 4].map(|()| vec![0f32; 36]);
        let mut log_sums = [0f32; 12];
        let [mixed, dq, dk, dv] = results.each_mut().map(|result| Shared(result.as_mut_ptr()));
        let (out, grads) = ([mixed, Shared(log_sums.as_mut_ptr())], Grads { dq, dk, dv });
        let work = |head: usize| {
            for block in spans.iter().flat_map(|span| Block::all(span, head, heads)) {
                // SAFETY: these rows of this head are this thread's alone.
                unsafe {
                    side.attend(&block, &out);
                    side.block_backward(&block, head, &(0..6), [&values, &lse, &d_values], &grads);
                }
            }
        };
        match at_once {
            true => std::thread::scope(|scope| {
                scope.spawn(|| work(0));
                work(1);
            }),
            false => (0..2).for_each(work),
        }
        results
    };
    let results = run(true);
    assert_eq!(results, run(false));
    assert!(results.iter().flatten().all(|x| *x != 0.0), "every element is written: {results:?}");
}

/// The same through the pool.
#[test]
fn a_few_heads_through_the_pool() {
    let spans =
        [(0..2, 0..0), (2..4, 0..2), (4..5, 0..0)].map(|(own, prefix)| Span { queries: own.clone(), prefix, own });
    let heads = Heads { n: 4, kv: 2, dim: 3, scale: 0.5, window: None, cap: None, compute: Compute::F32 };
    let (q, k, v, dy) = (random((5, 12), 1), random((5, 6), 2), random((5, 6), 3), random((5, 12), 4));
    let ours = attention(&q, &k, &v, &spans, heads).unwrap();
    let theirs = plain::attention(&q, &k, &v, &spans, heads).unwrap();
    close(&ours.values, &theirs.values, 1e-6);
    close(&ours.lse, &theirs.lse, 1e-6);
    let ours = attention_backward([&q, &k, &v], &ours, &dy, &spans, &[0..2, 2..3], heads).unwrap();
    let theirs = plain::attention_backward([&q, &k, &v], &theirs, &dy, &spans, heads).unwrap();
    for (ours, theirs) in ours.iter().zip(&theirs) {
        close(ours, theirs, 1e-5);
    }
}

#[test]
fn backward_holds() {
    // a prompt of 5 and two answers, a prompt of 1 and an answer
    let spans = [(0..5, 0..0), (5..9, 0..5), (9..10, 0..5), (10..11, 0..0), (11..14, 10..11)]
        .map(|(own, prefix)| Span { queries: own.clone(), prefix, own });
    let position = [0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 0, 1, 2, 3usize];
    for (n, kv, window, cap) in [(4, 2, None, None), (2, 2, Some(3), None), (4, 2, Some(3), Some(0.4))] {
        let heads = Heads { n, kv, dim: 4, scale: 0.5, window, cap, compute: Compute::F32 };
        let hidden = |(i, j): (usize, usize)| {
            let span = spans.iter().find(|span| span.own.contains(&i)).unwrap();
            let seen = span.prefix.contains(&j) || (span.own.contains(&j) && j <= i);
            if seen && window.is_none_or(|window| position[i] - position[j] < window) { 0.0 } else { -1e30 }
        };
        let mask: Vec<f64> = (0..14 * 14).map(|at| hidden((at / 14, at % 14))).collect();
        let mask = Tensor::from_vec(mask, (1, 14, 14), &Device::Cpu).unwrap();
        let form = |[q, k, v]: [&Tensor; 3]| {
            let by_head = |x: &Tensor, n: usize| x.reshape((14, n, 4))?.transpose(0, 1)?.contiguous();
            let serving = Tensor::from_iter((0..n as u32).map(|h| h * kv as u32 / n as u32), &Device::Cpu)?;
            let repeat = |x: Tensor| x.index_select(&serving, 0);
            let (q, k, v) = (by_head(q, n)?, repeat(by_head(k, kv)?)?, repeat(by_head(v, kv)?)?);
            let mut scores = (q.matmul(&k.t()?.contiguous()?)? * 0.5)?;
            if let Some(cap) = cap {
                scores = ((scores / cap)?.tanh()? * cap)?;
            }
            let values = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?.matmul(&v)?;
            values.transpose(0, 1)?.contiguous()?.reshape((14, n * 4))
        };
        let (q, k, v) = (random((14, n * 4), 1), random((14, kv * 4), 2), random((14, kv * 4), 3));
        let dy = random((14, n * 4), 4);
        let attended = attention(&q, &k, &v, &spans, heads).unwrap();
        let [dq, dk, dv] = attention_backward([&q, &k, &v], &attended, &dy, &spans, &[0..3, 3..5], heads).unwrap();
        gradients_hold([&dq, &dk, &dv], [&q, &k, &v], &dy, form, 2e-6).unwrap();
    }
}
