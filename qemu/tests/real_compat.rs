//! What keeps a guest from moving, found in real QEMUs.

mod common;

use common::qemu::{programs, start};
use sterna_qemu::compat::{DESCRIPTION_MAX, Description, End, Refused, readiness};
use sterna_qemu::monitor::Parameter;

#[test]
fn a_guest_fits_its_own_command_line_in_the_same_and_in_another_version() {
    for machine in ["pc-q35-7.2", "pc-i440fx-7.2"] {
        fits_itself(&[
            "-machine",
            machine,
            "-m",
            "32",
            "-vga",
            "std",
            "-usb",
            "-usbdevice",
            "tablet",
            "-device",
            "virtio-net-pci",
            "-device",
            "virtio-rng-pci",
            "-device",
            "virtio-scsi-pci",
            "-device",
            "qemu-xhci",
            "-device",
            "intel-hda",
        ]);
    }
}

fn fits_itself(arguments: &[&str]) {
    let described: Vec<_> = programs()
        .iter()
        .map(|program| {
            let description = Description::of(&start(program, arguments).monitor).unwrap();
            let bytes = description.encode().unwrap();
            println!("{}: {} bytes", program.display(), bytes.len());
            assert!(bytes.len() < DESCRIPTION_MAX / 8);
            assert!(description.devices.as_ref().is_some_and(|devices| devices.len() > 10));
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
fn devices_are_compared_by_their_places_on_each_bus() {
    let common = ["-m", "32", "-vga", "std", "-usb", "-device", "virtio-scsi-pci,id=scsi", "-device"];
    for (program, machine) in programs()
        .into_iter()
        .flat_map(|program| ["pc-q35-7.2", "pc-i440fx-7.2"].map(|machine| (program.clone(), machine)))
    {
        let describe = |arguments: &[&str]| {
            let arguments = [&["-machine", machine], &common[..], arguments].concat();
            Description::of(&start(&program, &arguments).monitor).unwrap()
        };
        let bridge = "pci-bridge,id=bridge,chassis_nr=1,addr=8";
        let source = describe(&[bridge, "-device", "e1000,bus=bridge,addr=5", "-device", "usb-tablet"]);
        let devices = source.devices.as_ref().unwrap();
        let at = |place: &str| devices.iter().find(|device| device.place == place).unwrap();
        assert_eq!((at("00:08.0:05.0").class.as_str(), at("00:08.0:05.0").pci), ("e1000", None));
        assert_eq!(at("00:08.0").pci, Some((0x1b36, 1)));
        assert!(at("00:00.0").pci.is_some_and(|(vendor, _)| vendor == 0x8086));

        // What the command line says otherwise, the guest sees alike.
        let same = describe(&[
            "pci-bridge,id=other,chassis_nr=1,addr=8",
            "-usbdevice",
            "tablet",
            "-device",
            "e1000,id=net,bus=other,addr=5",
        ]);
        assert_eq!(source.differences(&same), [""; 0]);

        let other =
            describe(&[bridge, "-device", "e1000,bus=bridge,addr=6", "-device", "virtio-rng-pci,addr=9"]);
        let found = source.differences(&other).join("\n");
        for part in [
            "the device e1000 at 00:08.0:05.0 is not at the destination",
            "the device e1000 at 00:08.0:06.0 is at the destination only",
            "the device virtio-rng-pci at 00:09.0 is at the destination only",
            "usb-bus is not at the destination",
        ] {
            assert!(found.contains(part), "{machine}: {part}: {found}");
        }
    }
}

#[test]
fn an_ordinary_guest_and_a_qemu_that_waits_for_one_are_not_refused() {
    for program in programs() {
        let arguments = ["-m", "32", "-device", "virtio-net-pci", "-device", "virtio-balloon-pci"];
        let source = start(&program, &arguments);
        assert_eq!(readiness(&source.monitor, End::Source).unwrap().refused, []);
        let destination = start(&program, &[&arguments[..], &["-incoming", "defer"]].concat());
        assert_eq!(readiness(&destination.monitor, End::Destination).unwrap().refused, []);
        // Each at the other's place.
        assert_eq!(readiness(&source.monitor, End::Destination).unwrap().refused.len(), 1);
        assert_eq!(readiness(&destination.monitor, End::Source).unwrap().refused.len(), 1);
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
        let found = readiness(monitor, End::Source).unwrap().refused;
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
        let found = readiness(&qemu.monitor, End::Source).unwrap().refused;
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
        let found = readiness(&qemu.monitor, End::Source).unwrap().refused;
        assert!(names(&found, "vvfat"), "{found:?}");
        assert!(found.iter().all(|refused| refused.what.starts_with("QEMU cannot move")), "{found:?}");
    }
}
