//! The tile unit of newer Intel processors (AMX): sixteen rows times sixteen columns of bf16 in one instruction, eight times
//! the rate of AVX512-BF16.
//!
//! The compiler knows nothing of tile registers, and no code but this uses them. They have their shapes as long as there is a
//! [`Tiles`]: setting them up costs as much as a tile of 32 × 32 × 128.

use std::arch::asm;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Words of k that a tile takes at once.
const BLOCK: usize = 16;

/// Whether this process may multiply in tiles. Linux wants to be asked, once a process.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_instructions() && permitted())
}

/// Whether the processor has tiles and multiplies bf16 in them, and the system saves them for a thread.
fn has_instructions() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    const OSXSAVE: u32 = 1 << 27;
    const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    // tile configuration and data
    const SAVED: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn saved() -> u64 {
        // SAFETY: register 0 is there wherever XGETBV is.
        unsafe { _xgetbv(0) }
    }
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    // SAFETY: OSXSAVE says that the processor has XGETBV and the system lets programs use it.
    let saved = unsafe { saved() };
    __cpuid_count(7, 0).edx & AMX_BF16_AND_TILE == AMX_BF16_AND_TILE && saved & SAVED == SAVED
}

#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: it asks for a permission and changes nothing else.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

/// What other systems want is not known here.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The shape of the eight tile registers, as `ldtilecfg` reads it.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_a_row: [u16; 16],
    rows: [u8; 16],
}

static SHAPES: Shapes = Shapes {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    bytes_a_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// This thread's tile registers, ready to multiply; given back when it is dropped.
#[derive(Debug)]
pub struct Tiles {
    of_this_thread: PhantomData<*const ()>,
}

impl Tiles {
    /// Gives the registers their shapes; none where there are no tiles.
    pub fn ready() -> Option<Self> {
        available().then(|| {
            // SAFETY: the processor has tiles and the system lets this process use them; nothing else does.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &SHAPES, options(nostack, readonly, preserves_flags)) };
            Self { of_this_thread: PhantomData }
        })
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: they were made ready by `ready`, on this thread.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// A [`super::micro::Tile`] of `16 · HALVES` rows (one or two) and 32 columns, whose left panel lies `[mr][steps]`.
///
/// Sums begin at zero whatever `add` says, so that an element's value does not depend on where its tile lies.
///
/// # Safety
/// As for any tile, and there is a [`Tiles`] of this thread.
pub unsafe fn tile<const HALVES: usize>(
    steps: usize,
    a: *const u32,
    b: *const u32,
    c: *mut f32,
    ldc: usize,
    add: bool,
) {
    const NR: usize = 32;
    let (blocks, rest) = (steps / BLOCK, steps % BLOCK);
    // SAFETY: the caller vouches for the panels and the tile of `c`, and that the processor has tiles. A block reads sixteen
    // words of k, of which there are as many.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            options(nostack, nomem, preserves_flags)
        );
        multiply::<HALVES>(blocks, a, 4 * steps, b);
        if rest > 0 {
            // what is left of k, made whole with zeros
            let mut left = [[0u32; BLOCK]; 32];
            for (row, words) in left.iter_mut().enumerate().take(16 * HALVES) {
                words.as_mut_ptr().copy_from_nonoverlapping(a.add(row * steps + blocks * BLOCK), rest);
            }
            let mut right = [[0u32; NR]; BLOCK];
            right.as_mut_ptr().cast::<u32>().copy_from_nonoverlapping(b.add(blocks * BLOCK * NR), rest * NR);
            multiply::<HALVES>(1, left.as_ptr().cast(), 4 * BLOCK, right.as_ptr().cast());
        }
        if !add {
            return store::<HALVES>(c, 4 * ldc);
        }
        let mut sums = [[0f32; NR]; 32];
        store::<HALVES>(sums.as_mut_ptr().cast(), 4 * NR);
        for (row, sums) in sums.iter().enumerate().take(16 * HALVES) {
            let c = std::slice::from_raw_parts_mut(c.add(row * ldc), NR);
            c.iter_mut().zip(sums).for_each(|(c, sum)| *c += sum);
        }
    }
}

/// Adds the products of `blocks` blocks of k to the sums. Rows of `a` lie `stride` bytes apart, those of `b` 128.
#[inline(always)]
unsafe fn multiply<const HALVES: usize>(blocks: usize, a: *const u32, stride: usize, b: *const u32) {
    if blocks == 0 {
        return;
    }
    // SAFETY: the caller vouches for sixteen words a block of each row of `a` and of sixteen rows of `b`; memory is only
    // read, and tile registers are nobody else's.
    unsafe {
        if HALVES == 2 {
            asm!(
                "2:",
                "tileloadd tmm4, [{a} + {stride}]",
                "tileloadd tmm6, [{b} + {wide}]",
                "tileloadd tmm7, [{b} + {wide} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{lower} + {stride}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 64",
                "add {lower}, 64",
                "add {b}, 2048",
                "dec {blocks}",
                "jnz 2b",
                a = inout(reg) a => _,
                lower = inout(reg) a.byte_add(16 * stride) => _,
                b = inout(reg) b => _,
                blocks = inout(reg) blocks => _,
                stride = in(reg) stride,
                wide = in(reg) 128usize,
                options(nostack, readonly)
            );
        } else {
            asm!(
                "2:",
                "tileloadd tmm4, [{a} + {stride}]",
                "tileloadd tmm6, [{b} + {wide}]",
                "tileloadd tmm7, [{b} + {wide} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, 64",
                "add {b}, 2048",
                "dec {blocks}",
                "jnz 2b",
                a = inout(reg) a => _,
                b = inout(reg) b => _,
                blocks = inout(reg) blocks => _,
                stride = in(reg) stride,
                wide = in(reg) 128usize,
                options(nostack, readonly)
            );
        }
    }
}

/// Writes the sums, rows `stride` bytes apart.
#[inline(always)]
unsafe fn store<const HALVES: usize>(c: *mut f32, stride: usize) {
    // SAFETY: the caller vouches for the rows.
    unsafe {
        asm!("tilestored [{c} + {stride}], tmm0", "tilestored [{c} + {stride} + 64], tmm1", c = in(reg) c,
            stride = in(reg) stride, options(nostack, preserves_flags));
        if HALVES == 2 {
            asm!("tilestored [{c} + {stride}], tmm2", "tilestored [{c} + {stride} + 64], tmm3",
                c = in(reg) c.byte_add(16 * stride), stride = in(reg) stride, options(nostack, preserves_flags));
        }
    }
}
