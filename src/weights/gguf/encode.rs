//! Rows of numbers as ggml's blocks: what `dpo-lora quantize` writes.
//!
//! Q8_0 and Q5_0 are gguf-py's byte for byte. Q4_K searches its scales as ggml's reference does in outline: a grid of
//! steps, each with the scale and minimum of least squares, weighted by the numbers' sizes.

use half::f16;

use super::blocks::GgmlType;

/// Appends the blocks of `row`, which is a whole number of them.
///
/// # Panics
/// Where the format is none that is written.
pub fn encode(kind: GgmlType, row: &[f32], out: &mut Vec<u8>) {
    match kind {
        GgmlType::Q8_0 => row.chunks_exact(32).for_each(|block| q8_0(block, out)),
        GgmlType::Q5_0 => row.chunks_exact(32).for_each(|block| q5_0(block, out)),
        GgmlType::Q4_K => row.chunks_exact(256).for_each(|block| q4_k(block, out)),
        GgmlType::F32 => out.extend(row.iter().flat_map(|value| value.to_le_bytes())),
        other => unreachable!("{other} is not written"),
    }
}

/// The inverse, or 0 of 0.
fn inverse(value: f32) -> f32 {
    if value == 0.0 { 0.0 } else { 1.0 / value }
}

fn q8_0(block: &[f32], out: &mut Vec<u8>) {
    let d = block.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
    let id = inverse(d);
    out.extend(f16::from_f32(d).to_le_bytes());
    out.extend(block.iter().map(|x| (x * id).round() as i8 as u8));
}

fn q5_0(block: &[f32], out: &mut Vec<u8>) {
    // the first of the largest, with its sign, becomes -16
    let most = block.iter().fold(0f32, |most, x| if x.abs() > most.abs() { *x } else { most });
    let d = most / -16.0;
    let id = inverse(d);
    let q: Vec<u32> = block.iter().map(|x| ((x * id + 16.5) as u32).min(31)).collect();
    out.extend(f16::from_f32(d).to_le_bytes());
    let high = q.iter().enumerate().fold(0u32, |high, (i, q)| high | (q >> 4) << i);
    out.extend(high.to_le_bytes());
    out.extend((0..16).map(|i| (q[i] & 15 | (q[i + 16] & 15) << 4) as u8));
}

/// Steps of the search, and how far they reach to either side of the plain scale's 15.
const STEPS: i32 = 20;

/// The scale and the minimum (taken off, not below 0) of 32 numbers.
fn scale_and_min(x: &[f32]) -> (f32, f32) {
    let least = x.iter().copied().fold(0f32, f32::min);
    let most = x.iter().copied().fold(f32::MIN, f32::max);
    if most <= least {
        return (0.0, -least);
    }
    let root = (x.iter().map(|x| x * x).sum::<f32>() / 32.0).sqrt();
    let error = |scale: f32, min: f32| -> f32 {
        let id = inverse(scale);
        x.iter()
            .map(|x| {
                let q = ((x + min) * id).round().clamp(0.0, 15.0);
                (root + x.abs()) * (scale * q - min - x).powi(2)
            })
            .sum()
    };
    let mut best = ((most - least) / 15.0, -least);
    let mut best_error = error(best.0, best.1);
    for step in 0..=STEPS {
        let steps = 15.0 - 1.0 + 0.1 * step as f32;
        let id = steps / (most - least);
        // least squares of x = scale·q − min
        let [mut w, mut wq, mut wqq, mut wx, mut wqx] = [0f32; 5];
        for x in x {
            let (q, weight) = ((id * (x - least)).round().clamp(0.0, 15.0), root + x.abs());
            w += weight;
            wq += weight * q;
            wqq += weight * q * q;
            wx += weight * x;
            wqx += weight * q * x;
        }
        let determinant = w * wqq - wq * wq;
        if determinant <= 0.0 {
            continue;
        }
        let (mut scale, mut min) = ((w * wqx - wx * wq) / determinant, (wq * wqx - wqq * wx) / determinant);
        if min < 0.0 {
            (scale, min) = (wqx / wqq, 0.0);
        }
        let candidate = error(scale, min);
        if scale > 0.0 && candidate < best_error {
            (best, best_error) = ((scale, min), candidate);
        }
    }
    best
}

fn q4_k(block: &[f32], out: &mut Vec<u8>) {
    let mut found = [(0f32, 0f32); 8];
    for (found, x) in found.iter_mut().zip(block.chunks_exact(32)) {
        *found = scale_and_min(x);
    }
    let largest = |part: fn(&(f32, f32)) -> f32| found.iter().map(part).fold(0f32, f32::max);
    let (d, dmin) = (f16::from_f32(largest(|f| f.0) / 63.0), f16::from_f32(largest(|f| f.1) / 63.0));
    let six = |value: f32, unit: f16| (value * inverse(unit.to_f32())).round().clamp(0.0, 63.0) as u8;
    let mut scales = [0u8; 12];
    let mut codes = [0u8; 256];
    for (i, (scale, min)) in found.iter().enumerate() {
        let (sc, m) = (six(*scale, d), six(*min, dmin));
        match i {
            0..4 => {
                scales[i] |= sc;
                scales[i + 4] |= m;
            }
            _ => {
                scales[i + 4] = (sc & 15) | (m & 15) << 4;
                scales[i - 4] |= sc >> 4 << 6;
                scales[i] |= m >> 4 << 6;
            }
        }
        let (scale, min) = (d.to_f32() * f32::from(sc), dmin.to_f32() * f32::from(m));
        let id = inverse(scale);
        for (code, x) in codes[i * 32..][..32].iter_mut().zip(&block[i * 32..]) {
            *code = ((x + min) * id).round().clamp(0.0, 15.0) as u8;
        }
    }
    out.extend(d.to_le_bytes());
    out.extend(dmin.to_le_bytes());
    out.extend(scales);
    for pair in codes.chunks_exact(64) {
        out.extend((0..32).map(|i| pair[i] | pair[i + 32] << 4));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of a bell, and the error of a format on them, relative to their size.
    fn error(kind: GgmlType) -> f64 {
        let number = |i: u32| {
            let unit = |salt: u32| f64::from((i * 4 + salt).wrapping_mul(2654435761) >> 8) / f64::from(1 << 24);
            ((unit(0) + unit(1) + unit(2) + unit(3)) - 2.0) as f32
        };
        let row: Vec<f32> = (0..2048).map(number).collect();
        let (mut bytes, mut back) = (Vec::new(), vec![0.0; row.len()]);
        encode(kind, &row, &mut bytes);
        let (block, size) = kind.block();
        assert_eq!(bytes.len(), row.len() / block * size);
        kind.decode(&bytes, 0, &mut back);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let off: f64 = row.iter().zip(&back).map(|(a, b)| square(a - b)).sum();
        (off / row.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
    }

    #[test]
    fn errors_are_those_of_their_bits() {
        let errors = [GgmlType::Q8_0, GgmlType::Q5_0, GgmlType::Q4_K].map(error);
        println!("{errors:?}");
        assert!(errors[0] < 0.006 && errors[1] < 0.05 && errors[2] < 0.08, "{errors:?}");
    }

    #[test]
    fn zeros_and_single_numbers_survive() {
        for kind in [GgmlType::Q8_0, GgmlType::Q5_0, GgmlType::Q4_K] {
            for value in [0.0, 0.5, -0.5] {
                let (mut bytes, mut back) = (Vec::new(), [1.0; 256]);
                encode(kind, &[value; 256], &mut bytes);
                kind.decode(&bytes, 0, &mut back);
                assert!(back.iter().all(|x| (x - value).abs() <= 0.02 * value.abs()), "{kind} {value}: {}", back[0]);
            }
        }
    }
}
