//! The figures that have an aim, computed from measurements of the same repetition.

use super::migration::{Load, figure};
use super::qemu::Way;
use super::record::{Figure, Record};
use super::statistics::Spread;

/// The names of measurements that the ratios use.
pub(crate) mod names {
    pub(crate) const LIMIT: &str = "limit: ib_write_bw, the best shape";
    pub(crate) const LIMIT_TCP: &str = "limit: plain TCP, many streams, between two threads";
    pub(crate) const LIMIT_LANES: &str = "limit beside the lanes";
    pub(crate) const LIMIT_LANES_UNCACHED: &str = "limit beside the lanes, in memory that no cache holds";
    pub(crate) const LIMIT_IDLE: &str = "limit beside the idle guest";
    pub(crate) const LIMIT_IDLE_UNCACHED: &str = "limit beside the idle guest, in memory that no cache holds";
    pub(crate) const FITS: &str = "limit: what fits the downtime asked";
    pub(crate) const LIMIT_PAGES: &str = "limit: ib_write_bw -s 4096";
    pub(crate) const LANES: &str = "RDMA lanes, all pages";
    /// The lane counts that are compared with the default count.
    pub(crate) const LANE_COUNTS: [u8; 4] = [1, 2, 4, 8];
    pub(crate) const LANES_PAGES: &str = "RDMA lanes, every second page";
    pub(crate) const TCP_ONE: &str = "iperf3, 1 stream";
    pub(crate) const TCP_MANY: &str = "iperf3, many streams";
    pub(crate) const PLAIN_ONE: &str = "plain TCP, 1 stream";
    pub(crate) const PLAIN_MANY: &str = "plain TCP, many streams";
    pub(crate) const TCP_LANES_ONE: &str = "TCP lanes, 1 stream";
    pub(crate) const TCP_LANES_MANY: &str = "TCP lanes, many streams";
    pub(crate) const READ: &str = "plain read of memory";
    pub(crate) const ZERO_TEST: &str = "zero test of zero pages";
    pub(crate) const OWN_CPU: &str = "RDMA, both ends: own CPU";
    pub(crate) const ZEROS: &str = "guest of zeros: on the wire";
    pub(crate) const OURS_RDMA: &str = "sterna rdma";
    pub(crate) const OURS_TCP: &str = "sterna tcp";
    pub(crate) const QEMU_BY_RDMA: &str = "QEMU by sterna rdma";
    pub(crate) const QEMU_NAMES: &str = "limit: QEMU writes all RAM of the idle guest, none is sent";
    pub(crate) const QEMU_BY_TCP: &str = "QEMU by sterna tcp";

    pub(crate) fn lanes(count: u8) -> String {
        format!("RDMA lanes, all pages, --lanes {count}")
    }

    pub(crate) fn first_byte(gib: u64) -> String {
        format!("first byte, {gib} GiB guest")
    }
}

/// The aim of a figure.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Aim {
    AtLeast(f64),
    AtMost(f64),
}

impl Aim {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(aim) => value >= aim,
            Self::AtMost(aim) => value <= aim,
        }
    }
}

impl std::fmt::Display for Aim {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(aim) => write!(formatter, "≥ {aim}"),
            Self::AtMost(aim) => write!(formatter, "≤ {aim}"),
        }
    }
}

/// A figure with an aim, over all repetitions.
#[derive(Clone, Debug)]
pub(crate) struct Ratio {
    pub(crate) name: &'static str,
    pub(crate) aim: Aim,
    /// One value for each repetition that has all measurements.
    pub(crate) values: Vec<f64>,
    /// Why a repetition has no value.
    pub(crate) missing: Vec<String>,
}

impl Ratio {
    pub(crate) fn spread(&self) -> Option<Spread> {
        Spread::of(&self.values)
    }

    /// Whether the median meets the aim; `None` without a median.
    pub(crate) fn is_met(&self) -> Option<bool> {
        self.spread().map(|spread| self.aim.is_met(spread.median))
    }

    fn new(
        record: &Record,
        name: &'static str,
        aim: Aim,
        parts: &[&str],
        of: impl Fn(&[f64]) -> f64,
    ) -> Self {
        let (mut values, mut missing) = (Vec::new(), Vec::new());
        for repetition in 0..record.repetitions() {
            let parts: Result<Vec<f64>, String> =
                parts.iter().map(|part| record.value(part, repetition)).collect();
            match parts.map(|parts| of(&parts)) {
                Ok(value) if value.is_finite() => values.push(value),
                Ok(_) => missing.push("divided by nothing".to_owned()),
                Err(why) if missing.contains(&why) => {}
                Err(why) => missing.push(why),
            }
        }
        Self { name, aim, values, missing }
    }
}

/// All ratios, in the order of the table.
pub(crate) fn ratios(record: &Record, ram_bytes: u64, downtime_ms: u32) -> Vec<Ratio> {
    let by = |parts: &[f64]| parts[0] / parts[1];
    let total = |load, by: &str| figure(load, by, "total");
    let (ours, pinned) = (total(Load::Idle, names::OURS_RDMA), total(Load::Idle, Way::RdmaPinAll.name()));
    let (registered, wrote) =
        (total(Load::Idle, Way::Rdma.name()), figure(Load::Loop, names::OURS_RDMA, "downtime"));
    let (ours_tcp, multifd) = (total(Load::Idle, names::OURS_TCP), total(Load::Idle, Way::Multifd.name()));
    let (by_rdma, by_tcp) = (total(Load::Idle, names::QEMU_BY_RDMA), total(Load::Idle, names::QEMU_BY_TCP));
    let destination = |by: &str| figure(Load::Idle, by, "CPU of the destination");
    let (cpu_by_rdma, cpu_multifd) = (destination(names::QEMU_BY_RDMA), destination(Way::Multifd.name()));
    let loop_by_rdma = figure(Load::Loop, names::QEMU_BY_RDMA, "downtime");
    let best_count = best_count(record);
    let first_bytes = [1, 2, 4, 8].map(names::first_byte);
    let ram_mb = ram_bytes as f64 / 1e6;
    let ratio =
        |name, aim, parts: &[&str], of: &dyn Fn(&[f64]) -> f64| Ratio::new(record, name, aim, parts, of);
    vec![
        ratio(
            "bulk RDMA throughput / best ib_write_bw",
            Aim::AtLeast(0.95),
            &[names::LANES, names::LIMIT_LANES],
            &by,
        ),
        ratio(
            "bulk RDMA throughput / best ib_write_bw in memory that no cache holds",
            Aim::AtLeast(0.95),
            &[names::LANES, names::LIMIT_LANES_UNCACHED],
            &by,
        ),
        ratio(
            "bulk RDMA throughput by default / with the best of 1, 2, 4, 8 lanes",
            Aim::AtLeast(0.95),
            &[names::LANES, &best_count],
            &by,
        ),
        ratio(
            "scattered 4 KiB pages / ib_write_bw -s 4096, same depth and list",
            Aim::AtLeast(0.95),
            &[names::LANES_PAGES, names::LIMIT_PAGES],
            &by,
        ),
        ratio(
            "idle guest: total time / (RAM ÷ limit)",
            Aim::AtMost(1.15),
            &[&ours, names::LIMIT_IDLE],
            &|parts| parts[0] / 1e3 / (ram_mb / parts[1]),
        ),
        ratio(
            "idle guest: total time / (RAM ÷ limit in memory that no cache holds)",
            Aim::AtMost(1.15),
            &[&ours, names::LIMIT_IDLE_UNCACHED],
            &|parts| parts[0] / 1e3 / (ram_mb / parts[1]),
        ),
        ratio("idle guest: QEMU rdma-pin-all / sterna rdma", Aim::AtLeast(1.5), &[&pinned, &ours], &by),
        ratio("idle guest: QEMU rdma / sterna rdma", Aim::AtLeast(5.0), &[&registered, &ours], &by),
        ratio("idle guest: QEMU tcp, multifd 4 / sterna tcp", Aim::AtLeast(1.0), &[&multifd, &ours_tcp], &by),
        ratio(
            "idle guest of QEMU: sterna rdma / QEMU rdma-pin-all",
            Aim::AtMost(1.0),
            &[&by_rdma, &pinned],
            &by,
        ),
        ratio("idle guest of QEMU: sterna rdma / QEMU rdma", Aim::AtMost(0.5), &[&by_rdma, &registered], &by),
        ratio(
            "idle guest of QEMU: sterna tcp / QEMU tcp, multifd 4",
            Aim::AtMost(1.0),
            &[&by_tcp, &multifd],
            &by,
        ),
        ratio(
            "idle guest of QEMU: CPU of the destination, sterna rdma / QEMU tcp, multifd 4",
            Aim::AtMost(0.5),
            &[&cpu_by_rdma, &cpu_multifd],
            &by,
        ),
        ratio(
            "guest of QEMU dirtying 100 MiB in a loop, sterna rdma: downtime / downtime asked",
            Aim::AtMost(1.0),
            &[&loop_by_rdma],
            &|parts| parts[0] / f64::from(downtime_ms),
        ),
        ratio(
            "guest dirtying 100 MiB in a loop: downtime / downtime asked",
            Aim::AtMost(1.0),
            &[&wrote],
            &|parts| parts[0] / f64::from(downtime_ms),
        ),
        ratio(
            "own CPU seconds per GiB under RDMA, both ends, the kernel's apart",
            Aim::AtMost(0.05),
            &[names::OWN_CPU],
            &|parts| parts[0],
        ),
        ratio(
            "first byte: slowest / fastest of guests with 1, 2, 4, 8 GiB",
            Aim::AtMost(1.2),
            &first_bytes.each_ref().map(String::as_str),
            &|parts| {
                let slowest = parts.iter().copied().fold(f64::MIN, f64::max);
                slowest / parts.iter().copied().fold(f64::MAX, f64::min)
            },
        ),
        ratio("guest of zeros: bytes on the wire / RAM", Aim::AtMost(0.001), &[names::ZEROS], &|parts| {
            parts[0] / ram_mb
        }),
        ratio("zero test / plain read of memory", Aim::AtLeast(0.9), &[names::ZERO_TEST, names::READ], &by),
        ratio(
            "TCP lane / plain TCP of as much memory, 1 stream",
            Aim::AtLeast(0.95),
            &[names::TCP_LANES_ONE, names::PLAIN_ONE],
            &by,
        ),
        ratio(
            "TCP lanes / plain TCP of as much memory, as many streams",
            Aim::AtLeast(0.95),
            &[names::TCP_LANES_MANY, names::PLAIN_MANY],
            &by,
        ),
        ratio(
            "TCP lane / iperf3, 1 stream",
            Aim::AtLeast(0.95),
            &[names::TCP_LANES_ONE, names::TCP_ONE],
            &by,
        ),
        ratio(
            "TCP lanes / iperf3, as many streams",
            Aim::AtLeast(0.95),
            &[names::TCP_LANES_MANY, names::TCP_MANY],
            &by,
        ),
    ]
}

/// The number of lanes that was the fastest over all repetitions: taking the best of each repetition would
/// reward luck.
fn best_count(record: &Record) -> String {
    let median = |name: &String| {
        let figure = record.figures().iter().find(|figure| figure.name == *name);
        figure.and_then(Figure::spread).map_or(f64::MIN, |spread| spread.median)
    };
    let best = names::LANE_COUNTS
        .map(names::lanes)
        .into_iter()
        .max_by(|one, other| median(one).total_cmp(&median(other)));
    best.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_of_one_repetition() {
        let mut record = Record::default();
        for (repetition, (lanes, limit)) in [(90.0, 100.0), (190.0, 200.0)].into_iter().enumerate() {
            record.begin(repetition);
            record.note(names::LANES, "MB/s", Ok(lanes));
            record.note(names::LIMIT_LANES, "MB/s", Ok(limit));
        }
        let ratio = &ratios(&record, 1 << 30, 100)[0];
        assert_eq!(ratio.values, [0.9, 0.95]);
        assert_eq!(ratio.is_met(), Some(false));
    }

    #[test]
    fn what_failed_makes_no_ratio_and_is_told_once() {
        let mut record = Record::default();
        for repetition in 0..3 {
            record.begin(repetition);
            record.note(names::LANES, "MB/s", Ok(90.0));
            record.note(names::LIMIT_LANES, "MB/s", Err("ib_write_bw is not installed".into()));
        }
        let ratio = &ratios(&record, 1 << 30, 100)[0];
        assert!(ratio.values.is_empty() && ratio.is_met().is_none());
        assert_eq!(ratio.missing, ["ib_write_bw is not installed"]);
    }

    #[test]
    fn the_best_number_of_lanes_is_that_of_all_repetitions() {
        let mut record = Record::default();
        for (repetition, speeds) in
            [[1.0, 5.0, 9.0, 2.0], [1.0, 6.0, 3.0, 4.0], [1.0, 7.0, 3.0, 4.0]].into_iter().enumerate()
        {
            record.begin(repetition);
            record.note(names::LANES, "MB/s", Ok(6.0));
            for (count, speed) in names::LANE_COUNTS.into_iter().zip(speeds) {
                record.note(&names::lanes(count), "MB/s", Ok(speed));
            }
        }
        let ratio = &ratios(&record, 1 << 30, 100)[2];
        assert_eq!(ratio.values, [1.2, 1.0, 6.0 / 7.0], "9 was luck");
    }

    #[test]
    fn the_total_time_is_held_against_the_limit() {
        let mut record = Record::default();
        record.note(&figure(Load::Idle, names::OURS_RDMA, "total"), "ms", Ok(2200.0));
        record.note(names::LIMIT_IDLE, "MB/s", Ok((1u64 << 30) as f64 / 2e6));
        let ratio = &ratios(&record, 1 << 30, 100)[4];
        assert!((ratio.values[0] - 1.1).abs() < 1e-9 && ratio.is_met() == Some(true), "{ratio:?}");
    }
}
