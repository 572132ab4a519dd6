use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::WireError;
use crate::memory::{PAGE_BYTES, PageRun};

/// The most runs that one frame carries.
pub const RUNS_MAX: usize = 256;

/// The most bytes of pages that one frame carries: 4 MiB.
pub const FRAME_BYTES_MAX: u64 = 4 << 20;

/// Length of a run in a frame, in bytes.
pub const RUN_LEN: usize = size_of::<WireRun>();

/// The head of a frame on a TCP data lane. `runs` [`WireRun`]s follow, and then the bytes of their pages in
/// that order; a frame without runs is the fence that closes a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PageFrame {
    runs: U32,
    round: U32,
}

impl PageFrame {
    /// Length in bytes.
    pub const LEN: usize = size_of::<Self>();

    /// The head of a frame of `runs` runs.
    ///
    /// # Panics
    /// If `runs` is zero or more than [`RUNS_MAX`]: a mistake of the sender.
    #[must_use]
    pub fn pages(runs: usize) -> Self {
        assert!((1..=RUNS_MAX).contains(&runs), "a frame of {runs} runs");
        Self { runs: u32::try_from(runs).unwrap_or(0).into(), round: 0.into() }
    }

    /// The fence of a round.
    #[must_use]
    pub fn fence(round: u32) -> Self {
        Self { runs: 0.into(), round: round.into() }
    }

    /// The round that this closes, if it is a fence.
    #[must_use]
    pub fn fenced_round(&self) -> Option<u32> {
        (self.runs.get() == 0).then(|| self.round.get())
    }

    /// How many runs follow.
    ///
    /// # Errors
    /// [`WireError::TooLong`] past [`RUNS_MAX`].
    pub fn runs(&self) -> Result<usize, WireError> {
        let len = usize::try_from(self.runs.get()).unwrap_or(usize::MAX);
        if len > RUNS_MAX {
            return Err(WireError::TooLong { what: "a frame of runs", len, max: RUNS_MAX });
        }
        Ok(len)
    }
}

/// A run of pages in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct WireRun {
    first_page: U64,
    pages: U32,
    region: U16,
    reserved: U16,
}

impl WireRun {
    /// The run as sent; `None` if it is too long for a frame.
    #[must_use]
    pub fn encode(run: PageRun) -> Option<Self> {
        Some(Self {
            first_page: run.first_page.into(),
            pages: u32::try_from(run.pages).ok().filter(|_| run.len_bytes() <= FRAME_BYTES_MAX)?.into(),
            region: u16::try_from(run.region).ok()?.into(),
            reserved: 0.into(),
        })
    }

    /// The run, to be checked against guest RAM before use.
    ///
    /// # Errors
    /// [`WireError::TooLong`] if it is empty or longer than a frame may be.
    pub fn decode(&self) -> Result<PageRun, WireError> {
        let pages = u64::from(self.pages.get());
        if pages == 0 || pages * PAGE_BYTES > FRAME_BYTES_MAX {
            return Err(WireError::TooLong {
                what: "a run of pages",
                len: usize::try_from(pages).unwrap_or(usize::MAX),
                max: usize::try_from(FRAME_BYTES_MAX / PAGE_BYTES).unwrap_or(usize::MAX),
            });
        }
        Ok(PageRun { region: self.region.get().into(), first_page: self.first_page.get(), pages })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_come_back_as_they_were_and_are_bounded() {
        let run = PageRun { region: 2, first_page: 1 << 40, pages: 1024 };
        assert_eq!(WireRun::encode(run).unwrap().decode(), Ok(run));
        assert_eq!(WireRun::encode(PageRun { pages: 1025, ..run }), None);
        let none = WireRun { pages: 0.into(), ..WireRun::encode(run).unwrap() };
        assert!(none.decode().is_err());
        let long = WireRun { pages: u32::MAX.into(), ..none };
        assert!(long.decode().is_err());
    }

    #[test]
    fn a_frame_is_a_fence_or_has_a_bounded_number_of_runs() {
        assert_eq!(PageFrame::fence(3).fenced_round(), Some(3));
        assert_eq!(PageFrame::pages(256).fenced_round(), None);
        assert_eq!(PageFrame::pages(256).runs(), Ok(256));
        assert!(PageFrame { runs: 257.into(), round: 0.into() }.runs().is_err());
    }
}
