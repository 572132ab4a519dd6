//! The failure matrix: every stage of a migration × every fault, each played with real processes, and its
//! required outcome.
//!
//! [`cells::cells`] is the matrix. A fault without a row, or a row without a cell for each stage, does not
//! compile. In no cell may the guest run on both hosts at any moment; where it stays, it must be whole and
//! must be able to move afterwards.
//!
//! In these tests pages travel over TCP. What only RDMA can lack (a device, memory that may be locked, a key,
//! a lane that falls back to TCP) is in `tests/rdma.rs` and `tests/refusals.rs`; a source that writes on
//! after the guest was given away is in `tests/late_write.rs`.
#![cfg(feature = "cli")]

#[path = "../common/mod.rs"]
mod common;

mod cells;
mod scene;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::thread;

use cells::{Cell, Fault, Stage, cells};
use scene::Scene;

/// A cell mostly waits: for a silent peer, or for a process to end.
const AT_ONCE: usize = 6;

#[test]
fn every_cell_ends_as_the_matrix_says() {
    let only = std::env::var("STERNA_MATRIX").ok();
    let chosen =
        |name: &str| only.as_ref().is_none_or(|only| only.split(',').any(|part| name.contains(part)));
    let all = Fault::ALL.iter().flat_map(|&fault| {
        Stage::ALL.iter().zip(cells(fault)).map(move |(&stage, cell)| (fault, stage, cell))
    });
    let to_play: VecDeque<_> =
        all.filter(|(fault, stage, _)| chosen(&format!("{fault:?}/{stage:?}"))).collect();
    let (count, queue, failed) = (to_play.len(), Mutex::new(to_play), Mutex::new(Vec::new()));
    assert!(count > 0, "no cell has {only:?} in its name");
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some((fault, stage, cell)) = next else { return };
                    if let Cell::Never(why) = cell {
                        println!("{fault:?}/{stage:?}: not played: {why}");
                        continue;
                    }
                    if catch_unwind(AssertUnwindSafe(|| Scene::play(stage, fault, cell))).is_err() {
                        let cell = format!("{fault:?}/{stage:?} was to be {cell:?}");
                        failed.lock().unwrap_or_else(PoisonError::into_inner).push(cell);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    assert!(
        failed.is_empty(),
        "{} of {count} cells (STERNA_MATRIX=NAME plays one): {failed:#?}",
        failed.len()
    );
}
