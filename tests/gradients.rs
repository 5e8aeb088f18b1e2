//! The hand-written backward passes of a whole block and of the whole model, against candle's autograd and central
//! differences in f64 of the same computation written anew (`support/form.rs`), and against central differences of our
//! own forward pass in f32. The parts of a block have the same test beside their code.

use candle_core::{DType, Device, Result, Tensor, Var};
use dpo_lora::{
    data::TokenizedPair,
    engine::pack::{Tree, pack},
    kernels::dropout::Dropout,
    model::{linear::Through, lora::Adapter},
    objective::{PairLogps, loss},
    random::Stream,
};

#[path = "support/form.rs"]
mod form;
#[path = "support/numbers.rs"]
mod numbers;

use form::{Form, Learning};
use numbers::{Most, adapter, by_name, dpo, everywhere, fixture, gradient, open, pair, policy, relative_l2, sums};

/// Grouped heads; biases and a large epsilon; a window of 8; a scaled rope; a tied head and weights in bf16; then every
/// other family.
const MODELS: [&str; 17] = [
    "llama",
    "llama-bias",
    "mistral",
    "llama-yarn",
    "llama-tied-bf16",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "smollm3",
    "olmo2",
    "granite",
    "gpt2",
    "gpt-neox",
    "gpt-neox-in-turn",
    "gptj",
];
/// Tokens that every model's vocabulary has.
const VOCABULARY: usize = 48;
/// The step of central differences in f64.
const STEP: f64 = 3e-6;

fn random(shape: (usize, usize), seed: u64) -> Tensor {
    let stream = Stream::new(seed, "test");
    let numbers = (0..(shape.0 * shape.1) as u64).map(|i| (2.0 * stream.uniform(i) - 1.0) as f32).collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

/// Gradients of `total` by the inputs: autograd's, after each was held against a central difference along a random
/// direction.
fn autograd(
    names: &[String],
    inputs: &[Tensor],
    differences: &mut Most,
    total: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Vec<Vec<f32>> {
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let at: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let store = total(&at).unwrap().backward().unwrap();
    let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let gradient = |(i, var): (usize, &Var)| {
        let gradient = numbers(store.get(var).expect("a gradient reaches every input"));
        let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        let stream = Stream::new(i as u64, "direction");
        let direction: Vec<f64> = (0..gradient.len() as u64).map(|j| 2.0 * stream.uniform(j) - 1.0).collect();
        let along: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
        let moved = |step: f64| {
            let direction = Tensor::from_slice(&direction, inputs[i].shape(), &Device::Cpu).unwrap();
            let mut at = inputs.to_vec();
            at[i] = (&at[i] + (direction * step).unwrap()).unwrap();
            total(&at).unwrap().to_scalar::<f64>().unwrap()
        };
        differences.see(((moved(STEP) - moved(-STEP)) / (2.0 * STEP) - along).abs() / norm, names[i].as_str());
        gradient.into_iter().map(|g| g as f32).collect()
    };
    vars.iter().enumerate().map(gradient).collect()
}

/// A's and B's names and values in f64.
fn inputs_of(learning: &Learning) -> (Vec<String>, Vec<Tensor>) {
    let named =
        |(module, [a, b]): (&String, &[Tensor; 2])| [(name(module, "A"), a.clone()), (name(module, "B"), b.clone())];
    learning.matrices.iter().flat_map(named).unzip()
}

fn name(module: &str, matrix: &str) -> String {
    format!("base_model.model.{module}.lora_{matrix}.weight")
}

/// The same with other values, in the order of [`inputs_of`].
fn with(learning: &Learning, values: &[Tensor]) -> Learning {
    let pairs = values.chunks_exact(2).map(|pair| [pair[0].clone(), pair[1].clone()]);
    let matrices = learning.matrices.keys().cloned().zip(pairs).collect();
    Learning { matrices, ..learning.clone() }
}

#[test]
fn a_block_s_backward_is_autograd_s() {
    everywhere(|| {
        let mut forward = Most::of("block, output, relative L2");
        let mut grads = Most::of("block, gradient, relative L2 to autograd in f64");
        let mut differences = Most::of("block, autograd to central differences in f64 (step 3e-6)");
        // two prompts with two answers each; rows, position of the first, rows of the prompt
        let segments = [
            (0..9, 0, 0..0),
            (9..20, 9, 0..9),
            (20..23, 9, 0..9),
            (23..24, 0, 0..0),
            (24..25, 1, 23..24),
            (25..37, 1, 23..24),
        ];
        let part = |n: usize, seed| numbers::ids(Stream::new(seed, "ids"), n, VOCABULARY);
        // an answer's last token is in no row
        let (prompts, answers) = ([part(9, 1), part(1, 2)], [part(12, 3), part(4, 4), part(2, 5), part(13, 6)]);
        let trees: Vec<Tree> = (0..2)
            .map(|i| Tree {
                prompt: &prompts[i],
                answers: answers[2 * i..2 * i + 2].iter().map(Vec::as_slice).collect(),
            })
            .collect();
        let segment = |row: usize| segments.iter().find(|(rows, ..)| rows.contains(&row)).unwrap();
        let position = |row: usize| segment(row).1 + row - segment(row).0.start;
        let positions: Vec<usize> = (0..37).map(position).collect();

        for model_name in MODELS {
            let (model, form) = (open(&fixture(model_name)), Form::open(&fixture(model_name)));
            let adapter = adapter(&fixture(model_name).join("adapter"), &model);
            let tokens = pack(&trees, &model.rotary, &model.device).unwrap().tokens;
            let dropout = Dropout { p: 0.3, stream: Stream::new(9, "dropout"), first_row: 40 };
            for (layer, block) in model.blocks.iter().enumerate() {
                let hides = |i: usize, j: usize| {
                    let (rows, _, prompt) = segment(i);
                    let seen = (rows.contains(&j) && j <= i) || prompt.contains(&j);
                    let window = form.config.layers[layer].window;
                    !seen || window.is_some_and(|window| position(i) - position(j) >= window)
                };
                for (adapted, dropout) in [(false, None), (true, None), (true, Some(dropout))] {
                    let through = Through { dropout, ..Through::of(adapted.then_some(&adapter)) };
                    let mut learning = Learning { dropout, ..Learning::of(&adapter) };
                    let here = |module: &String| {
                        adapted && module.starts_with(&format!("{}.{layer}.", form.config.family.layers))
                    };
                    learning.matrices.retain(|module, _| here(module));
                    assert_eq!(learning.matrices.len(), if adapted { block.linears().count() } else { 0 });

                    let width = form.config.hidden_size;
                    let [x, dy] = [1, 2].map(|seed| random((37, width), seed));
                    let [wide_x, wide_dy] = [&x, &dy].map(|x| x.to_dtype(DType::F64).unwrap());
                    let [x, dy] = [x, dy].map(|x| x.to_device(&model.device).unwrap());
                    adapter.clear_grads().unwrap();
                    let kept = block.recompute(&x, &tokens, through).unwrap();
                    let dx = block.backward(&x, kept, dy.copy().unwrap(), &tokens, through).unwrap();
                    let mut ours = by_name(&adapter, &adapter.grads);
                    ours.insert("x".into(), dx.flatten_all().unwrap().to_vec1().unwrap());

                    let (mut names, mut inputs) = inputs_of(&learning);
                    names.push("x".into());
                    inputs.push(wide_x);
                    let output = |at: &[Tensor]| {
                        let (x, matrices) = at.split_last().unwrap();
                        form.block(layer, x, &positions, hides, &with(&learning, matrices))
                    };
                    let place =
                        format!("{model_name}, layer {layer}, adapter {adapted}, dropout {}", dropout.is_some());
                    let narrow =
                        |y: Tensor| y.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    let y = block.forward(&x, &tokens, through).unwrap();
                    forward.see(relative_l2(&narrow(y), &narrow(output(&inputs).unwrap())), place.as_str());
                    let theirs = autograd(&names, &inputs, &mut differences, |at| (output(at)? * &wide_dy)?.sum_all());
                    for (name, theirs) in names.iter().zip(&theirs) {
                        grads.see(relative_l2(&ours[name], theirs), format!("{place}, {name}"));
                    }
                }
            }
        }
        forward.at_most(2e-6);
        differences.at_most_anywhere(1e-7);
        grads.at_most(1e-5);
    });
}

/// Pairs with a prompt and an answer of one token among them.
fn pairs() -> Vec<TokenizedPair> {
    [[17, 9, 14], [1, 5, 1], [6, 1, 12]].into_iter().enumerate().map(|(i, n)| pair(i as u64, n, VOCABULARY)).collect()
}

/// `−log σ(β·((chosen − ref_chosen) − (rejected − ref_rejected)))`, its mean over the pairs.
fn form_loss(
    form: &Form,
    pairs: &[TokenizedPair],
    reference: &[[f64; 2]],
    beta: f64,
    learning: &Learning,
) -> Result<Tensor> {
    let mut total = Tensor::zeros((), DType::F64, &Device::Cpu)?;
    for (pair, [ref_chosen, ref_rejected]) in pairs.iter().zip(reference) {
        let chosen = form.logp(&pair.prompt, &pair.chosen, learning)?;
        let rejected = form.logp(&pair.prompt, &pair.rejected, learning)?;
        let delta = ((chosen - *ref_chosen)? - (rejected - *ref_rejected)?)?;
        let loss = ((delta * -beta)?.exp()? + 1.0)?.log()?;
        total = (total + loss)?;
    }
    total / pairs.len() as f64
}

#[test]
fn the_model_s_gradient_is_autograd_s() {
    everywhere(|| {
        let mut losses = Most::of("model, DPO loss");
        let mut grads = Most::of("model, gradient of a LoRA tensor, relative L2 to autograd in f64");
        let mut differences = Most::of("model, autograd to central differences in f64 (step 3e-6)");
        for model_name in MODELS {
            let (model, form) = (open(&fixture(model_name)), Form::open(&fixture(model_name)));
            let adapter = adapter(&fixture(model_name).join("adapter"), &model);
            let (pairs, learning) = (pairs(), Learning::of(&adapter));
            let refs: Vec<_> = pairs.iter().collect();
            let reference = sums(&model, &refs, Through::default());
            let means = gradient(&model, &adapter, &refs, &dpo(0.1));
            let ours = by_name(&adapter, &adapter.grads);
            let total = |at: &[Tensor]| form_loss(&form, &pairs, &reference, 0.1, &with(&learning, at));
            let (names, inputs) = inputs_of(&learning);
            losses.see((means.loss - total(&inputs).unwrap().to_scalar::<f64>().unwrap()).abs(), model_name);
            for (name, theirs) in names.iter().zip(autograd(&names, &inputs, &mut differences, total)) {
                grads.see(relative_l2(&ours[name], &theirs), format!("{model_name} {name}"));
            }
        }
        losses.at_most(1e-5);
        differences.at_most_anywhere(1e-7);
        grads.at_most(1e-5);
    });
}

/// The mean loss by forward passes alone.
fn loss_of(
    model: &dpo_lora::model::decoder::Decoder,
    adapter: &Adapter,
    pairs: &[&TokenizedPair],
    reference: &[[f64; 2]],
) -> f64 {
    let sums = sums(model, pairs, policy(adapter));
    let of_pair =
        |((pair, [chosen, rejected]), [ref_chosen, ref_rejected]): ((&&TokenizedPair, [f64; 2]), &[f64; 2])| {
            let (chosen_tokens, rejected_tokens) = (pair.chosen.len(), pair.rejected.len());
            let (ref_chosen, ref_rejected) = (*ref_chosen, *ref_rejected);
            loss(&dpo(0.1), &PairLogps { chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens })
                .loss
        };
    pairs.iter().zip(sums).zip(reference).map(of_pair).sum::<f64>() / pairs.len() as f64
}

#[test]
fn the_gradient_is_the_slope_of_our_own_loss() {
    everywhere(|| {
        /// By so much at least the loss is to move over a step, and so long is a step at least: a loss in f32 rounds by
        /// about 1e-7. It bends over such steps, which shows in the step's square: differences over one and two steps
        /// cancel that.
        const MOVE: f64 = 2e-4;
        const STEP: f64 = 2e-3;
        let mut slopes =
            Most::of("model, gradient along itself to central differences of our f32 loss (two steps), relative");
        for model_name in MODELS {
            let model = open(&fixture(model_name));
            let adapter = adapter(&fixture(model_name).join("adapter"), &model);
            let pairs = pairs();
            let refs: Vec<_> = pairs.iter().collect();
            let reference = sums(&model, &refs, Through::default());
            gradient(&model, &adapter, &refs, &dpo(0.1));
            let values = adapter.values.to_vec1::<f32>().unwrap();
            // a tensor at a time along its own gradient, where the slope is the gradient's norm
            let mut at = 0;
            let named = by_name(&adapter, &adapter.grads);
            for shape in &adapter.shapes {
                for matrix in ["A", "B"] {
                    let gradient = &named[&name(&shape.module, matrix)];
                    let norm = gradient.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>().sqrt();
                    let moved = |step: f64| {
                        let mut values = values.clone();
                        for (value, g) in values[at..at + gradient.len()].iter_mut().zip(gradient) {
                            *value += (step * f64::from(*g) / norm) as f32;
                        }
                        adapter.set(values).unwrap();
                        loss_of(&model, &adapter, &refs, &reference)
                    };
                    let over = |step: f64| (moved(step) - moved(-step)) / (2.0 * step);
                    let step = STEP.max(MOVE / norm);
                    let slope = (4.0 * over(step) - over(2.0 * step)) / 3.0;
                    slopes
                        .see((slope / norm - 1.0).abs(), format!("{model_name} {matrix} of {}: {norm}", shape.module));
                    at += gradient.len();
                }
            }
            assert_eq!(at, values.len());
        }
        slopes.at_most(1e-3);
    });
}
