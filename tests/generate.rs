//! Sampling with a cache of keys and values, against full forward passes.

use std::process::Command;

use dpo_lora::{
    engine::{
        generate::{Sampling, generate},
        pack::{Tree, pack},
        pass::forward,
    },
    model::{decoder::Decoder, linear::Through},
    random::Stream,
};
use serde_json::Value;

#[path = "support/numbers.rs"]
mod numbers;

use numbers::{adapter, everywhere, fixture, ids, open, policy};

/// With grouped heads, with a sliding window of 8, and with a tied head in bf16.
const MODELS: [&str; 3] = ["llama", "mistral", "llama-tied-bf16"];

fn sampling(temperature: f64) -> Sampling {
    Sampling { per_prompt: 1, first: 0, max_new_tokens: 14, temperature, seed: 11, stop: vec![] }
}

/// Prompts of 1, 5 and 60 tokens.
fn prompts() -> Vec<Vec<u32>> {
    [1, 5, 60].map(|n| ids(Stream::new(4, "prompt"), n, 64)).to_vec()
}

fn answers(model: &Decoder, prompts: &[Vec<u32>], through: Through, sampling: &Sampling) -> Vec<Vec<u32>> {
    generate(model, &prompts.iter().map(Vec::as_slice).collect::<Vec<_>>(), through, sampling, &|| Ok(()))
        .expect("answers")
}

#[test]
fn greedy_tokens_are_the_likeliest_of_a_full_pass() {
    everywhere(|| {
        for name in MODELS {
            let model = open(&fixture(name));
            let adapter = adapter(&fixture(name).join("adapter"), &model);
            for through in [Through::default(), policy(&adapter)] {
                for (prompt, answer) in prompts().iter().zip(answers(&model, &prompts(), through, &sampling(0.0))) {
                    assert_eq!(answer.len(), 14);
                    let packed =
                        pack(&[Tree { prompt, answers: vec![&answer] }], &model.rotary, &model.device).expect("tokens");
                    let scores = forward(&model, &packed, through).expect("scores");
                    assert!(scores.iter().all(|score| score.likeliest), "{name}: {answer:?} {scores:?}");
                }
            }
        }
    });
}

#[test]
fn a_sampled_token_stands_where_its_random_number_falls() {
    for (name, temperature) in [("llama", 1.0), ("mistral", 1.0), ("llama", 0.6)] {
        let model = open(&fixture(name));
        let adapter = adapter(&fixture(name).join("adapter"), &model);
        let (through, sampling) = (policy(&adapter), Sampling { per_prompt: 3, ..sampling(temperature) });
        let all = answers(&model, &prompts(), through, &sampling);
        for (i, answer) in all.iter().enumerate() {
            let (place, number) = (i / 3, i % 3);
            let stream = Stream::new(sampling.seed, "sample").at(place as u64).at(number as u64);
            for (step, token) in answer.iter().enumerate() {
                // every token of the vocabulary as the answer's next one gives the whole distribution
                let next: Vec<Vec<u32>> =
                    (0..model.vocabulary() as u32).map(|token| [&answer[..step], &[token]].concat()).collect();
                let tree = Tree { prompt: &prompts()[place], answers: next.iter().map(Vec::as_slice).collect() };
                let packed = pack(&[tree], &model.rotary, &model.device).expect("tokens");
                let scores = forward(&model, &packed, through).expect("scores");
                let weight = |rows: &std::ops::Range<usize>| (f64::from(scores[rows.end - 1].logp) / temperature).exp();
                let weights: Vec<f64> = packed.answers.iter().map(weight).collect();
                let total: f64 = weights.iter().sum();
                let below = weights[..*token as usize].iter().sum::<f64>() / total;
                let above = below + weights[*token as usize] / total;
                let random = stream.uniform(step as u64);
                let place = format!("{name}, answer {i}, step {step}: {below} {random} {above}");
                assert!(below - 1e-5 <= random && random <= above + 1e-5, "{place}");
            }
        }
    }
}

/// Its tokenizer's decoder takes a space off a text's start.
#[test]
fn a_text_joins_to_its_prompt() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/gguf/mistral/model.gguf");
    let arguments = ["generate", model, "--prompt", "you", "--count", "40", "--max-new-tokens", "2", "--json"];
    let output = Command::new(env!("CARGO_BIN_EXE_dpo-lora")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    let texts: Vec<_> = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].take()).collect();
    let spaced = texts.iter().filter(|text| text.as_str().unwrap().starts_with(' ')).count();
    assert!(texts.len() == 40 && spaced > 0, "{texts:?}");
}

#[test]
fn answers_do_not_depend_on_what_is_drawn_beside_them() {
    for name in MODELS {
        let model = open(&fixture(name));
        let (prompts, base) = (prompts(), Through::default());
        let five = answers(&model, &prompts, base, &Sampling { per_prompt: 5, ..sampling(1.0) });
        let two = answers(&model, &prompts, base, &Sampling { per_prompt: 2, ..sampling(1.0) });
        let first = answers(&model, &prompts[..1], base, &Sampling { per_prompt: 5, ..sampling(1.0) });
        assert_eq!(first, five[..5], "{name}");
        for (place, two) in two.chunks(2).enumerate() {
            assert_eq!(two, &five[5 * place..][..2], "{name}, prompt {place}");
        }
        // other numbers, other answers
        assert!((1..15).all(|i| five[i] != five[0]), "{name}");
        let other_seed = answers(&model, &prompts, base, &Sampling { per_prompt: 5, seed: 12, ..sampling(1.0) });
        assert!(other_seed.iter().zip(&five).all(|(a, b)| a != b), "{name}");
    }
}

#[test]
fn an_answer_ends_at_a_stop_token_or_at_its_length() {
    let model = open(&fixture("llama"));
    let free = answers(&model, &prompts(), Through::default(), &sampling(1.0));
    let stop = free[1][4];
    let stopped = answers(&model, &prompts(), Through::default(), &Sampling { stop: vec![stop], ..sampling(1.0) });
    for (free, stopped) in free.iter().zip(&stopped) {
        let end = free.iter().position(|token| *token == stop).map_or(free.len(), |at| at + 1);
        assert_eq!(stopped, &free[..end]);
    }
    assert!(stopped[1].len() <= 5);
    let none = answers(&model, &prompts(), Through::default(), &Sampling { max_new_tokens: 0, ..sampling(1.0) });
    assert_eq!(none, vec![Vec::<u32>::new(); 3]);
}
