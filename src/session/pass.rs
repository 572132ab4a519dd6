//! One round: from bitmap words to lanes.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rayon::ThreadPool;
use rayon::prelude::*;

use super::error::SessionError;
use super::lane_stats::LaneWithStats;
use super::send_gate::SendGate;
use crate::convergence::LaneLoad;
use crate::dirty::{DirtyBitmap, DirtyLog, Stripe, Stripes};
use crate::memory::{GuestRam, PageRun, RunEdges, TouchedSearch};
use crate::panics::caught_or;
use crate::poison::IgnorePoison;
use crate::transport::{Lane, Registration};

/// A pass over the dirty pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pass {
    /// Its number at both ends, from 1.
    pub(crate) number: u32,
    /// The destination's memory is fresh, and all pages count as dirty: pages that are zero at the source
    /// need not travel.
    pub(crate) skips_zeros: bool,
}

/// The result of a pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) pages: u64,
    /// Pages that were zero or never touched, and so not sent.
    pub(crate) zero_pages: u64,
    pub(crate) lanes: Vec<LaneLoad>,
    /// When a lane took the first page.
    pub(crate) first_page: Option<Instant>,
}

/// The context that all rounds share.
pub(crate) struct PrecopyPass<'migration> {
    pub(crate) ram: &'migration GuestRam,
    /// `None` in the last round, which no harvest follows: the guest is paused and writes nothing.
    pub(crate) log: Option<&'migration dyn DirtyLog>,
    pub(crate) stripes: &'migration Stripes,
    pub(crate) pool: &'migration ThreadPool,
    pub(crate) gate: SendGate<'migration>,
    /// The registration that works beside the lanes.
    pub(crate) registration: Option<&'migration dyn Registration>,
}

/// A lane in a round.
struct LaneRound<'lane> {
    lane_stats: LaneWithStats<'lane>,
    pages: Pages,
    /// Only if pages of zeros are left out.
    search: Option<TouchedSearch>,
    edges: RunEdges,
}

/// Pages of one lane in one round.
#[derive(Clone, Copy, Default)]
struct Pages {
    sent: u64,
    zero: u64,
}

impl PrecopyPass<'_> {
    /// Sends every page set in `dirty`, each worker the stripes of its own lane, and closes the round on all
    /// lanes.
    pub(crate) fn send(
        &self,
        pass: Pass,
        dirty: &DirtyBitmap,
        lanes: &mut [Box<dyn Lane>],
    ) -> Result<Sent, SessionError> {
        // Set by the first lane that fails or panics, so that the others do not send the rest of the round in
        // vain.
        let stop = AtomicBool::new(false);
        let cause = Mutex::new(None);
        let check = || {
            // This error never becomes the cause, because the cause is recorded before.
            if stop.load(Ordering::Acquire) { Err(SessionError::Cancelled) } else { (self.gate.check)() }
        };
        let gate = SendGate { check: &check, ..self.gate };
        let lanes = self.pool.install(|| {
            lanes
                .par_iter_mut()
                .with_max_len(1)
                .enumerate()
                .map(|(index, lane)| {
                    let result = caught_or(|| self.send_lane(pass, dirty, (index, lane.as_mut()), gate));
                    result.map_err(|error| {
                        let mut cause = cause.lock().ignore_poison();
                        // Errors after the first are its consequences; but an error that forbids other lanes
                        // counts more.
                        let forbids = !error.may_fall_back() && !matches!(error, SessionError::Cancelled);
                        if cause.as_ref().is_none_or(|first: &SessionError| first.may_fall_back() && forbids)
                        {
                            *cause = Some(error);
                        }
                        drop(cause);
                        stop.store(true, Ordering::Release);
                        // Lanes need no longer wait for memory to be registered.
                        if let Some(registration) = self.registration {
                            registration.end();
                        }
                    })
                })
                .collect::<Result<Vec<_>, ()>>()
        });
        let lanes = match (lanes, cause.into_inner().ignore_poison()) {
            (Ok(lanes), None) => lanes,
            (_, cause) => return Err(cause.unwrap_or(SessionError::Cancelled)),
        };
        let sum = |of: fn(&Pages) -> u64| lanes.iter().map(|(pages, ..)| of(pages)).sum();
        Ok(Sent {
            pages: sum(|pages| pages.sent),
            zero_pages: sum(|pages| pages.zero),
            lanes: lanes.iter().map(|(_, load, _)| *load).collect(),
            first_page: lanes.iter().filter_map(|(.., first_page)| *first_page).min(),
        })
    }

    fn send_lane(
        &self,
        Pass { number, skips_zeros }: Pass,
        dirty: &DirtyBitmap,
        (index, lane): (usize, &mut dyn Lane),
        gate: SendGate<'_>,
    ) -> Result<(Pages, LaneLoad, Option<Instant>), SessionError> {
        let mut lane = LaneRound {
            lane_stats: LaneWithStats::new(lane, gate, Instant::now(), skips_zeros),
            pages: Pages::default(),
            search: skips_zeros.then(TouchedSearch::default),
            edges: RunEdges::default(),
        };
        // Empty unless pages of zeros are left out: other passes allocate nothing for it.
        let mut holes = Vec::new();
        for stripe in self.stripes.of_lane(index, dirty) {
            (gate.check)()?;
            if holes.len() < HOLES_MAX
                && lane.search.as_ref().is_some_and(|search| search.expects_hole(run_of(&stripe)))
            {
                self.clear(stripe)?;
                lane.lane_stats.end_stripe();
                holes.push(stripe);
                continue;
            }
            self.pass(&mut holes, &mut lane)?;
            for part in stripe.parts() {
                self.clear(part)?;
                self.send_watched(part, &mut lane)?;
            }
            lane.lane_stats.end_stripe();
        }
        self.pass(&mut holes, &mut lane)?;
        let (load, first_page) = lane.lane_stats.fence(number)?;
        Ok((lane.pages, load, first_page))
    }

    /// Skips stripes without a touched page once they are cleared, or sends those that were touched
    /// meanwhile.
    fn pass(&self, holes: &mut Vec<Stripe<'_>>, lane: &mut LaneRound<'_>) -> Result<(), SessionError> {
        let (Some(search), [Some(first), Some(last)]) =
            (&mut lane.search, [holes.first(), holes.last()].map(|hole| hole.map(run_of)))
        else {
            return Ok(());
        };
        let all = PageRun { pages: last.first_page + last.pages - first.first_page, ..first };
        let touched = search.any_touched(&self.ram.regions()[all.region], all)?;
        for stripe in holes.drain(..) {
            if touched {
                self.send_watched(stripe, lane)?;
                lane.lane_stats.end_stripe();
            } else {
                lane.pages.zero += stripe.dirty_pages();
            }
        }
        Ok(())
    }

    /// Makes the log track the pages of a stripe again, before reading any: the next harvest then sees any
    /// later write.
    fn clear(&self, stripe: Stripe<'_>) -> Result<(), SessionError> {
        let Some(log) = self.log else { return Ok(()) };
        if let Some(progress) = self.gate.progress {
            progress.cleared(stripe.dirty_pages());
        }
        Ok(log.clear(stripe.region, stripe.first_page, stripe.words)?)
    }

    fn send_watched(&self, stripe: Stripe<'_>, lane: &mut LaneRound<'_>) -> Result<(), SessionError> {
        let LaneRound { lane_stats, pages, search, edges } = lane;
        for (first_page, count) in stripe.runs(edges) {
            let run =
                PageRun { region: stripe.region, first_page: stripe.first_page + first_page, pages: count };
            let sent = match search {
                Some(search) => self.send_touched(run, search, lane_stats)?,
                None => send_all(lane_stats, run)?,
            };
            pages.sent += sent;
            pages.zero += run.pages - sent;
        }
        Ok(())
    }

    /// Sends the pages of a run that are not zero; returns their number.
    fn send_touched(
        &self,
        run: PageRun,
        search: &mut TouchedSearch,
        lane: &mut LaneWithStats<'_>,
    ) -> Result<u64, SessionError> {
        let mut pages_sent = 0;
        for touched in search.touched(&self.ram.regions()[run.region], run)? {
            let mut next = PageRun { pages: 0, ..touched };
            for (page, bytes) in (touched.first_page..).zip(self.ram.slice(touched)?.pages()) {
                if !bytes.is_zero() {
                    next.pages += 1;
                    continue;
                }
                pages_sent += send_all(lane, next)?;
                next = PageRun { first_page: page + 1, pages: 0, ..next };
            }
            pages_sent += send_all(lane, next)?;
        }
        Ok(pages_sent)
    }
}

/// How many stripes a lane skips before it checks whether they are still holes: 1 GiB of guest RAM, for one
/// lane.
const HOLES_MAX: usize = 64;

fn run_of(stripe: &Stripe<'_>) -> PageRun {
    PageRun { region: stripe.region, first_page: stripe.first_page, pages: stripe.words.len() as u64 * 64 }
}

/// Sends the pages of a run, possibly none; returns their number.
fn send_all(lane: &mut LaneWithStats<'_>, run: PageRun) -> Result<u64, SessionError> {
    if run.pages > 0 {
        lane.write(run)?;
    }
    Ok(run.pages)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::super::rate_limiter::RateLimiter;
    use super::*;
    use crate::dirty::{CaughtUp, DirtyError, DirtyRegion, InitiallyDirty, SoftwareBitmap, SoftwareLog};
    use crate::transport::TransportError;

    /// The events, in order, written by a log and a lane.
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

        fn waited(&self) -> Duration {
            Duration::ZERO
        }
    }

    /// The journal, and the page that the guest writes just as it is tracked again.
    #[derive(Debug)]
    struct NotedLog<'test>(Journal, Option<(&'test GuestMemoryMmap<SoftwareBitmap>, u64)>);

    impl DirtyLog for NotedLog<'_> {
        fn start(&self) -> Result<InitiallyDirty, DirtyError> {
            Ok(InitiallyDirty::All)
        }

        fn catch_up(&self) -> Result<CaughtUp, DirtyError> {
            Ok(CaughtUp::Fully { unnamed_pages: 0 })
        }

        fn harvest(&self, _region: usize, _dirty: &mut DirtyRegion) -> Result<(), DirtyError> {
            Ok(())
        }

        fn clear(&self, _region: usize, first_page: u64, bits: &[u64]) -> Result<(), DirtyError> {
            if let Some((memory, page)) = self.1
                && (first_page..first_page + bits.len() as u64 * 64).contains(&page)
            {
                memory.write_obj(1u8, GuestAddress(page * 4096)).unwrap();
            }
            self.0.lock().unwrap().push(format!("clear {first_page} {bits:x?}"));
            Ok(())
        }

        fn stop(&self) -> Result<(), DirtyError> {
            Ok(())
        }
    }

    fn memory() -> GuestMemoryMmap<SoftwareBitmap> {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 100 * 4096)]).unwrap()
    }

    fn send(
        round: u32,
        dirty: &DirtyBitmap,
        memory: &GuestMemoryMmap<SoftwareBitmap>,
    ) -> (Sent, Vec<String>) {
        send_while_written(round, dirty, memory, None)
    }

    fn send_while_written(
        round: u32,
        dirty: &DirtyBitmap,
        memory: &GuestMemoryMmap<SoftwareBitmap>,
        written: Option<u64>,
    ) -> (Sent, Vec<String>) {
        let journal = Journal::default();
        let ram = GuestRam::from_vm_memory(memory).unwrap();
        let rounds = PrecopyPass {
            ram: &ram,
            log: Some(&NotedLog(journal.clone(), written.map(|page| (memory, page)))),
            stripes: &Stripes::new(1),
            pool: &rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap(),
            gate: SendGate { pace: &RateLimiter::default(), check: &|| Ok(()), progress: None },
            registration: None,
        };
        let mut lanes: Vec<Box<dyn Lane>> = vec![Box::new(NotedLane(journal.clone()))];
        let pass = Pass { number: round, skips_zeros: round == 1 };
        let sent = rounds.send(pass, dirty, &mut lanes).unwrap();
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
        assert_eq!(dirty.harvest(&SoftwareLog::new(&memory)).unwrap(), 3);
        let (sent, notes) = send(2, &dirty, &memory);
        assert_eq!((sent.pages, sent.zero_pages), (3, 0));
        assert_eq!(sent.lanes.iter().map(|lane| lane.bytes).collect::<Vec<_>>(), [3 * 4096]);
        assert_eq!(notes, ["clear 0 [18, 4000000]", "write 3+2", "write 90+1", "fence 2"]);
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
        assert_eq!((sent.pages, sent.zero_pages), (2, 98));
        assert_eq!(notes[1..], ["write 7+1", "write 99+1", "fence 1"]);
        let (sent, notes) = send(2, &dirty, &memory);
        assert_eq!((sent.pages, sent.zero_pages), (100, 0));
        assert_eq!(notes[1..], ["write 0+100", "fence 2"]);
    }

    #[test]
    fn a_page_of_a_hole_is_sent_if_it_is_written_as_the_lane_comes_to_it() {
        const STRIPES: u64 = 2 * HOLES_MAX as u64 + 10;
        for late in [1, 4096, 20 * 4096 + 7, STRIPES * 4096 - 1] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(STRIPES << 24).unwrap();
            let len = usize::try_from(STRIPES << 24).unwrap();
            let file = vm_memory::FileOffset::new(file, 0);
            let ranges = [(GuestAddress(0), len, Some(file))];
            let memory = GuestMemoryMmap::<SoftwareBitmap>::from_ranges_with_files(ranges).unwrap();
            memory.write_obj(1u8, GuestAddress(0)).unwrap();
            memory.write_obj(1u8, GuestAddress(100 << 24)).unwrap();
            let mut dirty = DirtyBitmap::new(&GuestRam::from_vm_memory(&memory).unwrap().layout());
            dirty.fill();
            let (sent, notes) = send_while_written(1, &dirty, &memory, Some(late));
            assert_eq!((sent.pages, sent.zero_pages), (3, STRIPES * 4096 - 3), "{late}");
            // Its stripe as a whole, or 4 MiB of the stripe.
            let of = [late / 4096 * 4096, late / 1024 * 1024].map(|first| format!("clear {first} ["));
            let watched = notes.iter().position(|note| of.iter().any(|of| note.starts_with(of)));
            let written = notes.iter().position(|note| {
                let run = note.strip_prefix("write ").and_then(|run| run.split_once('+'));
                run.is_some_and(|(first, count)| {
                    let [first, count]: [u64; 2] = [first, count].map(|number| number.parse().unwrap());
                    (first..first + count).contains(&late)
                })
            });
            assert!(watched.is_some() && watched < written, "{late}: {watched:?} {written:?}");
            let cleared = notes.iter().filter(|note| note.starts_with("clear")).count() as u64;
            assert!(
                (STRIPES..STRIPES + 40).contains(&cleared),
                "most stripes are watched again whole: {cleared}"
            );
        }
    }
}
