//! Messages and page frames to bytes and back, beside copying as many bytes.

use std::hint::black_box;

use criterion::Criterion;
use sterna::memory::{RamLayout, RegionLayout};
use sterna::wire::{
    AttemptId, DIGESTS_MAX, FRAME_BYTES_MAX, Hello, LaneOffer, Message, PageFrame, RUN_LEN, RUNS_MAX,
    STATE_FRAME_MAX, StateFrame, TRANSPORT_BODY_MAX, WireRun,
};
use sterna_bench::ram::run;
use sterna_bench::{Stage, criterion};
use zerocopy::{FromZeros, IntoBytes};

fn main() {
    let mut criterion = criterion();
    for (what, each) in messages() {
        message(&mut criterion, what, &each);
    }
    page_frame(&mut criterion);
    criterion.final_summary();
}

/// The smallest message, and those that grow with the guest.
fn messages() -> Vec<(&'static str, Message)> {
    let attempt_id = AttemptId([7; 16]);
    let regions = vec![
        RegionLayout { guest_address: 0, len_bytes: 3 << 30 },
        RegionLayout { guest_address: 4 << 30, len_bytes: 61 << 30 },
    ];
    let (name, ram, details) = ("tern".into(), RamLayout { regions }, vec![1; 4096]);
    let state = StateFrame { offset: 4 << 20, bytes: vec![0x5a; STATE_FRAME_MAX] };
    vec![
        ("go", Message::Go(attempt_id)),
        (
            "hello",
            Message::Hello(Hello {
                attempt_id,
                name,
                ram,
                details,
                lanes: LaneOffer { scheme: "tcp".into(), lanes: 4, body: Vec::new() },
                lock: None,
                state_bytes: 0,
            }),
        ),
        ("transport, 32 KiB", Message::Transport(vec![0x5a; TRANSPORT_BODY_MAX])),
        ("digests, 16384", Message::Digests(vec![[0xa5; 32]; DIGESTS_MAX])),
        ("state, 256 KiB", Message::State(state)),
    ]
}

fn message(criterion: &mut Criterion, what: &str, message: &Message) {
    let body = message.encode().expect("it is within its bounds");
    let mut stage = Stage::new(criterion, format!("message, {what}"), body.len(), "copy", || {
        kept(&black_box(&body).to_vec())
    });
    stage.beside("encode", || kept(&black_box(message).encode().expect("it is within its bounds")));
    stage.beside("decode", || {
        let decoded = Message::decode(message.kind(), black_box(&body)).expect("it was encoded here");
        black_box(decoded).kind().into()
    });
}

/// The head of a frame with the maximum of runs, and the pages it announces, one a run.
fn page_frame(criterion: &mut Criterion) {
    let runs: Vec<_> = (0..RUNS_MAX as u64).map(|n| run(2 * n, 1)).collect();
    let mut head = Vec::with_capacity(PageFrame::LEN + RUNS_MAX * RUN_LEN);
    let mut encode = move || {
        head.clear();
        head.extend(PageFrame::pages(runs.len()).as_bytes());
        for &run in black_box(&runs) {
            head.extend(WireRun::encode(run).expect("a page is no long run").as_bytes());
        }
        kept(&head)
    };
    let wire_runs: Vec<_> = (0..RUNS_MAX as u64).map(|n| WireRun::encode(run(2 * n, 1))).collect();
    let wire_runs: Vec<WireRun> = wire_runs.into_iter().flatten().collect();
    let mut read = vec![WireRun::new_zeroed(); RUNS_MAX];
    let mut decode = move || {
        // Stands for the read from the socket.
        read.copy_from_slice(black_box(&wire_runs));
        let first_pages = read.iter().map(|wire| wire.decode().map_or(0, |run| run.first_page));
        first_pages.fold(0, u64::wrapping_add)
    };

    let source = vec![1_u8; PageFrame::LEN + RUNS_MAX * RUN_LEN];
    let mut copy = source.clone();
    let heads = || {
        copy.copy_from_slice(black_box(&source));
        kept(&copy)
    };
    Stage::new(criterion, "page frame, 256 runs", source.len(), "copy of the head", heads)
        .beside("encode", &mut encode)
        .beside("decode", &mut decode);

    let bytes = usize::try_from(FRAME_BYTES_MAX / 4).unwrap_or(0);
    let source = vec![1_u8; bytes];
    let mut copy = source.clone();
    let pages = || {
        copy.copy_from_slice(black_box(&source));
        kept(&copy)
    };
    Stage::new(criterion, "page frame, 256 runs of a page", bytes, "copy of the pages", pages)
        .beside("encode", &mut encode)
        .beside("decode", &mut decode);
}

/// A value computed from the bytes, once all have arrived.
fn kept(bytes: &[u8]) -> u64 {
    black_box(bytes).len() as u64
}
