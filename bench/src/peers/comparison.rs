//! What a comparison has found so far, and the limit, whose drift ends it.

use super::arguments::{Part, PeersArgs};
use super::limit::{self, Shape};
use super::migration::{By, Load};
use super::plain;
use super::record::Record;
use super::setup::Setup;
use super::statistics::Spread;
use super::sterna_runs;

/// A comparison in progress.
pub(super) struct Comparison<'args> {
    pub(super) args: &'args PeersArgs,
    pub(super) setup: Setup,
    pub(super) record: Record,
    /// Every measurement of the limit, in MB/s.
    pub(super) limits: Vec<f64>,
    /// Migrations that did not converge: one attempt is enough and takes long.
    pub(super) diverged: Vec<(Load, By)>,
}

impl Comparison<'_> {
    pub(super) fn wants(&self, part: Part) -> bool {
        self.args.only.is_empty() || self.args.only.contains(&part)
    }

    /// Measures the limit, plain TCP where RDMA is left out; fails if it has drifted too far.
    pub(super) fn limit(&mut self, shape: &Result<Shape, String>) -> Result<Result<f64, String>, String> {
        let speed = match self.setup.device() {
            Ok(device) => shape.clone().and_then(|shape| {
                limit::speed(device, shape, self.limit_bytes()).map_err(|failure| failure.to_string())
            }),
            Err(_) => {
                let rounds = sterna_runs::lane_rounds(&self.setup);
                plain::speed(self.setup.address(), self.args.streams, sterna_runs::LANES_RAM_BYTES, rounds)
                    .map_err(|failure| failure.to_string())
            }
        };
        match &speed {
            Ok(speed) => {
                eprintln!("  the limit: {speed:.0} MB/s");
                self.limits.push(*speed);
            }
            Err(failure) => eprintln!("  the limit: {failure}"),
        }
        let drift = Spread::of(&self.limits).map_or(0.0, Spread::drift);
        if drift > f64::from(self.args.drift_max) / 100.0 {
            return Err(format!(
                "the limit drifted by {:.0} % between its measurements ({:.0?} MB/s), so the ratios would mean nothing: \
                 something else used this machine. Run it again with nothing beside it, or see --drift-max",
                drift * 100.0,
                self.limits
            ));
        }
        Ok(speed)
    }

    pub(super) fn limit_bytes(&self) -> u64 {
        if self.args.quick { 1 << 30 } else { 2 << 30 }
    }

    /// Measures a limit once, beside the figures that are compared with it.
    pub(super) fn note_limit(&mut self, name: &str, shape: &Result<Shape, String>) {
        let speed = shape.clone().and_then(|shape| {
            let once = |device| limit::once(device, shape, self.limit_bytes() / 2);
            self.setup.device().and_then(once).map_err(|failure| failure.to_string())
        });
        self.note(name, "MB/s", speed);
    }

    pub(super) fn note<E: ToString>(&mut self, name: &str, unit: &'static str, outcome: Result<f64, E>) {
        let outcome = outcome.map_err(|failure| failure.to_string());
        match &outcome {
            Ok(value) => eprintln!("  {name}: {value:.3} {unit}"),
            Err(failure) => eprintln!("  {name}: {failure}"),
        }
        self.record.note(name, unit, outcome);
    }
}
