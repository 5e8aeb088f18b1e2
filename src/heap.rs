//! Memory for large blocks, by which a peak can be predicted: what is resident is what is in use, to the page.
//!
//! A general allocator keeps what is freed as it sees fit, so the same run on the same machine peaks now here, now
//! there, and above what it ever used at once. Here a freed block stays for the next one only as long as blocks in use
//! and blocks kept together are no more than the most that was ever in use at once. So keeping never raises the peak,
//! and in the steady state of a training loop nothing is asked of the system: its page faults cost more than what is
//! done with the pages (docs/memory.md has the figures). Blocks under [`LARGE`] go to the system's allocator, but for
//! those that are said to be [`lasting`].

#[cfg(target_os = "linux")]
mod lasting;

use std::alloc::{GlobalAlloc, Layout, System};

/// Blocks from this size on are ours, in bytes.
pub const LARGE: usize = 64 << 10;

/// The allocator; a program installs it with `#[global_allocator]`.
#[derive(Debug, Default)]
pub struct Heap;

/// Lets the system's allocator serve small blocks from one heap: one a thread, as glibc has it, keeps free room in
/// each.
///
/// Called once, before there are threads. Small blocks are few beside the arithmetic, so that waiting for each other
/// costs nothing that could be measured.
pub fn one_for_all_threads() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it sets a number of the allocator's before another thread runs.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Does `work`, whose small blocks are taken to last as long as the program: one that is freed is not used again. For
/// what is left of reading something large, not for the reading.
pub fn lasting<T>(work: impl FnOnce() -> T) -> T {
    #[cfg(target_os = "linux")]
    return lasting::lasting(work);
    #[cfg(not(target_os = "linux"))]
    work()
}

/// Gives everything that is not in use back to the system, and forgets how much was ever in use at once.
///
/// Called where a run knows that what came before, reading files say, is no measure of what follows.
pub fn settle() {
    #[cfg(target_os = "linux")]
    large::lock().settle();
    // SAFETY: it only returns free memory to the system.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(target_os = "linux")]
// SAFETY: a block of ours is a run of pages of its own, mapped readable and writable, that no other block overlaps
// until it is given back, or, where `lasting` holds it, a piece of pages that are never given back; what is neither is
// the system allocator's. Large blocks are told by their layout, lasting ones by their address.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if large::is(layout) {
            return large::lock().take(layout.size()).0;
        }
        let block = lasting::take(layout);
        // SAFETY: the caller's promise is passed on.
        if block.is_null() { unsafe { System.alloc(layout) } } else { block }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !large::is(layout) {
            let block = lasting::take(layout);
            // SAFETY: the caller's promise is passed on.
            return if block.is_null() { unsafe { System.alloc_zeroed(layout) } } else { block };
        }
        let (block, fresh) = large::lock().take(layout.size());
        if !fresh && !block.is_null() {
            // SAFETY: the block has at least this size and is nobody else's.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match large::is(layout) {
            true => large::lock().give(block, layout.size()),
            false if lasting::holds(block) => {}
            // SAFETY: the caller's promise is passed on.
            false => unsafe { System.dealloc(block, layout) },
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the size does not overflow when rounded up to the alignment.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (large::is(layout), large::is(new)) {
            // SAFETY: the caller's promise is passed on.
            (false, false) if !lasting::holds(block) => unsafe { System.realloc(block, layout, size) },
            (true, true) if size <= layout.size() => {
                large::lock().shrink(block, layout.size(), size);
                block
            }
            _ => {
                // SAFETY: as for alloc and dealloc; both blocks hold the smaller of the two sizes and do not overlap.
                unsafe {
                    let to = self.alloc(new);
                    if !to.is_null() {
                        to.copy_from_nonoverlapping(block, size.min(layout.size()));
                        self.dealloc(block, layout);
                    }
                    to
                }
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
// SAFETY: it is the system's allocator.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(block, layout, size) }
    }
}

#[cfg(target_os = "linux")]
mod large {
    use std::{
        alloc::Layout,
        ptr::null_mut,
        sync::{Mutex, MutexGuard, PoisonError},
    };

    use super::LARGE;

    /// The largest page of the systems this runs on: what is given back is whole pages of any of them.
    pub const PAGE: usize = if cfg!(target_arch = "x86_64") { 4 << 10 } else { 64 << 10 };
    /// Where the system's memory begins is a multiple of this, however large its pages are.
    const SMALLEST_PAGE: usize = 4 << 10;
    /// Runs of free pages that are remembered; a run more is given back.
    const RUNS: usize = 512;

    pub fn is(layout: Layout) -> bool {
        layout.size() >= LARGE && layout.align() <= SMALLEST_PAGE
    }

    pub fn lock() -> MutexGuard<'static, State> {
        static STATE: Mutex<State> = Mutex::new(State { live: 0, kept: 0, most: 0, runs: [Run::NONE; RUNS], count: 0 });
        // Nothing panics while it is held.
        STATE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Free pages that follow each other.
    #[derive(Clone, Copy)]
    struct Run {
        start: usize,
        len: usize,
    }

    impl Run {
        const NONE: Self = Self { start: 0, len: 0 };
    }

    /// All that is known of large blocks. Sizes are bytes, whole pages.
    pub struct State {
        /// In use.
        live: usize,
        /// Free and still resident: at most `most - live`.
        kept: usize,
        /// The most that was in use at once.
        most: usize,
        /// The first `count` are free, by address, none touching another.
        runs: [Run; RUNS],
        count: usize,
    }

    impl State {
        /// A block, and whether it is all zero; null where the system has none.
        pub fn take(&mut self, size: usize) -> (*mut u8, bool) {
            let Some(size) = size.checked_next_multiple_of(PAGE) else { return (null_mut(), false) };
            let runs = self.runs[..self.count].iter().enumerate();
            let best = runs.filter(|(_, run)| run.len >= size).min_by_key(|(_, run)| run.len).map(|(at, _)| at);
            self.live += size;
            self.most = self.most.max(self.live);
            match best {
                Some(at) => {
                    let Run { start, len } = self.runs[at];
                    match len == size {
                        true => self.remove(at),
                        false => self.runs[at] = Run { start: start + size, len: len - size },
                    }
                    self.kept -= size;
                    (start as *mut u8, false)
                }
                None => {
                    self.trim();
                    let block = map(size);
                    if block.is_null() {
                        self.live -= size;
                    }
                    (block, true)
                }
            }
        }

        /// Takes a block back.
        pub fn give(&mut self, block: *mut u8, size: usize) {
            let size = size.next_multiple_of(PAGE);
            self.live -= size;
            self.keep(Run { start: block as usize, len: size });
        }

        /// Takes the end of a block back.
        pub fn shrink(&mut self, block: *mut u8, from: usize, to: usize) {
            let (from, to) = (from.next_multiple_of(PAGE), to.next_multiple_of(PAGE));
            if to < from {
                self.live -= from - to;
                self.keep(Run { start: block as usize + to, len: from - to });
            }
        }

        /// Gives back all that is free.
        pub fn settle(&mut self) {
            self.most = self.live;
            self.trim();
        }

        /// Puts free pages to those that touch them.
        fn keep(&mut self, run: Run) {
            let at = self.runs[..self.count].partition_point(|other| other.start < run.start);
            let after = at < self.count && run.start + run.len == self.runs[at].start;
            let before = at > 0 && self.runs[at - 1].start + self.runs[at - 1].len == run.start;
            self.kept += run.len;
            match (before, after) {
                (true, true) => {
                    self.runs[at - 1].len += run.len + self.runs[at].len;
                    self.remove(at);
                }
                (true, false) => self.runs[at - 1].len += run.len,
                (false, true) => self.runs[at] = Run { start: run.start, len: run.len + self.runs[at].len },
                (false, false) if self.count == RUNS => {
                    self.kept -= run.len;
                    unmap(run);
                }
                (false, false) => {
                    self.runs.copy_within(at..self.count, at + 1);
                    self.runs[at] = run;
                    self.count += 1;
                }
            }
            self.trim();
        }

        /// Gives free pages back, the shortest runs first, until used and kept ones are no more than were ever in use.
        fn trim(&mut self) {
            while self.live + self.kept > self.most {
                let runs = self.runs[..self.count].iter().enumerate();
                let Some(at) = runs.min_by_key(|(_, run)| run.len).map(|(at, _)| at) else { return };
                let Run { start, len } = self.runs[at];
                let gone = len.min(self.live + self.kept - self.most);
                match gone == len {
                    true => self.remove(at),
                    false => self.runs[at].len -= gone,
                }
                self.kept -= gone;
                unmap(Run { start: start + len - gone, len: gone });
            }
        }

        fn remove(&mut self, at: usize) {
            self.runs.copy_within(at + 1..self.count, at);
            self.count -= 1;
        }
    }

    /// Fresh pages, all zero; null where the system has none.
    pub fn map(size: usize) -> *mut u8 {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: an anonymous mapping at an address of the system's choice touches nothing that exists.
        let block = unsafe { libc::mmap(null_mut(), size, access, kind, -1, 0) };
        if block == libc::MAP_FAILED { null_mut() } else { block.cast() }
    }

    fn unmap(run: Run) {
        // SAFETY: the pages are ours, nothing uses them, and they are forgotten. Should the system refuse, they stay
        // mapped and unused.
        unsafe { libc::munmap(run.start as *mut libc::c_void, run.len) };
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// Blocks of every kind of size, moved between them: what was written is there, and a fresh block is zero.
    #[test]
    fn blocks_keep_what_is_in_them_however_they_move() {
        let sizes = [100, LARGE - 1, LARGE, LARGE + 1, 3 * LARGE, LARGE + 5000, 64];
        let of = |size: usize| Layout::from_size_align(size, 64).unwrap();
        // SAFETY: a block is freed once, with the layout that it has, and is written within it alone.
        unsafe {
            let mut block = Heap.alloc_zeroed(of(sizes[0]));
            assert!(!block.is_null());
            let mut kept = 0;
            for pair in sizes.windows(2) {
                let [was, is] = [pair[0], pair[1]];
                assert_eq!(block as usize % 64, 0);
                block.add(was - 1).write(7);
                block.write(9);
                block = Heap.realloc(block, of(was), is);
                assert!(!block.is_null());
                assert_eq!(block.read(), 9);
                if is >= was {
                    assert_eq!(block.add(was - 1).read(), 7);
                    kept += 1;
                }
                let other = Heap.alloc_zeroed(of(is));
                assert!(!other.is_null() && other != block);
                assert!((0..is).step_by(997).all(|at| other.add(at).read() == 0));
                other.write_bytes(5, is);
                Heap.dealloc(other, of(is));
            }
            assert_eq!(kept, 4);
            Heap.dealloc(block, of(sizes[sizes.len() - 1]));
        }
    }
}
