//! The measured peak of anonymous memory. A program of its own: what other tests hold and give back would be measured
//! too.
#![cfg(target_os = "linux")]

use std::time::Duration;

use dpo_lora::report::MemoryMeter;

#[test]
fn a_short_peak_is_seen_and_kept() {
    const SIZE: u64 = 64 << 20;
    let meter = MemoryMeter::start();
    let before = meter.sample().expect("measured on Linux");
    let held = std::hint::black_box(vec![1u8; SIZE as usize]);
    // The thread alone must see it.
    let peak = (0..4000).find_map(|_| {
        std::thread::sleep(Duration::from_millis(5));
        meter.peak().filter(|&peak| peak >= before + SIZE * 9 / 10)
    });
    assert!(peak.is_some(), "{before} before, peak {:?}", meter.peak());
    drop(held);
    let after = meter.sample().expect("measured on Linux");
    assert!(after < before + SIZE / 2 && meter.peak() >= peak, "{after} after {peak:?}, peak {:?}", meter.peak());
}
