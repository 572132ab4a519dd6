//! The targets with good input, and with damaged copies: what a compiler without libFuzzer can do.
//!
//! `STERNA_FUZZ_CORPUS` says where to write the good input, in a folder for each target, for libFuzzer to
//! begin with.

use std::fs;
use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::json;

use crate::compat::Description;
use crate::fuzzing::{qemu_description, qemu_multifd, qemu_stream};
use crate::multifd::build::{init, packet, stale_sync, sync};
use crate::stream::build::Stream;

/// Changes a copy of good input.
#[derive(Clone, Debug)]
enum Damage {
    Flip(Index, u8),
    Set(Index, u8),
    Cut(Index),
    Insert(Index, Vec<u8>),
    Number(Index, u64),
    /// The bytes from the first to the second place move to the end.
    Reorder(Index, Index),
    Repeat(Index, Index),
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(3000) })]

    #[test]
    fn damaged_streams_make_nothing_panic(input in select(streams()), damages in vec(damage(), 1..5)) {
        qemu_stream(&damaged(input, damages));
    }

    #[test]
    fn damaged_packets_make_nothing_panic(input in select(packets()), damages in vec(damage(), 1..5)) {
        qemu_multifd(&damaged(input, damages));
    }

    #[test]
    fn damaged_descriptions_make_nothing_panic(input in select(descriptions()), damages in vec(damage(), 1..5)) {
        qemu_description(&damaged(input, damages));
    }

    #[test]
    fn any_bytes_make_nothing_panic(input in vec(any::<u8>(), 0..200)) {
        qemu_stream(&input);
        qemu_multifd(&input);
        qemu_description(&input);
    }
}

#[test]
fn good_input_of_every_kind_is_accepted_and_written_for_a_fuzzer() {
    let corpus = std::env::var_os("STERNA_FUZZ_CORPUS");
    for (name, target, inputs) in [
        ("qemu_stream", qemu_stream as fn(&[u8]), streams()),
        ("qemu_multifd", qemu_multifd, packets()),
        ("qemu_description", qemu_description, descriptions()),
    ] {
        for (index, input) in inputs.iter().enumerate() {
            target(input);
            if let Some(corpus) = &corpus {
                let folder = Path::new(corpus).join(name);
                fs::create_dir_all(&folder).unwrap();
                fs::write(folder.join(format!("good-{index}")), input).unwrap();
            }
        }
    }
    descriptions().iter().for_each(|input| assert!(Description::decode(input).is_ok()));
    streams().iter().for_each(|input| assert!(super::read_stream(input).is_ok()));
}

fn streams() -> Vec<Vec<u8>> {
    let blocks = [("mem0", 0x10_000), ("mem1", 0x3000), ("vga.vram", 0x4000), ("pc.bios", 0x2000)];
    let old = Stream::of("pc-i440fx-7.2").start(&blocks).eos();
    let old = old.part().page(Some("mem0"), 0, 1).zero(None, 0x1000).page(Some("vga.vram"), 0x1000, 3).eos();
    let old =
        old.part().zero(None, 0x1000).zero(Some("pc.bios"), 0).eos().end().zero(Some("mem1"), 0x2000).eos();
    let new =
        Stream::of("pc-q35-10.0").subsection("configuration/uuid", &[9; 16]).start(&blocks).flush().eos();
    let new = new.part().page(Some("vga.vram"), 0x3000, 3).flush().eos().command(11, &[]).end().flush().eos();
    vec![old.state().bytes, new.state().bytes]
}

fn descriptions() -> Vec<Vec<u8>> {
    let description = json!({
        "version": { "major": 10, "minor": 0, "micro": 2 },
        "machine_type": "pc-q35-10.0",
        "accelerator": "Kvm",
        "vcpus": 2,
        "cpu": { "model": "host", "properties": { "avx2": "On", "family": { "Number": 6 }, "vendor": { "Text": "X" } } },
        "blocks": [{ "name": "mem0", "used_bytes": 4096, "total_bytes": 4096 }],
        "devices": [{ "place": "00:03.0", "class": "virtio-net-pci", "pci": [0x1af4, 0x1000] }, {
            "place": "00:04.0 usb-bus", "class": "usb-tablet", "pci": null,
        }],
        "uuid": "5b3fe9b6-7f48-4a9a-8d6c-6b63a1f5a001",
        "was_paused": false,
    });
    let description: Description = serde_json::from_value(description).unwrap();
    vec![description.encode().unwrap()]
}

fn packets() -> Vec<Vec<u8>> {
    let old = [packet(0, "mem0", &[(0, 1), (0xf000, 2)], &[]), stale_sync("mem0")].concat();
    let old = [init(0), old, packet(1, "vga.vram", &[(0x1000, 3)], &[])].concat();
    let new = [packet(0, "mem1", &[(0, 1)], &[0x2000]), sync(), packet(0, "vga.vram", &[(0, 1)], &[0x1000])];
    let new = [init(0), new.concat(), packet(0, "vga.vram", &[], &[0]), sync()].concat();
    vec![[vec![4], old].concat(), [vec![5], new].concat()]
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<Index>;
    let numbers = select(vec![0, 1, u64::MAX, 1 << 63, 1 << 32, 0x1000, 0x1008, 0x22]);
    prop_oneof![
        (at(), 0..8_u8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        (at(), select(vec![0, 1, 2, 3, 4, 5, 7, 8, 0x7e, 0x80, 0xff]))
            .prop_map(|(at, to)| Damage::Set(at, to)),
        at().prop_map(Damage::Cut),
        (at(), vec(any::<u8>(), 1..16)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        (at(), numbers).prop_map(|(at, number)| Damage::Number(at, number)),
        (at(), at()).prop_map(|(from, to)| Damage::Reorder(from, to)),
        (at(), at()).prop_map(|(from, to)| Damage::Repeat(from, to)),
    ]
}

fn damaged(mut input: Vec<u8>, damages: Vec<Damage>) -> Vec<u8> {
    // Most bytes are of pages; the places of half of the damage are near the start, where the numbers are.
    let place = |input: &[u8], at: Index| {
        let at = at.index(2 * input.len() + 2);
        if at.is_multiple_of(2) { at / 2 } else { (at / 2) % input.len().clamp(1, 300) }
    };
    for damage in damages {
        match damage {
            Damage::Flip(at, bit) => {
                let at = place(&input, at);
                input.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << bit);
            }
            Damage::Set(at, to) => {
                let at = place(&input, at);
                input.iter_mut().skip(at).take(1).for_each(|byte| *byte = to);
            }
            Damage::Cut(at) => input.truncate(place(&input, at)),
            Damage::Insert(at, bytes) => {
                let at = place(&input, at);
                input.splice(at..at, bytes);
            }
            Damage::Number(at, number) => {
                let at = place(&input, at);
                input.iter_mut().skip(at).zip(number.to_be_bytes()).for_each(|(byte, new)| *byte = new);
            }
            Damage::Reorder(from, to) => {
                let (from, to) = (place(&input, from), place(&input, to));
                let moved: Vec<_> = input.drain(from.min(to)..from.max(to)).collect();
                input.extend(moved);
            }
            Damage::Repeat(from, to) => {
                let (from, to) = (place(&input, from), place(&input, to));
                input.extend_from_within(from.min(to)..from.max(to));
            }
        }
    }
    input
}
