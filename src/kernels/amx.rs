//! The tile unit of newer Intel processors (AMX): sixteen rows times sixteen columns of bf16 in one instruction, eight
//! times the rate of AVX512-BF16; of bytes at twice that.
//!
//! The compiler knows nothing of tile registers, and no code but this uses them. They have their shapes as long as
//! there is a [`Unit`]: setting them up costs as much as a tile of 32 × 32 × 128.
//!
//! f32 are multiplied there, too. An f32 is the sum of three bf16 (8 + 8 + 8 bits), and a product of two bf16 is exact
//! in f32: three products where one side holds bf16 numbers. Where both sides hold any numbers, they are whole numbers
//! of three digits of 8 bits with a common scale ([`super::tiles::digits`]): of the nine products of digits, which are
//! summed in integers, the least lies far below an f32's last bit, and the other eight take the time of four products
//! of bf16.

use std::arch::asm;
use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Words of a register.
pub const REGISTER: usize = 256;

/// Rows and columns of the sums: two registers each way.
pub const SIDE: usize = 32;

/// Whether this process multiplies in tiles. Linux wants to be asked, once a process. `DPO_LORA_TILES=off` does
/// without: what other processors do can be tested, timed and repeated bit for bit on one that has tiles.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    let wanted = || std::env::var_os("DPO_LORA_TILES").is_none_or(|value| value != "off");
    *AVAILABLE.get_or_init(|| has_instructions() && wanted() && permitted())
}

/// Whether the processor has tiles and multiplies bf16 and bytes in them, and the system saves them for a thread.
fn has_instructions() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    const OSXSAVE: u32 = 1 << 27;
    const AMX_BF16_TILE_INT8: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    // tile configuration and data
    const SAVED: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn saved() -> u64 {
        // SAFETY: register 0 is there wherever XGETBV is.
        unsafe { _xgetbv(0) }
    }
    // numbers are rounded and transposed for the registers with AVX-512
    let packs = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16");
    if !packs || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    // SAFETY: OSXSAVE says that the processor has XGETBV and the system lets programs use it.
    let saved = unsafe { saved() };
    __cpuid_count(7, 0).edx & AMX_BF16_TILE_INT8 == AMX_BF16_TILE_INT8 && saved & SAVED == SAVED
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
pub struct Unit {
    of_this_thread: PhantomData<*const ()>,
}

thread_local! {
    /// Whether there is a [`Unit`] of this thread.
    static READY: Cell<bool> = const { Cell::new(false) };
}

impl Unit {
    /// Gives the registers their shapes; none where there are no tiles, or this thread has them ready already.
    pub fn ready() -> Option<Self> {
        (available() && !READY.replace(true)).then(|| {
            // SAFETY: the processor has tiles and the system lets this process use them; nothing else does.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &SHAPES, options(nostack, readonly, preserves_flags)) };
            Self { of_this_thread: PhantomData }
        })
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // SAFETY: they were made ready by `ready`, on this thread.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
        READY.set(false);
    }
}

/// How the numbers of either side of a product are taken apart, by the number of products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Terms {
    /// Both sides are rounded to bf16.
    One,
    /// f32 in three bf16 on the left, bf16 on the right.
    Three,
    /// f32 on both sides, in three digits.
    Eight,
}

impl Terms {
    /// Parts of a number on the left.
    pub const fn left(self) -> usize {
        if matches!(self, Self::One) { 1 } else { 3 }
    }

    /// Parts of a number on the right.
    pub const fn right(self) -> usize {
        if matches!(self, Self::Eight) { 3 } else { 1 }
    }

    /// Numbers of k that a register takes: sixteen words of two bf16 or four digits.
    pub const fn depth(self) -> usize {
        if matches!(self, Self::Eight) { 64 } else { 32 }
    }
}

/// The sums of a tile, row after row: f32, or `i32` for each order of products of digits, from the greatest on.
#[repr(align(64))]
pub struct Sums(pub [[[u32; SIDE]; SIDE]; 4]);

impl Default for Sums {
    fn default() -> Self {
        Self([[[0; SIDE]; SIDE]; 4])
    }
}

/// The sums over `depth` registers of k of `16 · halves` rows (`halves` is one or two) and 32 columns.
///
/// `left` holds `[depth][parts][halves]` registers of sixteen rows times sixteen words of k, `right`
/// `[depth][parts][2]` of sixteen words of k times sixteen columns. The sums begin at zero, so an element's value does
/// not depend on where its tile lies.
///
/// # Panics
/// Where a side does not hold as many.
pub fn multiply(_: &Unit, terms: Terms, halves: usize, depth: usize, left: &[u32], right: &[u32], sums: &mut Sums) {
    assert!((1..=2).contains(&halves) && depth > 0, "{halves} halves of {depth}");
    assert!(left.len() >= depth * terms.left() * halves * REGISTER, "the left panel is too small");
    assert!(right.len() >= depth * terms.right() * 2 * REGISTER, "the right panel is too small");
    let (left, right, sums) = (left.as_ptr(), right.as_ptr(), sums.0.as_mut_ptr());
    // SAFETY: the registers have their shapes while there is a `Unit`; the panels hold what is read.
    unsafe {
        match (terms, halves) {
            (Terms::One, 1) => one_half(depth, left, right, sums),
            (Terms::One, _) => one(depth, left, right, sums),
            (Terms::Three, 1) => three_half(depth, left, right, sums),
            (Terms::Three, _) => three(depth, left, right, sums),
            (Terms::Eight, 1) => {
                first_order_half(depth, left, right, sums);
                second_order_half(depth, left, right, sums.add(1));
                third_order_half(depth, left, right, sums.add(2));
                fourth_order_half(depth, left, right, sums.add(3));
            }
            (Terms::Eight, _) => {
                first_order(depth, left, right, sums);
                second_order(depth, left, right, sums.add(1));
                third_order(depth, left, right, sums.add(2));
                fourth_order(depth, left, right, sums.add(3));
            }
        }
    }
}

/// Loads part `$part` of the right-hand side's 32 columns.
macro_rules! right {
    ($part:literal) => {
        concat!(
            "tileloadd tmm6, [{right} + {line} + 2048 * ",
            $part,
            "]\n",
            "tileloadd tmm7, [{right} + {line} + 2048 * ",
            $part,
            " + 1024]\n",
        )
    };
}

/// Multiplies part `$part` of 32 rows with what is loaded.
macro_rules! left {
    ($multiply:literal, $part:literal) => {
        concat!(
            "tileloadd tmm4, [{left} + {line} + 2048 * ",
            $part,
            "]\n",
            $multiply,
            " tmm0, tmm4, tmm6\n",
            "tileloadd tmm5, [{left} + {line} + 2048 * ",
            $part,
            " + 1024]\n",
            $multiply,
            " tmm1, tmm4, tmm7\n",
            $multiply,
            " tmm2, tmm5, tmm6\n",
            $multiply,
            " tmm3, tmm5, tmm7\n",
        )
    };
}

/// The same of sixteen rows.
macro_rules! left_half {
    ($multiply:literal, $part:literal) => {
        concat!(
            "tileloadd tmm4, [{left} + {line} + 1024 * ",
            $part,
            "]\n",
            $multiply,
            " tmm0, tmm4, tmm6\n",
            $multiply,
            " tmm1, tmm4, tmm7\n",
        )
    };
}

/// Products of bf16, and of digits, of parts of the left with what is loaded.
macro_rules! bf16 {
    ($left:ident, $($part:literal),+) => { concat!($($left!("tdpbf16ps", $part)),+) };
}
macro_rules! digits {
    ($left:ident, $($part:literal),+) => { concat!($($left!("tdpbssd", $part)),+) };
}

/// A loop over registers of k: `$left` and `$right` bytes of either side at a time.
macro_rules! kernel {
    ($name:ident, $halves:literal, $left:literal, $right:literal, $($step:expr),+) => {
        unsafe fn $name(depth: usize, left: *const u32, right: *const u32, sums: *mut [[u32; SIDE]; SIDE]) {
            // SAFETY: the caller vouches for the panels and the sums; tile registers are nobody else's.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    concat!($($step),+),
                    concat!("add {left}, ", $left),
                    concat!("add {right}, ", $right),
                    "dec {depth}",
                    "jnz 2b",
                    "tilestored [{sums} + {row}], tmm0",
                    "tilestored [{sums} + {row} + 64], tmm1",
                    concat!(
                        ".if ", $halves, " == 2\n",
                        "tilestored [{sums} + {row} + 2048], tmm2\n",
                        "tilestored [{sums} + {row} + 2112], tmm3\n",
                        ".endif",
                    ),
                    left = inout(reg) left => _,
                    right = inout(reg) right => _,
                    depth = inout(reg) depth => _,
                    line = in(reg) 64usize,
                    row = in(reg) 4 * SIDE,
                    sums = in(reg) sums,
                    options(nostack)
                );
            }
        }
    };
}

kernel!(one, 2, 2048, 2048, right!(0), bf16!(left, 0));
kernel!(one_half, 1, 1024, 2048, right!(0), bf16!(left_half, 0));
kernel!(three, 2, 6144, 2048, right!(0), bf16!(left, 0, 1, 2));
kernel!(three_half, 1, 3072, 2048, right!(0), bf16!(left_half, 0, 1, 2));
kernel!(first_order, 2, 6144, 6144, right!(0), digits!(left, 0));
kernel!(first_order_half, 1, 3072, 6144, right!(0), digits!(left_half, 0));
kernel!(second_order, 2, 6144, 6144, right!(0), digits!(left, 1), right!(1), digits!(left, 0));
kernel!(second_order_half, 1, 3072, 6144, right!(0), digits!(left_half, 1), right!(1), digits!(left_half, 0));
kernel!(
    third_order,
    2,
    6144,
    6144,
    right!(0),
    digits!(left, 2),
    right!(1),
    digits!(left, 1),
    right!(2),
    digits!(left, 0)
);
kernel!(
    third_order_half,
    1,
    3072,
    6144,
    right!(0),
    digits!(left_half, 2),
    right!(1),
    digits!(left_half, 1),
    right!(2),
    digits!(left_half, 0)
);
kernel!(fourth_order, 2, 6144, 6144, right!(1), digits!(left, 2), right!(2), digits!(left, 1));
kernel!(fourth_order_half, 1, 3072, 6144, right!(1), digits!(left_half, 2), right!(2), digits!(left_half, 1));
