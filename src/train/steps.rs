//! Which pairs a step takes, and how many steps there are.

use crate::{
    data::{TokenizedPair, order},
    recipe::Recipe,
};

/// Steps of a pass over `rows` rows.
pub fn per_epoch(recipe: &Recipe, rows: usize) -> usize {
    rows.div_ceil(recipe.train.batch_size)
}

/// Steps of the whole run, as the Hugging Face Trainer counts them.
pub fn total(recipe: &Recipe, rows: usize) -> usize {
    match recipe.train.max_steps {
        0 => (recipe.train.epochs * per_epoch(recipe, rows) as f64).ceil() as usize,
        steps => steps,
    }
}

/// The pairs of a step: the next `batch_size` in the order of its epoch, fewer at the epoch's end.
pub fn batch<'p>(recipe: &Recipe, rows: &'p [TokenizedPair], step: usize) -> Vec<&'p TokenizedPair> {
    let per_epoch = per_epoch(recipe, rows.len());
    let order = order(recipe.train.seed, (step / per_epoch) as u64, rows.len(), recipe.data.shuffle);
    of_order(recipe, rows, &order, step % per_epoch).collect()
}

/// The pairs of every step, one after another.
pub fn batches<'p>(recipe: &Recipe, rows: &'p [TokenizedPair]) -> impl Iterator<Item = Vec<&'p TokenizedPair>> {
    let per_epoch = per_epoch(recipe, rows.len());
    let mut order_of_epoch = Vec::new();
    (0..total(recipe, rows.len())).map(move |step| {
        if step % per_epoch == 0 {
            order_of_epoch = order(recipe.train.seed, (step / per_epoch) as u64, rows.len(), recipe.data.shuffle);
        }
        of_order(recipe, rows, &order_of_epoch, step % per_epoch).collect()
    })
}

fn of_order<'p>(
    recipe: &Recipe,
    rows: &'p [TokenizedPair],
    order: &[u32],
    step: usize,
) -> impl Iterator<Item = &'p TokenizedPair> {
    let first = step * recipe.train.batch_size;
    order[first..rows.len().min(first + recipe.train.batch_size)].iter().map(|&row| &rows[row as usize])
}
