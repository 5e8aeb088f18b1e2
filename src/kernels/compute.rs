//! In which type the frozen matrices' products multiply. Sums are f32 always.

/// The type of a product's operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compute {
    /// f32: a fused multiply-add a step.
    #[default]
    F32,
    /// bf16: both sides rounded to nearest, two multiply-adds a step.
    Bf16,
}

impl Compute {
    /// bf16 where this processor multiplies it (x86 with AVX512-BF16), else f32.
    pub fn bf16_or_f32() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16")
        {
            return Self::Bf16;
        }
        Self::F32
    }

    /// Elements of k that one step of a micro-kernel takes: what a word of a packed panel holds.
    pub fn per_step(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
        }
    }

    /// Bytes of an operand's number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// Names the arithmetic in which the products run: results under one name have the same bits.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::F32 if super::amx::available() => "f32, in tiles",
            Self::F32 => "f32",
            #[cfg(target_arch = "x86_64")]
            Self::Bf16 if super::amx::available() => "bf16, in tiles",
            Self::Bf16 => "bf16",
        }
    }
}
