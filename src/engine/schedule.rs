//! What is held where during a step.

use serde::Serialize;

/// How pairs pass the layers. A result depends on it by the order of a step's sums alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Schedule {
    /// Tokens, at most unless one pair has more, that pass all layers before the next do: a sweep. The inputs that all
    /// its layers save exist at once.
    pub sweep: usize,
    /// Tokens, at most unless one pair has more, that a layer works on at once: a micro-batch.
    pub micro: usize,
    /// How many of the last layers keep what their backward pass needs; the others compute it again.
    pub keep: usize,
    /// Positions whose logits exist at once.
    pub head_chunk: usize,
    /// Whether the layers' inputs wait elsewhere than in the memory that is planned: in a file, or in a card's host
    /// ([`super::saved::wait_on_host`]).
    pub scratch: bool,
    /// Whether the pages of layers that do not stay are dropped after use, and those of the next are read ahead.
    pub stream: bool,
    /// Where weights stream: so many layers stay all the same, spread evenly over the model.
    pub resident: usize,
    /// On a device where weights stream: whether the head stays.
    pub head_stays: bool,
}

/// Which way a pass goes through the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// First to last.
    Forward,
    /// Last to first.
    Backward,
}

impl Default for Schedule {
    /// Full speed for a base that fits into memory, without keeping: products run at full speed from a few hundred
    /// tokens on (measured on SmolLM2), and what a layer holds grows with them.
    fn default() -> Self {
        Self {
            sweep: 768,
            micro: 768,
            keep: 0,
            head_chunk: 128,
            scratch: false,
            stream: false,
            resident: 0,
            head_stays: false,
        }
    }
}

impl Schedule {
    /// Whether a layer of so many is let go of after use.
    pub fn lets_go(&self, layer: usize, layers: usize) -> bool {
        let go = layers.saturating_sub(self.resident);
        self.stream && (layer + 1) * go / layers != layer * go / layers
    }

    /// Layers of so many whose weights are asked for as a pass comes to `layer`, in this order: itself where the pass
    /// begins with it, so that nobody asked before, and the next one that was let go of.
    pub fn asks_for(&self, layer: usize, layers: usize, direction: Direction) -> [Option<usize>; 2] {
        let goes = |layer: &usize| self.lets_go(*layer, layers);
        let (first, next) = match direction {
            Direction::Forward => (0, (layer + 1..layers).find(goes)),
            Direction::Backward => (layers - 1, (0..layer).rev().find(goes)),
        };
        [Some(layer).filter(|layer| *layer == first && goes(layer)), next]
    }
}

/// Cuts items into runs of at most so many tokens, or of one item.
pub fn cut<T>(items: &[T], most: usize, tokens: impl Fn(&T) -> usize) -> impl Iterator<Item = &[T]> {
    let mut rest = items;
    std::iter::from_fn(move || {
        let mut held = 0;
        let fits = |item: &&T| {
            held += tokens(item);
            held <= most
        };
        let n = rest.iter().take_while(fits).count().max(1).min(rest.len());
        let (run, tail) = rest.split_at(n);
        rest = tail;
        (n > 0).then_some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is asked for on the way through four layers, layer after layer.
    fn asked(resident: usize, direction: Direction) -> Vec<Vec<usize>> {
        let schedule = Schedule { stream: true, resident, ..Schedule::default() };
        let order: Vec<usize> = match direction {
            Direction::Forward => (0..4).collect(),
            Direction::Backward => (0..4).rev().collect(),
        };
        order.into_iter().map(|layer| schedule.asks_for(layer, 4, direction).into_iter().flatten().collect()).collect()
    }

    #[test]
    fn a_pass_asks_for_its_first_layer_before_the_next() {
        assert_eq!(asked(0, Direction::Forward), [vec![0, 1], vec![2], vec![3], vec![]]);
        assert_eq!(asked(0, Direction::Backward), [vec![3, 2], vec![1], vec![0], vec![]]);
        // layers 1 and 3 go
        assert_eq!(asked(2, Direction::Forward), [vec![1], vec![3], vec![3], vec![]]);
        assert_eq!(asked(2, Direction::Backward), [vec![3, 1], vec![1], vec![], vec![]]);
        assert!(asked(4, Direction::Forward).concat().is_empty());
    }
}
