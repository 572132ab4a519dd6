//! A plot of the time lost by policy: how many of the guests moved within the limits, by what that cost them
//! beside the least possible.

use std::fmt::Write as _;

use super::policies::POLICIES;
use super::race::Race;

/// The picture, and the frame of the plot within it.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 570.0;
const TOP: f64 = 24.0;
const BOTTOM: f64 = 344.0;

/// The multiples at the marks of the axis, from its beginning to its end.
const MULTIPLES: [f64; 7] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0];
/// Points of a line.
const POINTS: u32 = 120;

/// Colours that those who confuse red and green tell apart.
const COLOURS: [&str; 6] = ["#000000", "#e69f00", "#d55e00", "#cc79a7", "#0072b2", "#009e73"];

/// The plot as SVG.
pub(super) fn svg(races: &[Race]) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n"
    );
    for multiple in MULTIPLES {
        let x = x_of(multiple);
        line(&mut svg, (x, TOP), (x, BOTTOM));
        text(&mut svg, (x, BOTTOM + 18.0), "middle", &format!("{multiple:.0}"));
    }
    for percent in (0..=100).step_by(20) {
        let y = y_of(f64::from(percent) / 100.0);
        line(&mut svg, (LEFT, y), (RIGHT, y));
        text(&mut svg, (LEFT - 8.0, y + 4.0), "end", &format!("{percent} %"));
    }
    let middle = f64::midpoint(LEFT, RIGHT);
    text(&mut svg, (middle, BOTTOM + 40.0), "middle", "time lost, as a multiple of the least possible");
    text(&mut svg, (LEFT, TOP - 8.0), "start", "guests that moved within the limits and lost no more");
    for ((index, policy), colour) in POLICIES.iter().enumerate().zip(COLOURS) {
        let width = if index == 0 { 3.0 } else { 1.5 };
        let points: Vec<_> = (0..=POINTS)
            .map(|point| {
                let multiple = MULTIPLES[6].powf(f64::from(point) / f64::from(POINTS));
                format!("{:.1},{:.1}", x_of(multiple), y_of(share_within(races, index, multiple)))
            })
            .collect();
        let stroke = format!("fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\"");
        put(&mut svg, &format!("<polyline points=\"{}\" {stroke}/>", points.join(" ")));
        let y = TOP + 16.0 + 24.0 * index as f64;
        let (from, to) = (RIGHT + 16.0, RIGHT + 36.0);
        put(&mut svg, &format!("<path d=\"M{from:.1},{y:.1}H{to:.1}\" {stroke}/>"));
        text(&mut svg, (to + 6.0, y + 4.0), "start", policy.name);
    }
    svg + "</svg>\n"
}

/// The share of the guests that can move which moved within the limits, and lost at most so many times what
/// the optimum did.
fn share_within(races: &[Race], policy: usize, multiple: f64) -> f64 {
    let can_move = races.iter().filter(|race| race.optimum.is_some());
    let within = can_move.clone().filter(|race| {
        !race.outcomes[policy].broke_limit
            && race.lost_ratio(policy).is_some_and(|ratio| ratio <= multiple * 1.005)
    });
    within.count() as f64 / can_move.count().max(1) as f64
}

/// By the logarithm.
fn x_of(multiple: f64) -> f64 {
    LEFT + (RIGHT - LEFT) * multiple.log10() / MULTIPLES[6].log10()
}

fn y_of(share: f64) -> f64 {
    BOTTOM - (BOTTOM - TOP) * share
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64)) {
    let path = format!("M{:.1},{:.1}L{:.1},{:.1}", from.0, from.1, to.0, to.1);
    put(svg, &format!("<path d=\"{path}\" stroke=\"#dddddd\"/>"));
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, text: &str) {
    put(svg, &format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"));
}

fn put(svg: &mut String, element: &str) {
    // A string takes all.
    let _ = writeln!(svg, "{element}");
}
