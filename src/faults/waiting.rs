//! Hot pages that are left for the last round.

use std::time::Duration;

use super::guest::BUSY_PAGES;
use super::naming::Naming;
use super::{Faults, Outcome, Scene, Watch};
use crate::destination::ReceiveError;
use crate::progress::Event;
use crate::source::{Options, mutant};
use crate::verify::Verify;

/// Busy and spare pages of both regions.
const HOT_PAGES: u64 = 2 * (BUSY_PAGES as u64 + 1);

/// Migrates a guest whose spare pages are written at the end of the first three rounds and never again. A
/// comparison asks for a fourth round, which leaves them out.
fn migrated(scene: &Scene, forgets: bool) -> Outcome {
    let limits = &scene.options.limits;
    let allow = |downtime| drop(limits.change(|limits| limits.downtime = downtime));
    allow(Duration::ZERO);
    let watch = Watch(|event: &Event| match *event {
        // On the thread of the migration.
        Event::Connected { .. } => {
            mutant::plant(forgets);
            scene.guest.seen.write_late(true);
        }
        Event::Round { number, .. } if !scene.guest.is_paused() => {
            match number {
                // No verdict by one limit counts for another.
                1 => allow(Duration::from_nanos(1)),
                2 => allow(Duration::from_secs(60)),
                _ => scene.guest.seen.write_late(false),
            }
            scene.guest.writes_on();
        }
        _ => {}
    });
    scene.attempt_by(&Faults::default(), &scene.options, &watch)
}

fn scene(naming: Option<Naming>) -> Scene {
    let scene = Scene::with(Options { verify: Verify::Final, ..Options::default() });
    naming.into_iter().for_each(|naming| scene.guest.seen.name_pages(naming));
    scene
}

/// A log that the kernel keeps, and a VMM that names pages.
const LOGS: [Option<Naming>; 2] =
    [None, Some(Naming { parts: 2, pauses_in_round: None, takes: Duration::ZERO })];

#[test]
fn hot_pages_wait_for_the_last_round_and_arrive_as_they_were_written_last() {
    for naming in LOGS {
        let scene = scene(naming);
        let report = scene.moved(migrated(&scene, false));
        let waiting: Vec<_> = report.rounds.iter().map(|round| round.waiting_pages).collect();
        assert_eq!(waiting[..2], [0, 0], "{naming:?}");
        assert_eq!(waiting[2], HOT_PAGES, "{naming:?}: {waiting:?}");
        assert_eq!(report.rounds[3].pages, 0, "{naming:?}: {:?}", report.rounds[3]);
        let last = report.rounds.last().expect("it has rounds");
        assert!(last.pages >= HOT_PAGES, "{naming:?}: {last:?}");
    }
}

#[test]
fn a_waiting_page_that_is_forgotten_is_found_by_a_comparison() {
    for naming in LOGS {
        let scene = scene(naming);
        let outcome = migrated(&scene, true);
        assert!(outcome.source.is_err(), "{naming:?}");
        let found = outcome.destination.map(|_| ());
        assert!(matches!(found, Err(ReceiveError::MemoryDiffers { .. })), "{naming:?}: {found:?}");
        assert!(!scene.guest.is_paused());
    }
}
