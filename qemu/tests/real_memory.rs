//! The files behind the RAM of real QEMUs.

mod common;

use std::fs::Permissions;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;

use common::fake::Fake;
use common::qemu::{Qemu, programs, start};
use serde_json::{Value, json};
use sterna_qemu::monitor::Monitor;
use sterna_qemu::qmp::Client;
use sterna_qemu::shared_ram::{SharedRam, SharedRamError, shared_ram};

/// What QEMU finds at an address of the guest.
fn guest_word(qemu: &Qemu, address: u64) -> u32 {
    let text = qemu.monitor.human(&format!("xp /1xw {address:#x}")).unwrap();
    let word = text.split_whitespace().last().unwrap();
    u32::from_str_radix(word.trim_start_matches("0x"), 16).unwrap()
}

/// Writes through the file, and lets QEMU look.
fn is_at(ram: &SharedRam, qemu: &Qemu, guest_address: u64, offset_in_block: u64) -> bool {
    let word = 0x5eed_0000 | u32::try_from(guest_address >> 12 & 0xffff).unwrap();
    ram.file.write_all_at(&word.to_le_bytes(), ram.offset_bytes + offset_in_block).unwrap();
    guest_word(qemu, guest_address + offset_in_block) == word
}

fn names(found: &[SharedRam]) -> Vec<&str> {
    found.iter().map(|ram| ram.block.name.as_str()).collect()
}

#[test]
fn the_memfd_behind_a_guest_is_the_memory_that_qemu_reads() {
    for program in programs() {
        let qemu = start(
            &program,
            &[
                "-m",
                "64",
                "-object",
                "memory-backend-memfd,id=mem0,size=64M,share=on",
                "-machine",
                "pc,memory-backend=mem0",
            ],
        );
        let found = shared_ram(&qemu.monitor).unwrap();
        assert_eq!(names(&found), ["mem0"]);
        let ram = &found[0];
        assert_eq!((ram.block.len_bytes, ram.offset_bytes, ram.page_bytes), (64 << 20, 0, 4096));
        assert!(!ram.prealloc);
        assert!(is_at(ram, &qemu, 0, 0x20_0000));
        assert!(!is_at(ram, &qemu, 0x1000, 0x20_0000));
    }
}

#[test]
fn two_memfds_of_one_size_are_told_apart() {
    for program in programs() {
        let qemu = start(
            &program,
            &[
                "-machine",
                "q35",
                "-smp",
                "2",
                "-m",
                "64",
                "-object",
                "memory-backend-memfd,id=a,size=32M,share=on",
                "-object",
                "memory-backend-memfd,id=unused,size=32M,share=on",
                "-object",
                "memory-backend-memfd,id=b,size=32M,share=on,prealloc=on",
                "-numa",
                "node,memdev=b",
                "-numa",
                "node,memdev=a",
            ],
        );
        let found = shared_ram(&qemu.monitor).unwrap();
        let mut sorted = names(&found);
        sorted.sort_unstable();
        assert_eq!(sorted, ["a", "b"]);
        for ram in &found {
            let first = ram.block.name == "b";
            assert_eq!(ram.prealloc, first);
            let (mine, other) = if first { (0, 32 << 20) } else { (32 << 20, 0) };
            assert!(is_at(ram, &qemu, mine, 0x10_0000), "{}", ram.block.name);
            assert!(!is_at(ram, &qemu, other, 0x20_0000), "{}", ram.block.name);
        }
    }
}

#[test]
fn a_dimm_that_was_plugged_in_is_found_too() {
    for program in programs() {
        let qemu = start(
            &program,
            &[
                "-m",
                "32,slots=2,maxmem=1G",
                "-object",
                "memory-backend-memfd,id=mem0,size=32M,share=on",
                "-machine",
                "pc,memory-backend=mem0",
                "-object",
                "memory-backend-memfd,id=more,size=128M,share=on",
                "-device",
                "pc-dimm,id=dimm,memdev=more",
            ],
        );
        let found = shared_ram(&qemu.monitor).unwrap();
        assert_eq!(names(&found).len(), 2);
        let more = found.iter().find(|ram| ram.block.name == "more").unwrap();
        let dimms = qemu.monitor.client().execute("query-memory-devices", &json!({})).unwrap();
        let address = dimms[0]["data"]["addr"].as_u64().unwrap();
        assert!(is_at(more, &qemu, address, 0x10_0000));
    }
}

#[test]
fn a_named_file_is_found_even_after_another_one_took_its_name() {
    for program in programs() {
        let qemu = start(
            &program,
            &[
                "-m",
                "32",
                "-object",
                "memory-backend-file,id=mem0,size=32M,share=on,mem-path=FOLDER/ram",
                "-machine",
                "pc,memory-backend=mem0",
            ],
        );
        let path = qemu.folder.path().join("ram");
        std::fs::remove_file(&path).unwrap();
        std::fs::File::create(&path).unwrap().set_len(32 << 20).unwrap();
        let found = shared_ram(&qemu.monitor).unwrap();
        assert!(is_at(&found[0], &qemu, 0, 0x10_0000));
    }
}

#[test]
fn memory_that_is_not_shared_is_refused_with_the_remedy() {
    for program in programs() {
        for arguments in [
            &["-m", "32"][..],
            &[
                "-m",
                "32",
                "-object",
                "memory-backend-memfd,id=mem0,size=32M,share=off",
                "-machine",
                "pc,memory-backend=mem0",
            ],
            &[
                "-m",
                "32",
                "-object",
                "memory-backend-ram,id=mem0,size=32M",
                "-machine",
                "pc,memory-backend=mem0",
            ],
        ] {
            let error = shared_ram(&start(&program, arguments).monitor).unwrap_err();
            assert!(matches!(error, SharedRamError::NotShared { .. }), "{error}");
            assert!(error.to_string().contains("share=on"), "{error}");
        }
    }
}

#[test]
fn one_backend_of_several_that_is_not_shared_is_named() {
    for program in programs() {
        let qemu = start(
            &program,
            &[
                "-machine",
                "pc",
                "-smp",
                "2",
                "-m",
                "64",
                "-object",
                "memory-backend-memfd,id=a,size=32M,share=on",
                "-object",
                "memory-backend-memfd,id=b,size=32M,share=off",
                "-numa",
                "node,memdev=a",
                "-numa",
                "node,memdev=b",
            ],
        );
        let error = shared_ram(&qemu.monitor).unwrap_err();
        assert!(matches!(&error, SharedRamError::NotShared { name, .. } if name == "b"), "{error}");
    }
}

#[test]
fn memory_without_a_file_is_refused_or_has_one_by_now() {
    for program in programs() {
        let qemu = start(
            &program,
            &[
                "-m",
                "32",
                "-object",
                "memory-backend-ram,id=mem0,size=32M,share=on",
                "-machine",
                "pc,memory-backend=mem0",
            ],
        );
        match shared_ram(&qemu.monitor) {
            Ok(found) => assert!(is_at(&found[0], &qemu, 0, 0x10_0000)),
            Err(error) => {
                assert!(matches!(error, SharedRamError::NoFile { .. }), "{error}");
                assert!(error.to_string().contains("memory-backend-memfd"), "{error}");
            }
        }
    }
}

#[test]
fn huge_pages_are_found_with_their_size() {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if free.ok().and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or(0) < 16 {
        println!("SKIPPED: this machine has no 16 free huge pages of 2 MiB");
        return;
    }
    for program in programs() {
        let qemu = start(
            &program,
            &[
                "-m",
                "32",
                "-object",
                "memory-backend-memfd,id=mem0,size=32M,share=on,hugetlb=on,hugetlbsize=2M",
                "-machine",
                "pc,memory-backend=mem0",
            ],
        );
        let found = shared_ram(&qemu.monitor).unwrap();
        assert_eq!(found[0].page_bytes, 2 << 20);
    }
}

#[test]
fn a_user_without_rights_hears_which_are_missing() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only root can start a program as another user");
        return;
    }
    for program in programs() {
        let qemu = start(
            &program,
            &[
                "-m",
                "32",
                "-object",
                "memory-backend-memfd,id=mem0,size=32M,share=on",
                "-machine",
                "pc,memory-backend=mem0",
            ],
        );
        // The user may use the monitor, but not look into the process.
        let folder = qemu.folder.path();
        for (path, mode) in [(folder.to_owned(), 0o711), (folder.join("qmp"), 0o666)] {
            std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        }
        let copy = folder.join("this-test");
        std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
        let path = qemu.monitor.client().path().to_owned();
        qemu.monitor.client().disconnect();
        let output = Command::new(&copy)
            .args(["--exact", "looks_without_rights", "--nocapture"])
            .env("STERNA_TEST_MONITOR", path)
            .uid(65534)
            .gid(65534)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("no right to"), "{text}");
    }
}

/// The other user of the test above; on its own, it does nothing.
#[test]
fn looks_without_rights() {
    let Some(path) = std::env::var_os("STERNA_TEST_MONITOR") else { return };
    let error = shared_ram(&Monitor::new(Client::connect(path).unwrap())).unwrap_err();
    assert!(matches!(error, SharedRamError::NoRight { .. }), "{error}");
    println!("{error}");
}

#[test]
fn a_process_that_is_no_qemu_is_refused() {
    let fake = Fake::answering(|command, _| match command {
        "query-memdev" => json!([{ "id": "mem0", "size": 4096, "share": true }]),
        "human-monitor-command" => Value::from(
            "Block Name PSize Offset Used Total HVA RO\n\
             mem0 4 KiB 0x0 0x1000 0x1000 0x7f0000000000 rw\n",
        ),
        _ => json!({}),
    });
    let monitor = Monitor::new(Client::connect(&fake.path).unwrap());
    let error = shared_ram(&monitor).unwrap_err();
    assert!(matches!(error, SharedRamError::NotQemu { .. }), "{error}");
    let _ = monitor.client().execute("end of the fake", &json!({}));
    fake.finish();
}
