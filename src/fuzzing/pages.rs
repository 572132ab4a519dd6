use std::sync::OnceLock;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use zerocopy::FromBytes;

use crate::memory::GuestRam;
use crate::wire::{FRAME_BYTES_MAX, PageFrame, RUN_LEN, WireRun};

/// The heads of frames on a TCP lane, without the pages.
pub fn page_frames(mut input: &[u8]) {
    while let Ok((frame, rest)) = PageFrame::read_from_prefix(input) {
        input = rest;
        if frame.fenced_round().is_some() {
            continue;
        }
        let Ok(runs) = frame.runs() else { return };
        for _ in 0..runs {
            let Ok((run, rest)) = WireRun::read_from_prefix(input) else { return };
            assert_eq!(input.len() - rest.len(), RUN_LEN);
            input = rest;
            let Ok(run) = run.decode() else { return };
            assert!(run.pages > 0 && run.len_bytes() <= FRAME_BYTES_MAX);
            if ram().slice(run).is_ok() {
                let pages = ram().regions()[run.region].pages();
                assert!(run.first_page < pages && run.pages <= pages - run.first_page, "{run:?} lies in RAM");
            }
        }
    }
}

fn ram() -> &'static GuestRam {
    static RAM: OnceLock<GuestRam> = OnceLock::new();
    RAM.get_or_init(|| {
        let region = |address, pages: usize| (GuestAddress(address), pages * 4096);
        let memory = GuestMemoryMmap::<()>::from_ranges(&[region(0, 16), region(1 << 32, 3)]);
        GuestRam::from_vm_memory(&memory.expect("memory")).expect("whole pages")
    })
}
