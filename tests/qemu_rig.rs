//! The rig of the tests with stock QEMU, without Sterna: guests run, QEMU moves them by itself, and their
//! checks find damage.

mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};

use common::qemu::{BootSector, Devices, Disk, LinuxGuest, Memory, Network, Program, Qemu, Setup, wait_for};

#[test]
fn a_linux_guest_moves_twice_by_qemu_itself_and_stays_whole() {
    let Some(program) = Program::find("10") else { return };
    let (disk, network) = (Disk::new(64), Network::new());
    let setup = Setup::linux(&program, LinuxGuest::default()).disk(&disk).network(&network);

    let mut guest = setup.start();
    let session = network.connect();
    assert_eq!(session.exchange("before"), 1);
    guest.serial().wait_for_ticks(2);
    let mut pages = 0;
    for hop in 2..4 {
        let destination = setup.start_incoming();
        move_by_qemu(&guest, &destination);
        guest.quit();
        assert_eq!(session.exchange("after"), hop, "the TCP session goes on");
        let tick = destination.serial().wait_for_ticks(3);
        assert_eq!((tick.wrong(), tick.jump_ms), (0, 0), "{tick:?}");
        assert!(tick.pages > pages && tick.blocks > 0 && tick.files > 0, "{tick:?}");
        assert_eq!(destination.serial().complaints(), Vec::<String>::new());
        pages = tick.pages;
        guest = destination;
    }
    let serial = guest.stop_linux();
    assert!(serial.text().contains("load: disk unmounted"), "{}", serial.end());
    disk.expect_clean();
}

#[test]
fn a_linux_guest_reports_damage_of_its_memory_and_disk() {
    let Some(program) = Program::find("10") else { return };
    let disk = Disk::new(64);
    let guest = Setup::linux(&program, LinuxGuest::default()).disk(&disk).start();
    let tick = guest.serial().wait_for_ticks(3);
    assert_eq!(tick.wrong(), 0, "{tick:?}");

    assert_ne!(damage_pages(&guest), 0, "no page of the load was found");
    assert_ne!(disk.damage(is_of_the_load), 0, "no block of the load was found");
    let serial = guest.serial();
    wait_for("the guest finds wrong pages and blocks", || {
        serial.ticks().last().is_some_and(|tick| tick.wrong_pages > 0 && tick.wrong_blocks > 0)
    });
    assert!(serial.complaints().iter().any(|line| line.starts_with("wrong page")), "{}", serial.end());
}

#[test]
fn a_boot_sector_reports_each_page_that_was_damaged() {
    for version in ["10", "7.2"] {
        let Some(program) = Program::find(version) else { continue };
        let guest = Setup::boot_sector(&program, BootSector::default()).start();
        let serial = guest.serial();
        serial.wait_for_sweeps(1);
        assert_eq!(serial.wrong_addresses(), Vec::<u64>::new());

        // The second is beyond what it rewrites.
        let damaged = [0x0032_1000, 0x0321_0000];
        for address in damaged {
            guest.damage_ram("mem0", address + 0x804, b"damage");
        }
        serial.wait_for_sweeps(1);
        let found = serial.wrong_addresses();
        assert!(found.contains(&damaged[1]), "{found:x?}");
        assert!(found.iter().all(|address| damaged.contains(address)), "{found:x?}");
    }
}

#[test]
fn guest_memory_of_each_kind_is_found_by_the_name_of_its_block() {
    let Some(program) = Program::find("10") else { return };
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let small = BootSector { memory_mib: 32, hot_mib: 4, delay: 0 };
    let setup = || Setup::boot_sector(&program, small);
    let setups = [
        setup().prealloc(),
        setup().memory(Memory::File(folder.path().to_owned())).machine("pc-q35-7.2"),
        setup().memory(Memory::TwoNodes).cpus(2).machine("pc").devices(Devices::Many),
    ];
    for setup in setups {
        let guest = setup.start();
        let serial = guest.serial();
        serial.wait_for_sweeps(1);
        let blocks = setup.blocks();
        let block_bytes = (32 << 20) / blocks.len() as u64;
        let first = 0x0070_0000;
        let damaged: Vec<u64> = (0..).zip(blocks).map(|(index, _)| first + index * block_bytes).collect();
        for block in blocks {
            let before = guest.read_ram(block, first, 1)[0];
            guest.damage_ram(block, first, &[!before]);
        }
        serial.wait_for_sweeps(1);
        // A sweep that is under way finds the later one first.
        let mut found = serial.wrong_addresses();
        found.sort_unstable();
        assert_eq!(found, damaged, "{setup:?}");
        guest.kill();
    }
}

/// A migration over TCP, without Sterna.
fn move_by_qemu(source: &Qemu, destination: &Qemu) {
    destination.monitor.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }));
    let listening = destination.monitor.execute("query-migrate", json!({}));
    let port = listening["socket-address"][0]["port"].as_str().expect("QEMU listens").to_owned();
    let limits = json!({ "max-bandwidth": 1_u64 << 32, "downtime-limit": 20_000 });
    source.monitor.execute("migrate-set-parameters", limits);
    source.monitor.execute("migrate", json!({ "uri": format!("tcp:127.0.0.1:{port}") }));
    source.monitor.wait_for_migration(&["completed"]);
    destination.monitor.wait_for_migration(&["completed"]);
    wait_for("the destination holds the guest", || destination.status() == "paused");
    assert_eq!(destination.monitor.execute("cont", json!({})), Value::Object(serde_json::Map::new()));
    assert!(destination.runs() && !source.runs());
}

/// Changes a byte in every hundredth page of the load, in the file of guest RAM.
fn damage_pages(guest: &Qemu) -> usize {
    let path = guest.ram("mem0");
    let file = OpenOptions::new().read(true).write(true).open(path).expect("the file of guest RAM");
    let bytes = file.metadata().expect("an open file").len();
    let mut page = [0; 4096];
    let mut found = 0;
    for offset in (0..bytes).step_by(page.len()) {
        file.read_exact_at(&mut page, offset).expect("the file is that long");
        if is_of_the_load(&page) {
            found += 1;
            if found % 100 == 0 {
                guest.damage_ram("mem0", offset + 17, &[!page[17]]);
            }
        }
    }
    found / 100
}

/// Whether a page or block holds what the load writes: its words differ by their number only. Pages of zeros
/// are left out.
fn is_of_the_load(page: &[u8]) -> bool {
    let word = |at: usize| u64::from_le_bytes(page[at * 8..][..8].try_into().expect("eight bytes"));
    word(0) != 0 && (0..512).all(|at| word(at) ^ word(0) == at as u64)
}
