//! e^x, tanh and erf in forms that vectorise: no branches, no calls. The polynomials of tanh and erf are least-squares
//! fits at Chebyshev nodes, good to the last bits of f32.

/// e^x to within two units in the last place, in a form that vectorises: a power of two times a polynomial on
/// `[-ln 2 / 2, ln 2 / 2]`. The standard library's is a scalar call.
///
/// Multiply-adds are fused, which every processor with AVX2 or NEON has; to an older x86 they are slow calls, but the
/// same numbers.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // beyond these f32 overflows or vanishes
    let x = x.clamp(-87.33654, 88.37626);
    // 1.5 · 2^23 leaves no bits for a fraction: the sum is rounded, and its last bits are the whole number itself. A
    // conversion would be checked, and not vectorise.
    const SHIFT: f32 = 12_582_912.0;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    // ln 2 in two parts, the first exact in few bits, so that the remainder loses nothing
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0] {
        p = p.mul_add(r, c);
    }
    p * f32::from_bits(shifted.to_bits().wrapping_sub(SHIFT.to_bits()).wrapping_add(127) << 23)
}

/// tanh x, within 2e-7 of itself.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // near 0 the quotient would lose what it subtracts from 1
    const SPLIT: f32 = 0.6;
    let z = x * x;
    let mut near = -5.856_428e-3;
    for c in [2.075_747_6e-2, -5.376_992e-2, 0.133_317_05, -0.333_332_84, 1.0] {
        near = near * z + c;
    }
    let size = x.abs();
    // beyond 10 it is 1 in f32
    let far = 1.0 - 2.0 / (exp(2.0 * size.min(10.0)) + 1.0);
    if size >= SPLIT { far.copysign(x) } else { near * x }
}

/// erf x, within 2e-7.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let size = x.abs();
    let z = size.min(1.0) * size.min(1.0);
    let mut near = 7.882_497_4e-5;
    for c in
        [-8.018_855e-4, 5.189_312e-3, -2.685_432_9e-2, 0.112_835_97, -0.376_126_26, std::f32::consts::FRAC_2_SQRT_PI]
    {
        near = near * z + c;
    }
    // the logarithm of 1 − erf on [1, 4]; beyond, erf is 1 in f32
    let t = size.clamp(1.0, 4.0);
    let mut log = 1.614_061_6e-6;
    for c in [
        -4.559_062_3e-5,
        5.927_695_3e-4,
        -4.740_222_4e-3,
        2.636_471_8e-2,
        -0.109_978_24,
        -0.631_937_1,
        -1.130_166_6,
        3.032_129_6e-4,
    ] {
        log = log * t + c;
    }
    let far = 1.0 - exp(log);
    if size >= 1.0 { far.copysign(x) } else { near * x }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    fn everywhere(of: fn(f32) -> f32, exact: impl Fn(f64) -> f64, tolerance: f64) {
        for i in -12_000..12_000 {
            let x = i as f32 / 1000.0;
            let off = (f64::from(of(x)) - exact(f64::from(x))).abs();
            assert!(off <= tolerance, "{x}: off by {off:.1e}");
        }
        assert_eq!([of(0.0), of(1e30), of(-1e30)], [0.0, 1.0, -1.0]);
        assert!(of(f32::NAN).is_nan());
    }

    #[test]
    fn exp_equals_the_standard_librarys() {
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).exp();
            assert!(((f64::from(exp(x)) - exact) / exact).abs() < 2.5e-7, "{x}: {} {exact}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1000.0) < 1.3e-38 && exp(1000.0).is_finite());
    }

    #[test]
    fn tanh_equals_the_standard_librarys() {
        everywhere(tanh, f64::tanh, 2e-7);
        // small numbers keep their relative precision
        assert!((f64::from(tanh(1e-4)) / 1e-4f64.tanh() - 1.0).abs() < 2e-7);
    }

    #[test]
    fn erf_equals_candles_in_f64() {
        let candles = |x: f64| Tensor::new(x, &Device::Cpu).unwrap().erf().unwrap().to_scalar::<f64>().unwrap();
        everywhere(erf, candles, 2e-7);
        assert!((f64::from(erf(1e-4)) / candles(1e-4) - 1.0).abs() < 3e-7);
    }
}
