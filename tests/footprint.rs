//! What a layer and the head are said to hold, against an allocator that counts.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::Mutex,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

use candle_core::{Device, Tensor};
use dpo_lora::{
    engine::pack::{Packed, Tree, pack},
    kernels::dropout::Dropout,
    model::{
        decoder::Decoder,
        footprint::{HeadWidths, Widths},
        linear::Through,
    },
    objective::logps::score,
    random::Stream,
};

#[path = "support/numbers.rs"]
mod numbers;

use numbers::{fixture, fresh, open};

/// The system's allocator, counting.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);
/// One measurement at a time: the tests of this program run beside each other.
static ALONE: Mutex<()> = Mutex::new(());

fn took(size: usize) {
    let held = HELD.fetch_add(size, SeqCst) + size;
    MOST.fetch_max(held, SeqCst);
}

// SAFETY: it is the system's allocator; what is counted beside it touches no block.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The most bytes held at once while `work` ran, over those held before, and what it gave.
fn most<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let before = HELD.load(SeqCst);
    MOST.store(before, SeqCst);
    let done = work();
    (MOST.load(SeqCst) - before, done)
}

const TOKENS: usize = 4000;
/// Every kind of norm, of joined matrices, of residual.
const FAMILIES: [&str; 15] = [
    "llama",
    "llama-bias",
    "mistral",
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
const RANK: usize = 3;

/// Many short pairs: what a layer holds a token outweighs what it holds for other reasons.
fn packed(model: &Decoder) -> Packed {
    let vocabulary = model.vocabulary() as u32;
    let ids = |from: u32, n: u32| (from..from + n).map(|id| id * 7 % vocabulary).collect::<Vec<_>>();
    let texts: Vec<_> = (0..TOKENS as u32 / 40).map(|i| [ids(i, 20), ids(2 * i, 11), ids(3 * i, 11)]).collect();
    let trees: Vec<_> = texts.iter().map(|[prompt, a, b]| Tree { prompt, answers: vec![a, b] }).collect();
    pack(&trees, &model.rotary, &Device::Cpu).unwrap()
}

/// Counted bytes are those said, but for what does not grow with the tokens.
fn holds(what: &str, counted: usize, said: usize) {
    // threads' buffers were made by the first pass; lists of spans and tasks remain
    let more = counted.abs_diff(said) as f64 / said as f64;
    assert!(more < 0.015, "{what}: {counted} bytes counted, {said} said");
}

#[test]
fn a_layer_holds_what_is_said() {
    let _alone = ALONE.lock().unwrap();
    for name in FAMILIES {
        let model = open(&fixture(name));
        let adapter = fresh(&model, RANK);
        let packed = packed(&model);
        let tokens = &packed.tokens;
        assert_eq!(tokens.ids.len(), TOKENS);
        let block = &model.blocks[0];
        for p in [0.0, 0.25] {
            let dropout = (p > 0.0).then(|| Dropout { p, stream: Stream::new(1, "dropout"), first_row: 0 });
            let through = Through { dropout, runs: Some(&packed.runs), ..Through::of(Some(&adapter)) };
            let widths = Widths::of(block, &adapter.shapes, p > 0.0);
            let x = model.embed(tokens).unwrap();
            let dy = x.copy().unwrap();
            let bytes = |numbers: usize| numbers * TOKENS * 4;
            let what = |part: &str| format!("{name}, dropout {p}, {part}");
            // the first pass makes what threads keep
            let kept = block.recompute(&x, tokens, through).unwrap();
            block.backward(&x, kept, dy.copy().unwrap(), tokens, through).unwrap();

            let (forward, _) = most(|| block.forward(&x, tokens, through).unwrap());
            holds(&what("forward"), forward, bytes(widths.forward()));
            let before = HELD.load(SeqCst);
            let (keeping, (y, kept)) = most(|| block.forward_keeping(&x, tokens, through).unwrap());
            holds(&what("forward, keeping"), keeping, bytes(widths.forward_keeping()));
            drop(y);
            holds(&what("kept"), HELD.load(SeqCst) - before, bytes(widths.kept()));
            drop(kept);
            let (backward, _) = most(|| {
                let kept = block.recompute(&x, tokens, through).unwrap();
                let dy: Tensor = dy.copy().unwrap();
                block.backward(&x, kept, dy, tokens, through).unwrap()
            });
            holds(&what("backward"), backward, bytes(widths.backward()));
        }
    }
}

#[test]
fn the_head_holds_what_is_said() {
    let _alone = ALONE.lock().unwrap();
    let model = open(&fixture("llama"));
    let widths = HeadWidths::of(&model.head);
    let packed = packed(&model);
    let rows = packed.rows.len();
    let x = model.embed(&packed.tokens).unwrap();
    for chunk in [64, 1000] {
        for gradient in [false, true] {
            let work = || {
                let picked = x.index_select(&packed.rows(&Device::Cpu).unwrap(), 0).unwrap();
                let normed = model.final_norm(&picked).unwrap();
                let scored = score(&model.head, &normed, &packed.targets, chunk, gradient).unwrap();
                (picked, scored)
            };
            work();
            let (counted, (picked, (scores, d_normed))) = most(work);
            let said = 4 * widths.score(rows, chunk, gradient);
            // all scores, and those of a chunk with their logarithms of sums before they are put to the others
            let beside = size_of_val(scores.as_slice()) + rows.min(chunk) * (size_of_val(&scores[0]) + 4);
            assert!(counted.abs_diff(said + beside) < said / 50, "{chunk}: {counted} counted, {said} + {beside} said");
            drop((picked, d_normed));
        }
    }
}
