//! Small blocks that last as long as the program, side by side in pages of their own.
//!
//! A page of 4 KiB stays resident for one small block in it. Of the blocks that reading a tokenizer makes most are
//! freed and some, all over the heap, stay: pages for 6 to 11 MiB in one process or another (hash maps are seeded by
//! chance), of which SmolLM2's tokenizer fills 0.7. So what stays is copied to pages that hold nothing else. They are
//! never given back, nor is a block in them used twice: a tokenizer is open as long as the program runs.

use std::{
    alloc::Layout,
    cell::Cell,
    ptr::null_mut,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::large::{PAGE, map};

/// Address space for such blocks, in bytes; used as far as it is written. What is beyond it is the system allocator's.
const ROOM: usize = 64 << 20;

static START: OnceLock<usize> = OnceLock::new();
static USED: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread's small blocks are to last. It has no destructor, so the allocator may use it at any time.
    static LASTING: Cell<bool> = const { Cell::new(false) };
}

/// Does `work`, whose small blocks are taken to last.
pub fn lasting<T>(work: impl FnOnce() -> T) -> T {
    /// Also where `work` panics.
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            LASTING.set(self.0);
        }
    }
    let _before = Before(LASTING.replace(true));
    work()
}

/// A block that lasts, all zero; null where none was asked for, or there is no room.
pub fn take(layout: Layout) -> *mut u8 {
    if !LASTING.get() || layout.align() > PAGE {
        return null_mut();
    }
    let start = *START.get_or_init(|| map(ROOM) as usize);
    let place = |used: usize| used.next_multiple_of(layout.align());
    let taken = USED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
        let end = place(used) + layout.size();
        (start != 0 && end <= ROOM).then_some(end)
    });
    taken.map_or(null_mut(), |used| (start + place(used)) as *mut u8)
}

/// Whether a block was taken here. It needs no giving back then.
pub fn holds(block: *const u8) -> bool {
    START.get().is_some_and(|start| *start != 0 && (block as usize).wrapping_sub(*start) < ROOM)
}

#[cfg(test)]
mod tests {
    use std::alloc::GlobalAlloc;

    use super::*;
    use crate::heap::{Heap, LARGE};

    /// What is asked for is ours, aligned and zero, moves out when it grows, and is nobody else's after it is given
    /// back.
    #[test]
    fn blocks_that_last_are_apart() {
        let of = |size: usize, align: usize| Layout::from_size_align(size, align).unwrap();
        // SAFETY: a block is freed once, with the layout that it has, and is written within it alone.
        unsafe {
            let before = Heap.alloc(of(40, 8));
            let [one, other] = lasting(|| [Heap.alloc(of(3, 1)), Heap.alloc_zeroed(of(100, 64))]);
            let large = lasting(|| Heap.alloc(of(LARGE, 64)));
            let after = Heap.alloc(of(40, 8));
            assert!(holds(one) && holds(other) && ![before, large, after].into_iter().any(|block| holds(block)));
            assert_eq!((other as usize % 64, other.read()), (0, 0));

            other.write(7);
            let grown = Heap.realloc(other, of(100, 64), 200);
            assert!(!holds(grown) && grown.read() == 7);
            Heap.dealloc(one, of(3, 1));
            assert_ne!(lasting(|| Heap.alloc(of(3, 1))), one);
            for (block, layout) in
                [(before, of(40, 8)), (large, of(LARGE, 64)), (after, of(40, 8)), (grown, of(200, 64))]
            {
                Heap.dealloc(block, layout);
            }
        }
    }

    #[test]
    fn a_panic_ends_it() {
        let _ = std::panic::catch_unwind(|| lasting(|| std::panic::resume_unwind(Box::new(()))));
        assert!(take(Layout::new::<u64>()).is_null());
    }
}
