//! The migrations of a repetition: by Sterna and by QEMU, in turns.

use sterna::transport::rdma::RdmaProvider;
use sterna::transport::tcp::TcpProvider;

use super::arguments::Part;
use super::comparison::Comparison;
use super::failure::Failure;
use super::migration::{By, Load};
use super::qemu::{self, Way};
use super::ratios::names;
use super::speeds::Shapes;
use super::sterna_runs;

impl Comparison<'_> {
    /// All migrations of a repetition, in their order.
    pub(super) fn migrations(&self) -> Vec<(Load, By)> {
        let mut all = Vec::new();
        for (load, part) in [(Load::Idle, Part::Idle), (Load::Loop, Part::Loop)] {
            if !self.wants(part) {
                continue;
            }
            // Each of Sterna's migrations next to QEMU's that it is compared with.
            let all_ways = [
                By::Qemu(Way::Tcp),
                By::SternaQemuTcp,
                By::Qemu(Way::Multifd),
                By::SternaTcp,
                By::Qemu(Way::Rdma),
                By::SternaQemuRdma,
                By::SternaRdma,
                By::Qemu(Way::RdmaPinAll),
            ];
            let of_qemu = |by: &By| matches!(by, By::Qemu(_) | By::SternaQemuTcp | By::SternaQemuRdma);
            let by_rdma = |by: &By| match by {
                By::Qemu(way) => way.is_rdma(),
                By::SternaQemuRdma | By::SternaRdma | By::SternaRdmaUnthrottled => true,
                By::SternaQemuTcp | By::SternaTcp => false,
            };
            let wanted =
                |by: &By| !(self.args.without_qemu && of_qemu(by) || self.args.without_rdma && by_rdma(by));
            all.extend(all_ways.into_iter().filter(wanted).map(|by| (load, by)));
            if load == Load::Loop && !self.args.without_rdma {
                all.push((load, By::SternaRdmaUnthrottled));
            }
        }
        all
    }

    pub(super) fn migrate(&mut self, (load, by): (Load, By), shapes: &Shapes) {
        if self.diverged.contains(&(load, by)) {
            return;
        }
        // Beside the migration that is compared with it.
        if (load, by) == (Load::Idle, By::SternaRdma) {
            self.idle_limits(shapes);
            self.migrate_once((load, by));
            self.idle_limits(shapes);
        } else if (load, by) == (Load::Idle, By::SternaQemuTcp) {
            let named = qemu::time_to_name_all(&self.setup).map_err(|failure| failure.to_string());
            self.record.note(names::QEMU_NAMES, "ms", named.map(|time| time.as_secs_f64() * 1e3));
            self.migrate_once((load, by));
        } else {
            self.migrate_once((load, by));
        }
    }

    fn idle_limits(&mut self, shapes: &Shapes) {
        self.note_limit(names::LIMIT_IDLE, &shapes.best);
        self.note_limit(names::LIMIT_IDLE_UNCACHED, &shapes.uncached);
    }

    fn migrate_once(&mut self, (load, by): (Load, By)) {
        let setup = &self.setup;
        let (name, outcome) = match (by, load) {
            (By::Qemu(way), load) => (way.name(), qemu::migrate(setup, way, load)),
            (By::SternaQemuRdma, load) => (names::QEMU_BY_RDMA, qemu::migrate_by_sterna(setup, "rdma", load)),
            (By::SternaQemuTcp, load) => (names::QEMU_BY_TCP, qemu::migrate_by_sterna(setup, "tcp", load)),
            (By::SternaTcp, Load::Idle) => (names::OURS_TCP, sterna_runs::migrate(setup, "tcp")),
            (By::SternaTcp, Load::Loop) => (names::OURS_TCP, sterna_runs::busy(setup, TcpProvider, true)),
            (By::SternaRdmaUnthrottled, _) => (
                "sterna rdma, never slowing the guest",
                sterna_runs::busy(setup, RdmaProvider::default(), false),
            ),
            (By::SternaRdma, Load::Idle) => (names::OURS_RDMA, sterna_runs::migrate(setup, "rdma")),
            (By::SternaRdma, Load::Loop) => {
                (names::OURS_RDMA, sterna_runs::busy(setup, RdmaProvider::default(), true))
            }
        };
        if let Err(Failure::NotConverged(_) | Failure::NotEnded(_)) = outcome {
            self.diverged.push((load, by));
        }
        self.record.migration(load, name, outcome);
    }
}
