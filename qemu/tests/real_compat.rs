//! What keeps a guest from moving, found in real QEMUs.

mod common;

use common::qemu::{programs, start};
use sterna_qemu::compat::{DESCRIPTION_MAX, Description, End, Refused, refusals};
use sterna_qemu::monitor::Parameter;

#[test]
fn a_guest_fits_its_own_command_line_in_the_same_and_in_another_version() {
    let programs = programs();
    let arguments = [
        "-machine",
        "pc-q35-7.2",
        "-m",
        "32",
        "-vga",
        "std",
        "-device",
        "virtio-net-pci",
        "-device",
        "virtio-rng-pci",
    ];
    let described: Vec<_> = programs
        .iter()
        .map(|program| {
            let description = Description::of(&start(program, &arguments).monitor).unwrap();
            let bytes = description.encode().unwrap();
            println!("{}: {} bytes", program.display(), bytes.len());
            assert!(bytes.len() < DESCRIPTION_MAX / 8);
            Description::decode(&bytes).unwrap()
        })
        .collect();
    for source in &described {
        assert!(source.was_paused);
        for destination in &described {
            assert_eq!(
                source.differences(destination),
                [""; 0],
                "{} {}",
                source.version,
                destination.version
            );
        }
    }
}

#[test]
fn another_command_line_is_named_by_its_differences() {
    for program in programs() {
        let describe = |arguments: &[&str]| Description::of(&start(&program, arguments).monitor).unwrap();
        let source = describe(&["-machine", "pc-q35-7.2", "-m", "64", "-cpu", "qemu64", "-vga", "std"]);
        let destination = describe(&[
            "-machine",
            "pc-q35-7.1",
            "-m",
            "32",
            "-smp",
            "2",
            "-cpu",
            "qemu64,-sse3",
            "-uuid",
            "5b3fe9b6-7f48-4a9a-8d6c-6b63a1f5a001",
        ]);
        let found = source.differences(&destination).join("\n");
        for part in [
            "pc-q35-7.2 at the source and pc-q35-7.1 at the destination",
            "the number of vCPUs is 1 at the source and 2",
            "the UUID is not set",
            "lacks pni",
            "pc.ram has 64 MiB at the source and 32 MiB",
            "vga.vram of 16 MiB is not at the destination",
        ] {
            assert!(found.contains(part), "{part}: {found}");
        }
    }
}

#[test]
fn an_ordinary_guest_and_a_qemu_that_waits_for_one_are_not_refused() {
    for program in programs() {
        let arguments = ["-m", "32", "-device", "virtio-net-pci", "-device", "virtio-balloon-pci"];
        let source = start(&program, &arguments);
        assert_eq!(refusals(&source.monitor, End::Source).unwrap(), []);
        let destination = start(&program, &[&arguments[..], &["-incoming", "defer"]].concat());
        assert_eq!(refusals(&destination.monitor, End::Destination).unwrap(), []);
        // Each at the other's place.
        assert_eq!(refusals(&source.monitor, End::Destination).unwrap().len(), 1);
        assert_eq!(refusals(&destination.monitor, End::Source).unwrap().len(), 1);
    }
}

/// Whether one of the reasons has these words.
fn names(found: &[Refused], part: &str) -> bool {
    found.iter().any(|refused| refused.to_string().contains(part))
}

#[test]
fn settings_that_change_the_stream_are_refused_by_name() {
    for program in programs() {
        let qemu = start(&program, &["-m", "32"]);
        let monitor = &qemu.monitor;
        monitor.set_capabilities([("return-path", true), ("xbzrle", true)]).unwrap();
        monitor.set_parameters([(Parameter::DowntimeLimit, 300)]).unwrap();
        monitor.human("migrate_set_parameter multifd-compression zlib").unwrap();
        monitor.human("migrate_set_parameter tls-creds tls0").unwrap();
        let found = refusals(monitor, End::Source).unwrap();
        for name in ["return-path", "xbzrle", "multifd-compression", "tls-creds"] {
            assert!(names(&found, &format!("{name} ")), "{name}: {found:?}");
        }
        assert_eq!(found.len(), 4, "{found:?}");
    }
}

#[test]
fn devices_that_cannot_move_are_refused_by_name() {
    for program in programs() {
        let qemu = start(
            &program,
            &[
                "-m",
                "32,maxmem=256M",
                "-machine",
                "q35",
                "-object",
                "memory-backend-ram,id=vm,size=64M,share=on",
                "-device",
                "virtio-mem-pci,id=vm0,memdev=vm",
                "-object",
                "memory-backend-memfd,id=shared,size=1M,share=on",
                "-device",
                "ivshmem-plain,memdev=shared",
            ],
        );
        let found = refusals(&qemu.monitor, End::Source).unwrap();
        assert!(names(&found, "vm0 (virtio-mem-pci)"), "{found:?}");
        assert!(names(&found, "(ivshmem-plain)"), "{found:?}");
        // QEMU has a word to say on the second one, too.
        assert!(names(&found, "QEMU cannot move this guest"), "{found:?}");
    }
}

#[test]
fn what_blocks_qemu_itself_is_passed_on() {
    for program in programs() {
        let qemu = start(&program, &["-m", "32", "-drive", "if=none,id=d,format=raw,file=fat:rw:FOLDER"]);
        let found = refusals(&qemu.monitor, End::Source).unwrap();
        assert!(names(&found, "vvfat"), "{found:?}");
        assert!(found.iter().all(|refused| refused.what.starts_with("QEMU cannot move")), "{found:?}");
    }
}
