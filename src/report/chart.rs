//! A line chart as inline SVG: one look at a curve, no library, no script.

use std::fmt::Write;

/// Size of a chart in SVG units, and the room around its plot for ticks and names.
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 250.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 30.0;
/// Most points drawn a curve, about one for every other SVG unit; more are averaged in even groups.
const MOST_POINTS: usize = 300;

/// One curve.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Its name in the legend.
    pub name: &'static str,
    /// CSS class that gives it its colour.
    pub class: &'static str,
    /// Whether every point is marked, for the few points of evaluations.
    pub marked: bool,
    /// `(x, y)` by rising x; those that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// The chart of `series` over x, with a legend; empty series are left out. None where nothing can be drawn.
pub fn line_chart(title: &str, x_name: &str, series: Vec<Series>) -> Option<String> {
    let series: Vec<Series> = series.into_iter().map(thinned).filter(|curve| !curve.points.is_empty()).collect();
    let points = || series.iter().flat_map(|curve| &curve.points);
    let (x_low, x_high) = range(points().map(|point| point.0))?;
    let (y_low, y_high) = range(points().map(|point| point.1))?;
    let (x_ticks, y_ticks) = (ticks(x_low, x_high), ticks(y_low, y_high));
    // The y axis ends on ticks; the x axis ends where the data ends.
    let (y_low, y_high) = (y_low.min(y_ticks[0]), y_high.max(y_ticks[y_ticks.len() - 1]));
    let x = |value: f64| LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| TOP + (y_high - value) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM);

    let mut svg = String::new();
    let out = &mut svg;
    put(out, format_args!(r#"<figure><figcaption>{}</figcaption>"#, escape(title)));
    put(out, format_args!(r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{}">"#, escape(title)));
    for &tick in &y_ticks {
        let (at, right, label) = (y(tick), WIDTH - RIGHT, number(tick));
        let class = if tick == 0.0 { "zero" } else { "grid" };
        put(out, format_args!(r#"<line class="{class}" x1="{LEFT}" x2="{right}" y1="{at:.1}" y2="{at:.1}"/>"#));
        put(out, format_args!(r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{label}</text>"#, LEFT - 6.0, at + 4.0));
    }
    for &tick in x_ticks.iter().filter(|&&tick| (x_low..=x_high).contains(&tick)) {
        let (at, label) = (x(tick), number(tick));
        put(out, format_args!(r#"<text x="{at:.1}" y="{:.1}" text-anchor="middle">{label}</text>"#, HEIGHT - 14.0));
    }
    let (middle, low) = ((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 1.0);
    put(out, format_args!(r#"<text x="{middle}" y="{low}" text-anchor="middle">{}</text>"#, escape(x_name)));
    for curve in &series {
        let class = curve.class;
        let path: Vec<String> = curve.points.iter().map(|&(px, py)| format!("{:.1},{:.1}", x(px), y(py))).collect();
        put(out, format_args!(r#"<polyline class="{class}" points="{}"/>"#, path.join(" ")));
        if curve.marked || curve.points.len() == 1 {
            for &(px, py) in &curve.points {
                put(out, format_args!(r#"<circle class="{class}" cx="{:.1}" cy="{:.1}" r="3"/>"#, x(px), y(py)));
            }
        }
    }
    put(out, format_args!(r#"</svg><p class="legend">"#));
    for curve in &series {
        put(out, format_args!(r#"<span class="{}">{}</span> "#, curve.class, escape(curve.name)));
    }
    put(out, format_args!("</p></figure>\n"));
    Some(svg)
}

/// Text that is safe between tags and inside quoted attributes.
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            _ => safe.push(letter),
        }
    }
    safe
}

pub(super) fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a string takes all that is written");
}

/// Drops what is not finite and averages even groups of neighbours where there are more than [`MOST_POINTS`].
fn thinned(mut series: Series) -> Series {
    series.points.retain(|point| point.0.is_finite() && point.1.is_finite());
    let group = series.points.len().div_ceil(MOST_POINTS).max(1);
    if group > 1 {
        let mean = |points: &[(f64, f64)]| {
            let (x, y) = points.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
            (x / points.len() as f64, y / points.len() as f64)
        };
        series.points = series.points.chunks(group).map(mean).collect();
    }
    series
}

/// Lowest and highest value, drawn apart where they are equal; none without values.
fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        None
    } else if low == high {
        let room = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
        Some((low - room, high + room))
    } else {
        Some((low, high))
    }
}

/// Four to eight round values that span `low..=high`, one of them zero where it lies within.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = power * [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| power * factor >= rough).unwrap_or(10.0);
    let (first, last) = ((low / step).floor() as i64, (high / step).ceil() as i64);
    (first..=last).map(|n| n as f64 * step).collect()
}

/// A tick as short as it can be told apart: a product's rounding noise is cut.
fn number(value: f64) -> String {
    let text = format!("{value:.6}");
    let short = text.trim_end_matches('0').trim_end_matches('.');
    if short == "0" && value != 0.0 { format!("{value:.1e}") } else { short.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(points: Vec<(f64, f64)>) -> Series {
        Series { name: "train <b>", class: "a", marked: false, points }
    }

    #[test]
    fn ticks_are_round_and_span_the_data() {
        assert_eq!(ticks(0.13, 0.69), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8]);
        assert_eq!(ticks(-30.0, 62.0), [-40.0, -20.0, 0.0, 20.0, 40.0, 60.0, 80.0]);
        assert_eq!(number(0.6000000000000001), "0.6");
        assert_eq!(number(2e-9), "2.0e-9");
        assert_eq!(number(1500.0), "1500");
    }

    #[test]
    fn a_curve_fills_the_plot_from_corner_to_corner() {
        let svg = line_chart("Loss", "step", vec![series(vec![(1.0, 0.0), (3.0, 10.0)])]).expect("a chart");
        assert!(svg.contains(r#"points="56.0,220.0 626.0,12.0""#), "{svg}");
        assert!(svg.contains("train &lt;b&gt;") && !svg.contains("<b>"), "{svg}");
    }

    #[test]
    fn long_runs_are_averaged_and_what_is_not_finite_is_left_out() {
        let long = thinned(series((0..1000).map(|n| (f64::from(n), f64::from(n))).collect()));
        assert_eq!((long.points.len(), long.points[0]), (250, (1.5, 1.5)));
        let broken = thinned(series(vec![(1.0, f64::NAN), (2.0, 0.5)]));
        assert_eq!(broken.points, [(2.0, 0.5)]);
        assert_eq!(line_chart("Loss", "step", vec![series(vec![(1.0, f64::NAN)])]), None);
    }

    #[test]
    fn a_flat_or_lonely_curve_is_drawn() {
        for points in [vec![(0.0, 0.0)], vec![(1.0, 0.5), (2.0, 0.5)]] {
            let svg = line_chart("Margin", "step", vec![series(points)]).expect("a chart");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }
}
