//! Measurements beside their limits. A turn is so short that the machine hardly changes during it, and the
//! order changes from turn to turn, so that no position favours a routine.

use sterna::transport::rdma::RdmaProvider;
use sterna::transport::tcp::TcpProvider;

use super::comparison::Comparison;
use super::failure::Failure;
use super::limit::{self, Shape};
use super::ratios::names;
use super::{memory, plain, sterna_runs, tcp};

/// The fastest shapes of the limit on this device, or the reason for their absence.
#[derive(Clone, Debug)]
pub(super) struct Shapes {
    /// Of all shapes.
    pub(super) best: Result<Shape, String>,
    /// Of the shapes with buffers that fit no cache.
    pub(super) uncached: Result<Shape, String>,
}

/// The RDMA measurements of a turn.
#[derive(Clone, Copy, Debug)]
enum Rdma {
    /// Lanes: the default number, or this one.
    Lanes(Option<u8>),
    Limit,
    LimitUncached,
    LimitPages,
}

impl Comparison<'_> {
    /// The measurements that are not migrations.
    pub(super) fn speeds(&mut self, shapes: &Shapes) {
        if self.setup.device().is_ok() {
            self.rdma_lanes(shapes);
        }
        for (streams, names) in [
            (1, [names::TCP_ONE, names::PLAIN_ONE, names::TCP_LANES_ONE]),
            (self.args.streams, [names::TCP_MANY, names::PLAIN_MANY, names::TCP_LANES_MANY]),
        ] {
            self.tcp_lanes(streams, names);
        }
        let memory = memory::zero_test();
        self.note(names::READ, "MB/s", Ok::<_, Failure>(memory.read));
        self.note(names::ZERO_TEST, "MB/s", Ok::<_, Failure>(memory.zero_test));
        if self.setup.device().is_err() {
            return;
        }
        let own_cpu = sterna_runs::own_cpu_s_per_gib(&self.setup);
        self.note(names::OWN_CPU, "s/GiB", own_cpu);
        let zeros = sterna_runs::zeros_mb(&self.setup);
        self.note(names::ZEROS, "MB", zeros);
    }

    fn rdma_lanes(&mut self, shapes: &Shapes) {
        let mut all = vec![Rdma::Lanes(None), Rdma::Limit, Rdma::LimitUncached, Rdma::LimitPages];
        all.extend(names::LANE_COUNTS.map(|count| Rdma::Lanes(Some(count))));
        // Set once lanes have run.
        let mut queue_pairs = 1;
        for _ in 0..self.turns() {
            for &what in &all {
                match what {
                    Rdma::Lanes(None) => {
                        let lanes = sterna_runs::lanes(&self.setup, RdmaProvider::default(), None);
                        queue_pairs = lanes.as_ref().map_or(queue_pairs, |lanes| lanes.lanes.into());
                        self.note(names::LANES, "MB/s", lanes.as_ref().map(|lanes| lanes.all_pages));
                        self.note(names::LANES_PAGES, "MB/s", lanes.map(|lanes| lanes.every_second_page));
                    }
                    Rdma::Lanes(Some(count)) => {
                        let lanes = sterna_runs::lanes(&self.setup, RdmaProvider::default(), Some(count));
                        self.note(&names::lanes(count), "MB/s", lanes.map(|lanes| lanes.all_pages));
                    }
                    Rdma::Limit => self.note_limit(names::LIMIT_LANES, &shapes.best),
                    Rdma::LimitUncached => self.note_limit(names::LIMIT_LANES_UNCACHED, &shapes.uncached),
                    Rdma::LimitPages => self.note_limit(names::LIMIT_PAGES, &Ok(limit::pages(queue_pairs))),
                }
            }
            all.reverse();
        }
    }

    fn tcp_lanes(&mut self, streams: u8, [iperf3, plain, ours]: [&'static str; 3]) {
        let (address, bytes, rounds) =
            (self.setup.address(), self.limit_bytes(), sterna_runs::lane_rounds(&self.setup));
        let mut all = [iperf3, plain, ours];
        for _ in 0..self.turns() {
            for name in all {
                let speed = if name == iperf3 {
                    tcp::speed(address, streams, bytes)
                } else if name == plain {
                    plain::speed(address, streams, sterna_runs::LANES_RAM_BYTES, rounds)
                } else {
                    let lanes = sterna_runs::lanes(&self.setup, TcpProvider, Some(streams));
                    lanes.map(|lanes| lanes.all_pages)
                };
                self.note(name, "MB/s", speed);
            }
            all.reverse();
        }
    }

    pub(super) fn first_bytes(&mut self) {
        let mut guests_gib = [1, 2, 4, 8];
        for _ in 0..self.turns() {
            for gib in guests_gib {
                let first_byte = sterna_runs::first_byte_ms(&self.setup, gib << 30);
                self.note(&names::first_byte(gib), "ms", first_byte);
            }
            guests_gib.reverse();
        }
    }

    fn turns(&self) -> usize {
        if self.args.quick { 1 } else { 3 }
    }
}
