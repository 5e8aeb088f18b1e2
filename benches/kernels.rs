//! The kernels one by one, at the shapes of SmolLM2-135M and Llama-3.2-1B: `cargo bench --bench kernels [-- FILTER]`.
//!
//! criterion's throughput is in operations: `Gelem/s` of a product or of attention reads as GFLOP/s; of elementwise
//! kernels it counts elements.

use std::{collections::HashMap, hint::black_box, sync::Arc, time::Duration};

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dpo_lora::{
    kernels::{
        attention::{Heads, Span, attention, attention_backward},
        compute::Compute,
        gate::{swiglu, swiglu_backward},
        norm::{rms_norm, rms_norm_backward},
        product::{add_product, product},
    },
    model::head::Head,
    objective::logps::score,
    weights::{ModelFolder, matrix::FrozenMatrix},
};

/// Tokens of two HH pairs.
const TOKENS: usize = 400;

/// As in the program: large blocks that are freed stay for the next ones.
#[global_allocator]
static ALLOCATOR: dpo_lora::heap::Heap = dpo_lora::heap::Heap;

fn random(rows: usize, columns: usize) -> Tensor {
    Tensor::rand(-1f32, 1.0, (rows, columns), &Device::Cpu).expect("numbers")
}

/// A matrix in a mapped bf16 file.
fn frozen(outputs: usize, inputs: usize, compute: Compute) -> FrozenMatrix {
    let folder = tempfile::tempdir().expect("a folder");
    let tensors = HashMap::from([("w", random(outputs, inputs).to_dtype(DType::BF16).expect("bf16"))]);
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).expect("a file");
    let mapped = ModelFolder::open(folder.path()).expect("a folder").tensor("w").expect("a tensor");
    FrozenMatrix::new(Arc::new(mapped), outputs, inputs, &Device::Cpu, compute)
}

fn types() -> Vec<Compute> {
    let mut types = vec![Compute::F32];
    if Compute::bf16_or_f32() == Compute::Bf16 {
        types.push(Compute::Bf16);
    }
    types
}

fn products(c: &mut Criterion) {
    let mut group = c.benchmark_group("product");
    let shapes = [("smollm2", 576, 192), ("smollm2", 576, 576), ("smollm2", 576, 1536), ("smollm2", 1536, 576)];
    let llama = [("llama-1b", 2048, 512), ("llama-1b", 2048, 2048), ("llama-1b", 2048, 8192), ("llama-1b", 8192, 2048)];
    for (model, inputs, outputs) in shapes.into_iter().chain(llama) {
        for compute in types() {
            let w = frozen(outputs, inputs, compute);
            let name = format!("{model}/{inputs}x{outputs}/{}", compute.name());
            let (x, dy) = (random(TOKENS, inputs), random(TOKENS, outputs));
            group.throughput(Throughput::Elements((2 * TOKENS * inputs * outputs) as u64));
            group.bench_function(format!("forward/{name}"), |b| b.iter(|| black_box(w.apply(&x)).expect("y")));
            group.bench_function(format!("backward/{name}"), |b| b.iter(|| w.add_backward(&x, &dy).expect("dx")));
        }
    }
    for compute in types() {
        let (w, x) = (frozen(1536, 576, compute), random(1, 576));
        group.throughput(Throughput::Elements(2 * 576 * 1536));
        group.bench_function(format!("one-row/smollm2/576x1536/{}", compute.name()), |b| {
            b.iter(|| black_box(w.apply(&x)).expect("y"))
        });
    }
    group.finish();
}

fn lora(c: &mut Criterion) {
    let mut group = c.benchmark_group("lora");
    let (x, a, thin, y) = (random(TOKENS, 576), random(8, 576), random(TOKENS, 8), random(TOKENS, 1536));
    let b_matrix = random(1536, 8);
    group.throughput(Throughput::Elements((2 * TOKENS * 576 * 8) as u64));
    group.bench_function("thin", |b| b.iter(|| product(1.0, &x, &a.t().expect("a"), Compute::F32).expect("thin")));
    group.throughput(Throughput::Elements((2 * TOKENS * 1536 * 8) as u64));
    group.bench_function("update", |b| {
        b.iter(|| add_product(&y, 1.0, &thin, &b_matrix.t().expect("b"), Compute::F32).expect("update"))
    });
    group.bench_function("gradient", |b| {
        b.iter(|| add_product(&b_matrix, 1.0, &y.t().expect("dy"), &thin, Compute::F32).expect("gradient"))
    });
    group.finish();
}

fn heads(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    for (model, n, kv, tokens) in
        [("smollm2", 9, 3, 400), ("smollm2", 9, 3, 2048), ("llama-1b", 32, 8, 1024), ("one-head", 1, 1, 2048)]
    {
        // a prompt of half the tokens and two answers
        let (prompt, answer) = (tokens / 2, tokens / 4);
        let spans = [(0..prompt, 0..0), (prompt..prompt + answer, 0..prompt), (prompt + answer..tokens, 0..prompt)]
            .map(|(own, prefix)| Span { queries: own.clone(), prefix, own });
        let shape = Heads { n, kv, dim: 64, scale: 0.125, window: None, cap: None, compute: Compute::F32 };
        let (q, k, v) = (random(tokens, n * 64), random(tokens, kv * 64), random(tokens, kv * 64));
        let seen: usize = spans.iter().map(|s| s.own.len() * (s.prefix.len() + s.own.len().div_ceil(2))).sum();
        group.throughput(Throughput::Elements((4 * seen * n * 64) as u64));
        group.bench_function(format!("forward/{model}/{tokens}"), |b| {
            b.iter(|| attention(&q, &k, &v, &spans, shape).expect("values"))
        });
        let out = attention(&q, &k, &v, &spans, shape).expect("values");
        group.throughput(Throughput::Elements((10 * seen * n * 64) as u64));
        group.bench_function(format!("backward/{model}/{tokens}"), |b| {
            b.iter(|| {
                attention_backward([&q, &k, &v], &out, &q, &spans, std::slice::from_ref(&(0..3)), shape)
                    .expect("gradients")
            })
        });
    }
    group.finish();
}

fn elementwise(c: &mut Criterion) {
    let mut group = c.benchmark_group("elementwise");
    let (x, w) = (random(TOKENS, 576), random(1, 576).squeeze(0).expect("w"));
    group.throughput(Throughput::Elements((TOKENS * 576) as u64));
    group.bench_function("norm", |b| b.iter(|| rms_norm(&x, &w, 1e-5).expect("y")));
    group.bench_function("norm-backward", |b| b.iter(|| rms_norm_backward(&x, &w, 1e-5, &x, &x).expect("dx")));
    let (gate, up) = (random(TOKENS, 1536), random(TOKENS, 1536));
    group.throughput(Throughput::Elements((TOKENS * 1536) as u64));
    group.bench_function("swiglu", |b| b.iter(|| swiglu(&gate, &up).expect("act")));
    group.bench_function("swiglu-backward", |b| b.iter(|| swiglu_backward(&gate, &up, &up).expect("gradients")));
    group.finish();
}

fn head(c: &mut Criterion) {
    let mut group = c.benchmark_group("head");
    let targets: Vec<u32> = (0..128).collect();
    for compute in types() {
        let (head, h) = (Head::plain(frozen(49_152, 576, compute)), random(128, 576));
        for (name, gradient, products) in [("score", false, 1), ("score-and-slope", true, 2)] {
            group.throughput(Throughput::Elements(products * 2 * 128 * 576 * 49_152));
            group.bench_function(format!("{name}/smollm2/{}", compute.name()), |b| {
                b.iter(|| score(&head, &h, &targets, 128, gradient).expect("scores"))
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = kernels;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(200));
    targets = products, lora, heads, elementwise, head
}
criterion_main!(kernels);
