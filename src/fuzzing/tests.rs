//! The targets with good input, and with damaged copies of it from a seed: what a compiler without libFuzzer
//! can do.
//!
//! `STERNA_FUZZ_ROUNDS` says how many copies, `STERNA_FUZZ_SEED` from which seed, `STERNA_FUZZ_CORPUS` where
//! to write the good input, in a folder for each target, for libFuzzer to begin with.

use std::fs;
use std::io::Write;
use std::path::Path;

use zerocopy::IntoBytes;

use super::{TARGETS, Target};
use crate::handover::RecordKind;
use crate::memory::PageRun;
use crate::saved_state::StateWriter;
use crate::transport::rdma::wire::{ChunkRange, Request};
use crate::wire::{FrameHead, PageFrame, Preamble, Protection, Role, STATE_FRAME_MAX, WireRun, one_of_each};

/// Longer input is damaged in too few places for its time.
const INPUT_MAX: usize = 32 << 10;

#[test]
fn damaged_input_of_a_peer_or_another_user_makes_nothing_panic() {
    let rounds = number_in("STERNA_FUZZ_ROUNDS").unwrap_or(20_000);
    let seed = number_in("STERNA_FUZZ_SEED").unwrap_or(1);
    for (name, target) in TARGETS {
        let seeds = seeds(name);
        assert!(!seeds.is_empty(), "{name} has no good input");
        seeds.iter().for_each(|input| run(name, target, input));
        // The two that ask the kernel for sockets or files take longer.
        let slow = matches!(name, "control_channel" | "image_offer");
        let mut random = Random(seed);
        for _ in 0..rounds / if slow { 20 } else { 1 } {
            let input = damaged(&mut random, &seeds);
            run(name, target, &input);
        }
    }
}

#[test]
fn good_input_of_every_kind_is_written_for_a_fuzzer() {
    let Some(corpus) = std::env::var_os("STERNA_FUZZ_CORPUS") else { return };
    for (name, _) in TARGETS {
        let folder = Path::new(&corpus).join(name);
        fs::create_dir_all(&folder).unwrap();
        for (index, input) in seeds(name).iter().enumerate() {
            fs::write(folder.join(format!("good-{index}")), input).unwrap();
        }
    }
}

/// Runs a target, and keeps the input if it panics.
fn run(name: &str, target: Target, input: &[u8]) {
    struct Kept<'input>(&'input str, &'input [u8]);
    impl Drop for Kept<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                let path = std::env::temp_dir().join(format!("sterna-fuzz-{}", self.0));
                let written = fs::write(&path, self.1);
                eprintln!("{} panicked over the input in {} ({written:?})", self.0, path.display());
            }
        }
    }
    let _kept = Kept(name, input);
    target(input);
}

fn seeds(name: &str) -> Vec<Vec<u8>> {
    match name {
        "message" => messages().into_iter().map(|(kind, body)| [vec![kind], body].concat()).collect(),
        "preamble" => {
            let kinds = [(Role::Control, Protection::Tls), (Role::Lane, Protection::Plain)];
            kinds.map(|(role, protection)| Preamble { role, protection }.encode().to_vec()).to_vec()
        }
        "control_channel" => vec![frames(true), frames(false)],
        "rdma_bodies" => {
            let chunk = |first_page| ChunkRange { region: 0, first_page, pages: 1024 };
            let requests = [Request::Register(vec![chunk(0), chunk(1024)]), Request::Release(vec![chunk(0)])];
            requests.iter().map(|request| [vec![2], request.encode().unwrap()].concat()).collect()
        }
        "page_frames" => {
            let runs = [(0, 3, 2), (1, 0, 3), (0, 15, 1)];
            let runs = runs.map(|(region, first_page, pages)| PageRun { region, first_page, pages });
            let head = PageFrame::pages(runs.len());
            let runs = runs.iter().flat_map(|run| WireRun::encode(*run).unwrap().as_bytes().to_vec());
            vec![[head.as_bytes().to_vec(), runs.collect(), PageFrame::fence(1).as_bytes().to_vec()].concat()]
        }
        "saved_state" => {
            let full = u32::try_from(STATE_FRAME_MAX).unwrap();
            let frames = [[0, full], [full, full], [2 * full, 5]].as_flattened().to_vec();
            let frames = frames.into_iter().flat_map(u32::to_le_bytes);
            vec![frames.chain((2 * u64::from(full) + 5).to_le_bytes()).collect()]
        }
        "sections" => {
            let mut state = Vec::new();
            let mut writer = StateWriter::new(&mut state);
            for (name, len) in [("vcpu", 40), ("apic", 3), ("disk", 0), ("net", 300)] {
                writer.section(name).unwrap().write_all(&vec![7; len]).unwrap();
            }
            writer.finish().unwrap();
            vec![state]
        }
        "image_offer" => {
            messages().into_iter().filter(|(kind, _)| *kind == 14).map(|(_, body)| body).collect()
        }
        // Sixteen records or more go round. The changes: a byte of a copy, a number with a new digest, the
        // kind of a record.
        "state_file" => vec![
            vec![3],
            vec![20, 2, 60, 0, 1, 9],
            vec![33, 0x9e, 48, 0, 8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            vec![5, 0x83, 43, 0, 1, RecordKind::Done as u8],
        ],
        "lock_file" => {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("lock");
            crate::lock::Lock::at(&path).take().unwrap();
            vec![fs::read(path).unwrap()]
        }
        _ => Vec::new(),
    }
}

fn messages() -> Vec<(u8, Vec<u8>)> {
    let encoded = one_of_each().into_iter().map(|message| {
        (u8::try_from(message.kind()).unwrap(), message.encode().expect("it is within its bounds"))
    });
    encoded.filter(|(_, body)| body.len() <= INPUT_MAX).collect()
}

/// All messages as a control channel takes them, and as its target seals them.
fn frames(whole: bool) -> Vec<u8> {
    let mut input = vec![u8::from(!whole)];
    for (kind, body) in messages() {
        if whole {
            input.extend(FrameHead::new(kind.into(), &body).unwrap().as_bytes());
        } else {
            input.push(kind);
            input.extend(u16::try_from(body.len()).unwrap().to_le_bytes());
        }
        input.extend(body);
    }
    input
}

/// A copy of good input with some damage.
fn damaged(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut input = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(4) {
        let at = random.below(input.len() + 1);
        match random.below(7) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 if at < input.len() => input[at] = [0, 1, 0x7f, 0x80, 0xfe, 0xff][random.below(6)],
            2 => input.truncate(at),
            3 => input.insert(at, random.next().to_le_bytes()[0]),
            4 => {
                let number = [0, 1, u64::MAX, u64::MAX - 1, 1 << 63, 1 << 32, random.next()][random.below(7)];
                input.iter_mut().skip(at).zip(number.to_le_bytes()).for_each(|(byte, new)| *byte = new);
            }
            5 => {
                let other = &seeds[random.below(seeds.len())];
                input.truncate(at);
                input.extend(&other[random.below(other.len() + 1)..]);
            }
            _ => {
                let end = at + random.below(input.len() - at + 1);
                input.extend_from_within(at..end);
            }
        }
        input.truncate(2 * INPUT_MAX);
    }
    input
}

fn number_in(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}")))
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap_or(0)
    }
}
