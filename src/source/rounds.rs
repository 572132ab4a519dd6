//! One round: from bitmap words to lanes.

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::ThreadPool;
use rayon::prelude::*;

use super::{Cancel, MigrationFailure};
use crate::dirty::{DirtyBitmap, DirtyLog, Stripe, Stripes};
use crate::memory::{GuestRam, PageRun, Runs};
use crate::transport::Lane;

/// What a round sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) pages: u64,
    /// Pages that were zero or never touched, and so not sent.
    pub(crate) zero_pages: u64,
}

/// What is the same in every round.
pub(super) struct Rounds<'migration> {
    pub(super) ram: &'migration GuestRam,
    pub(super) log: &'migration dyn DirtyLog,
    pub(super) stripes: &'migration Stripes,
    pub(super) pool: &'migration ThreadPool,
    pub(super) cancel: &'migration Cancel,
}

impl Rounds<'_> {
    /// Sends every page set in `dirty`, each worker the stripes of its own lane, and closes the round on all lanes.
    ///
    /// In the first round the destination's memory is fresh, so pages that are zero here need not travel.
    pub(super) fn send(
        &self,
        round: u32,
        dirty: &DirtyBitmap,
        lanes: &mut [Box<dyn Lane>],
    ) -> Result<Sent, MigrationFailure> {
        let first = round == 1;
        // Set by the first lane that fails, so that the others do not send the rest of the round for nothing.
        let stop = AtomicBool::new(false);
        self.pool.install(|| {
            lanes
                .par_iter_mut()
                .with_max_len(1)
                .enumerate()
                .map(|(index, lane)| {
                    let mut sent = Sent::default();
                    let mut send_all = || {
                        for stripe in self.stripes.of_lane(index) {
                            self.cancel.check()?;
                            if stop.load(Ordering::Relaxed) {
                                return Ok(());
                            }
                            self.send_stripe(stripe, dirty, lane.as_mut(), first, &mut sent)?;
                        }
                        Ok(lane.fence(round)?)
                    };
                    let result: Result<(), MigrationFailure> = send_all();
                    result.inspect_err(|_| stop.store(true, Ordering::Relaxed)).map(|()| sent)
                })
                .try_reduce(Sent::default, |a, b| {
                    Ok(Sent { pages: a.pages + b.pages, zero_pages: a.zero_pages + b.zero_pages })
                })
        })
    }

    fn send_stripe(
        &self,
        stripe: Stripe,
        dirty: &DirtyBitmap,
        lane: &mut dyn Lane,
        first: bool,
        sent: &mut Sent,
    ) -> Result<(), MigrationFailure> {
        let words = stripe.words(dirty.words(stripe.region));
        if words.iter().all(|&word| word == 0) {
            return Ok(());
        }
        // Before any page of it is read, so that a write from here on is seen by the next harvest.
        self.log.rearm(stripe.region, stripe.first_page, words)?;
        for (first_page, pages) in Runs::new(words) {
            let run = PageRun { region: stripe.region, first_page: stripe.first_page + first_page, pages };
            let sent_pages =
                if first { self.send_touched(run, lane)? } else { lane.write(run).map(|()| run.pages)? };
            sent.pages += sent_pages;
            sent.zero_pages += run.pages - sent_pages;
        }
        Ok(())
    }

    /// Sends the pages of a run that are not zero; returns how many.
    fn send_touched(&self, run: PageRun, lane: &mut dyn Lane) -> Result<u64, MigrationFailure> {
        let mut pages_sent = 0;
        for touched in self.ram.regions()[run.region].touched(run)? {
            let mut next = PageRun { pages: 0, ..touched };
            for (page, bytes) in (touched.first_page..).zip(self.ram.slice(touched)?.pages()) {
                if !bytes.is_zero() {
                    next.pages += 1;
                    continue;
                }
                pages_sent += send_some(lane, next)?;
                next = PageRun { first_page: page + 1, pages: 0, ..next };
            }
            pages_sent += send_some(lane, next)?;
        }
        Ok(pages_sent)
    }
}

fn send_some(lane: &mut dyn Lane, run: PageRun) -> Result<u64, MigrationFailure> {
    if run.pages > 0 {
        lane.write(run)?;
    }
    Ok(run.pages)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::dirty::{DirtyError, SoftwareLog};
    use crate::transport::TransportError;

    /// What happened, in order: shared by a log and a lane that write it down.
    type Journal = Arc<Mutex<Vec<String>>>;

    #[derive(Debug)]
    struct NotedLane(Journal);

    impl Lane for NotedLane {
        fn write(&mut self, run: PageRun) -> Result<(), TransportError> {
            self.0.lock().unwrap().push(format!("write {}+{}", run.first_page, run.pages));
            Ok(())
        }

        fn fence(&mut self, round: u32) -> Result<(), TransportError> {
            self.0.lock().unwrap().push(format!("fence {round}"));
            Ok(())
        }
    }

    #[derive(Debug)]
    struct NotedLog(Journal);

    impl DirtyLog for NotedLog {
        fn start(&self) -> Result<(), DirtyError> {
            Ok(())
        }

        fn harvest(&self, _region: usize, _bits: &mut [u64]) -> Result<(), DirtyError> {
            Ok(())
        }

        fn rearm(&self, _region: usize, first_page: u64, bits: &[u64]) -> Result<(), DirtyError> {
            self.0.lock().unwrap().push(format!("rearm {first_page} {bits:x?}"));
            Ok(())
        }

        fn stop(&self) -> Result<(), DirtyError> {
            Ok(())
        }
    }

    fn memory() -> GuestMemoryMmap<AtomicBitmap> {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 100 * 4096)]).unwrap()
    }

    fn send(round: u32, dirty: &DirtyBitmap, memory: &GuestMemoryMmap<AtomicBitmap>) -> (Sent, Vec<String>) {
        let journal = Journal::default();
        let ram = GuestRam::from_vm_memory(memory).unwrap();
        let rounds = Rounds {
            ram: &ram,
            log: &NotedLog(journal.clone()),
            stripes: &Stripes::new(&ram.layout(), 1),
            pool: &rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap(),
            cancel: &Cancel::default(),
        };
        let mut lanes: Vec<Box<dyn Lane>> = vec![Box::new(NotedLane(journal.clone()))];
        let sent = rounds.send(round, dirty, &mut lanes).unwrap();
        let notes = journal.lock().unwrap().clone();
        (sent, notes)
    }

    #[test]
    fn pages_are_watched_again_before_they_are_written_and_the_fence_comes_last() {
        let memory = memory();
        let ram = GuestRam::from_vm_memory(&memory).unwrap();
        let mut dirty = DirtyBitmap::new(&ram.layout());
        memory.write_obj(1u8, GuestAddress(3 * 4096)).unwrap();
        memory.write_obj(1u8, GuestAddress(4 * 4096)).unwrap();
        memory.write_obj(1u8, GuestAddress(90 * 4096)).unwrap();
        SoftwareLog::new(&memory).harvest(0, dirty.words_mut(0)).unwrap();
        let (sent, notes) = send(2, &dirty, &memory);
        assert_eq!(sent, Sent { pages: 3, zero_pages: 0 });
        assert_eq!(notes, ["rearm 0 [18, 4000000]", "write 3+2", "write 90+1", "fence 2"]);
    }

    #[test]
    fn only_the_first_round_leaves_zero_pages_out() {
        let memory = memory();
        let ram = GuestRam::from_vm_memory(&memory).unwrap();
        let mut dirty = DirtyBitmap::new(&ram.layout());
        dirty.fill();
        memory.write_obj(1u8, GuestAddress(7 * 4096)).unwrap();
        memory.write_obj(1u8, GuestAddress(100 * 4096 - 1)).unwrap();
        let (sent, notes) = send(1, &dirty, &memory);
        assert_eq!(sent, Sent { pages: 2, zero_pages: 98 });
        assert_eq!(notes[1..], ["write 7+1", "write 99+1", "fence 1"]);
        let (sent, notes) = send(2, &dirty, &memory);
        assert_eq!(sent, Sent { pages: 100, zero_pages: 0 });
        assert_eq!(notes[1..], ["write 0+100", "fence 2"]);
    }
}
