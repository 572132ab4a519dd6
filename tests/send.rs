//! Sending files: real processes, TCP on loopback, and cuts in the middle.
#![cfg(feature = "cli")]

mod common;

use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use common::{Ended, Host, Process, Receiving, change_endpoints, go_between, in_a_lab, wait_until};
use serde_json::Value;
use sterna::transport::rdma::RdmaPath;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// Two hosts, and a folder for each.
struct Hosts {
    source: Host,
    destination: Host,
    folders: TempDir,
}

impl Hosts {
    fn new() -> Self {
        Self::on(&std::env::temp_dir())
    }

    fn on(folder: &Path) -> Self {
        let folders = tempfile::Builder::new().prefix("sterna-send-").tempdir_in(folder).expect("a folder");
        for folder in ["here", "there"] {
            fs::create_dir(folders.path().join(folder)).expect("a folder");
        }
        Self { source: Host::new(), destination: Host::new(), folders }
    }

    fn here(&self, name: &str) -> PathBuf {
        self.folders.path().join("here").join(name)
    }

    fn there(&self, name: &str) -> PathBuf {
        self.folders.path().join("there").join(name)
    }

    fn receive(&self, name: &str, more: &[&str]) -> Receiving {
        let into = format!("--into={}", self.there(name).display());
        self.destination.receive(&[&[into.as_str()], more].concat())
    }

    fn send(&self, name: &str, to: SocketAddr, more: &[&str]) -> Process {
        let (file, to) = (self.here(name).display().to_string(), format!("--to={to}"));
        self.source.start(["send", "--json", &file, &to].iter().chain(more))
    }

    /// Sends a file, which must arrive; returns the report.
    #[track_caller]
    fn moves(&self, name: &str, into: &str) -> Value {
        let receiving = self.receive(into, &["--once"]);
        let report = self.send(name, receiving.address, &["--transport=tcp"]).wait().expect_code(0).json();
        let stored = receiving.process.event("stored");
        receiving.process.wait().expect_code(0);
        assert_eq!(report["status"], "stored", "{report}");
        assert_eq!(report["verified"], true, "{report}");
        assert_eq!(report["digest"], stored["digest"]);
        let arrived = if into.is_empty() { name } else { into };
        self.same(name, arrived);
        assert!(!self.there(&format!("{arrived}.sterna-partial")).exists());
        report
    }

    /// Asserts that two files are equal, byte by byte.
    #[track_caller]
    fn same(&self, here: &str, there: &str) {
        let (here, there) = (fs::read(self.here(here)).unwrap(), fs::read(self.there(there)).unwrap());
        assert_eq!(here.len(), there.len());
        assert!(
            here == there,
            "the first difference is at {:?}",
            here.iter().zip(&there).position(|(a, b)| a != b)
        );
    }
}

/// Pseudo-random bytes without long runs of zeros.
fn noise(len_bytes: u64, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let words = (0..len_bytes.div_ceil(8)).flat_map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state ^ (state >> 33)).to_le_bytes()
    });
    words.take(usize::try_from(len_bytes).unwrap()).collect()
}

/// A file of holes, except for noise at these places.
fn sparse(path: &Path, len_bytes: u64, data: &[(u64, u64)]) {
    let file = File::create(path).unwrap();
    file.set_len(len_bytes).unwrap();
    data.iter().for_each(|&(at, len)| file.write_all_at(&noise(len, at), at).unwrap());
    file.sync_all().unwrap();
}

fn allocated_bytes(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// A relay between two hosts that passes at most `limit` bytes from the source and then drops the rest.
struct Relay {
    address: SocketAddr,
    passed: Arc<AtomicU64>,
}

impl Relay {
    fn to(destination: SocketAddr, limit: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let passed = Arc::new(AtomicU64::new(0));
        let counted = passed.clone();
        thread::spawn(move || {
            for source in listener.incoming().map_while(Result::ok) {
                let Ok(destination) = TcpStream::connect(destination) else { return };
                let (from, to) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
                let counted = counted.clone();
                thread::spawn(move || pass(from, to, Some((&counted, limit))));
                thread::spawn(move || pass(destination, source, None));
            }
        });
        Self { address, passed }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, limit: Option<(&AtomicU64, u64)>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if let Some((passed, limit)) = limit
            && passed.fetch_add(read as u64, Ordering::Relaxed) > limit
        {
            // Drops what the source still sends, until it closes the connection.
            while matches!(from.read(&mut buffer), Ok(1..)) {}
            break;
        }
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

#[test]
fn files_of_any_length_arrive_byte_by_byte() {
    let hosts = Hosts::new();
    for (name, len_bytes) in [("one", 1), ("page", 4096), ("odd", 7 * MIB + 4097), ("blocks", 16 * MIB)] {
        fs::write(hosts.here(name), noise(len_bytes, 7)).unwrap();
        let report = hosts.moves(name, name);
        assert_eq!(report["file_bytes"], len_bytes);
        assert_eq!(report["bytes_sent"], len_bytes.next_multiple_of(4096));
        assert_eq!(report["bytes_resumed"], 0);
        assert_eq!(report["transport"], "tcp");
    }
}

#[test]
fn holes_stay_holes_and_do_not_travel() {
    let hosts = Hosts::new();
    let data = [(0, 100), (9 * MIB + 5, 300_000), (20 * MIB, 4096), (40 * MIB, 5 * MIB)];
    sparse(&hosts.here("sparse"), 64 * MIB - 9, &data);
    let report = hosts.moves("sparse", "");
    let source_bytes = allocated_bytes(&hosts.here("sparse"));
    assert!(allocated_bytes(&hosts.there("sparse")) <= source_bytes + MIB / 4);
    assert!(report["bytes_sent"].as_u64() <= Some(6 * MIB), "{report}");
    assert!(report["data_bytes"].as_u64() <= Some(source_bytes), "{report}");
}

#[test]
fn written_zeros_do_not_travel_and_a_file_without_data_needs_no_lanes() {
    let hosts = Hosts::new();
    fs::write(hosts.here("zeros"), vec![0; 8 << 20]).unwrap();
    let report = hosts.moves("zeros", "zeros");
    assert_eq!((&report["bytes_sent"], &report["data_bytes"]), (&0.into(), &(8 * MIB).into()));
    assert!(allocated_bytes(&hosts.there("zeros")) < MIB);

    sparse(&hosts.here("hole"), 64 * MIB + 1, &[]);
    let report = hosts.moves("hole", "hole");
    assert_eq!((&report["bytes_sent"], &report["data_bytes"]), (&0.into(), &0.into()));
    assert_eq!(report["transport"], Value::Null);

    fs::write(hosts.here("empty"), "").unwrap();
    assert_eq!(hosts.moves("empty", "")["file_bytes"], 0);
}

#[test]
fn a_file_that_is_there_is_replaced_only_when_told() {
    let hosts = Hosts::new();
    fs::write(hosts.here("a"), "new").unwrap();
    fs::write(hosts.there("a"), "old").unwrap();
    let into = format!("--into={}", hosts.there("a").display());
    let refused = hosts.destination.start(["receive", "--port=0", &into]).wait().expect_code(11);
    refused.says("`--force` replaces it");

    let receiving = hosts.receive("", &["--once"]);
    hosts.send("a", receiving.address, &[]).wait().expect_code(11).says("exists at the destination");
    receiving.process.wait().expect_code(10);
    assert_eq!(fs::read(hosts.there("a")).unwrap(), b"old");
    assert!(!hosts.there("a.sterna-partial").exists());

    let receiving = hosts.receive("", &["--force"]);
    hosts.send("a", receiving.address, &[]).wait().expect_code(0);
    receiving.process.wait().expect_code(0);
    hosts.same("a", "a");
}

#[test]
fn the_source_never_chooses_a_path() {
    let hosts = Hosts::new();
    fs::write(hosts.here("a"), "tern").unwrap();
    fs::create_dir(hosts.here("sub")).unwrap();
    // Only the last component travels.
    hosts.moves("sub/../a", "a");
    fs::remove_file(hosts.there("a")).unwrap();
    for name in ["line\nfeed", &"x".repeat(250)] {
        fs::write(hosts.here(name), "tern").unwrap();
        let receiving = hosts.receive("", &["--once"]);
        let ended = hosts.send(name, receiving.address, &[]).wait().expect_code(11);
        ended.says("is not the plain name of a file");
        receiving.process.wait().expect_code(10);
        // Where the operator named the file, its name at the source does not matter.
        hosts.moves(name, "b");
        fs::remove_file(hosts.there("b")).unwrap();
    }
    assert_eq!(fs::read_dir(hosts.there("")).unwrap().count(), 0);
}

#[test]
fn a_folder_that_takes_the_named_ones_place_gets_nothing() {
    let hosts = Hosts::new();
    fs::write(hosts.here("a"), "tern").unwrap();
    let victim = hosts.folders.path().join("victim");
    fs::create_dir(&victim).unwrap();
    fs::write(victim.join("a"), "untouched").unwrap();
    let receiving = hosts.receive("", &["--force"]);
    let named = hosts.folders.path().join("there");
    fs::rename(&named, hosts.folders.path().join("moved")).unwrap();
    symlink(&victim, &named).unwrap();
    hosts.send("a", receiving.address, &[]).wait().expect_code(0);
    receiving.process.wait().expect_code(0);
    assert_eq!(fs::read(victim.join("a")).unwrap(), b"untouched");
    assert_eq!(fs::read(hosts.folders.path().join("moved/a")).unwrap(), b"tern");
}

#[test]
fn what_is_no_file_is_not_sent() {
    let hosts = Hosts::new();
    fs::create_dir(hosts.here("folder")).unwrap();
    symlink("/dev/zero", hosts.here("device")).unwrap();
    let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
    let send = |name| -> Ended { hosts.send(name, nobody, &[]).wait().expect_code(11) };
    send("folder").says("is a directory");
    send("device").says("is a device");
    send("none").says("cannot find");
    fs::write(hosts.here("a"), "tern").unwrap();
    let ended = send("a");
    ended.says("start `sterna receive` on that host");
    assert_eq!(ended.json()["exit"], "refused");
}

#[test]
fn guests_and_files_are_not_taken_for_each_other() {
    let hosts = Hosts::new();
    fs::write(hosts.here("a"), "tern").unwrap();
    let for_a_guest = hosts.destination.receive(&[]);
    hosts.send("a", for_a_guest.address, &[]).wait().expect_code(11).says("sterna receive --into");

    let running = hosts.source.run("tern", &["--machine=synthetic"]);
    let for_a_file = hosts.receive("a", &[]);
    let ended = hosts.source.migrate("tern", for_a_file.address, &[]).wait().expect_code(11);
    ended.says("receives files and no guests");
    // Both processes still wait.
    hosts.send("a", for_a_file.address, &[]).wait().expect_code(0);
    hosts.source.migrate("tern", for_a_guest.address, &[]).wait().expect_code(0);
    running.wait().expect_code(0);
}

/// Passes 20 MiB and then kills an end; returns the report of the second attempt.
#[track_caller]
fn cut(hosts: &Hosts, kill_the_source: bool, between: impl FnOnce(&File)) -> Value {
    let receiving = hosts.receive("a", &[]);
    let relay = Relay::to(receiving.address, 20 * MIB);
    let sending = hosts.send("a", relay.address, &["--transport=tcp"]);
    wait_until("the way is cut", || relay.passed.load(Ordering::Relaxed) > 20 * MIB);
    let receiving = if kill_the_source {
        sending.signal(libc::SIGKILL);
        sending.wait();
        receiving.process.says("a file did not arrive");
        receiving
    } else {
        receiving.process.signal(libc::SIGKILL);
        receiving.process.wait();
        let ended = sending.wait().expect_code(10);
        ended.says("what arrived is kept at the destination").says("sterna send");
        hosts.receive("a", &[])
    };
    assert!(!hosts.there("a").exists());
    between(&File::options().read(true).write(true).open(hosts.there("a.sterna-partial")).unwrap());
    let report = hosts.send("a", receiving.address, &["--transport=tcp"]).wait().expect_code(0).json();
    receiving.process.wait().expect_code(0);
    hosts.same("a", "a");
    assert!(!hosts.there("a.sterna-partial").exists());
    report
}

#[test]
fn a_cut_transfer_is_resumed_with_what_is_missing() {
    for kill_the_source in [true, false] {
        let hosts = Hosts::new();
        let data = [(0, 30 * MIB), (40 * MIB + 4096, 23 * MIB)];
        sparse(&hosts.here("a"), 64 * MIB, &data);
        let report = cut(&hosts, kill_the_source, |_| ());
        let [sent, resumed] =
            ["bytes_sent", "bytes_resumed"].map(|field| report[field].as_u64().unwrap_or_default());
        assert!(resumed >= 10 * MIB && sent <= 43 * MIB, "{report}");
        assert!(allocated_bytes(&hosts.there("a")) <= allocated_bytes(&hosts.here("a")) + MIB / 4);
    }
}

#[test]
fn what_was_damaged_between_two_attempts_is_healed() {
    let hosts = Hosts::new();
    sparse(&hosts.here("a"), 64 * MIB, &[(0, 30 * MIB), (40 * MIB, 20 * MIB)]);
    cut(&hosts, true, |partial| {
        // In data that arrived, in a hole within a block of data, in a hole of its own, and behind the end.
        for at in [5, 60 * MIB + 4096, 35 * MIB, 70 * MIB] {
            partial.write_all_at(b"damage", at).unwrap();
        }
    });
}

#[test]
fn a_partial_file_of_something_else_becomes_the_file_that_is_sent() {
    let hosts = Hosts::new();
    fs::write(hosts.here("a"), noise(9 * MIB, 1)).unwrap();
    fs::write(hosts.there("a.sterna-partial"), noise(12 * MIB, 2)).unwrap();
    assert_eq!(hosts.moves("a", "a")["bytes_resumed"], 0);
    fs::write(hosts.here("empty"), "").unwrap();
    fs::write(hosts.there("empty.sterna-partial"), "something").unwrap();
    hosts.moves("empty", "empty");
}

#[test]
fn a_file_that_changes_while_it_is_sent_is_an_error() {
    type Change = fn(&File);
    let changes: [(&str, Change); 3] = [
        ("written", |file| file.write_all_at(b"other", 3 * MIB).unwrap()),
        ("shorter", |file| file.set_len(MIB).unwrap()),
        ("longer", |file| file.set_len(90 * MIB).unwrap()),
    ];
    for (what, change) in changes {
        let hosts = Hosts::new();
        fs::write(hosts.here("a"), noise(40 * MIB, 3)).unwrap();
        let receiving = hosts.receive("a", &["--once"]);
        let address = slow(receiving.address);
        let sending = hosts.send("a", address, &["--transport=tcp", "--lanes=1"]);
        wait_until("a part arrives", || {
            fs::metadata(hosts.there("a.sterna-partial")).is_ok_and(|file| file.blocks() > 0)
        });
        change(&File::options().write(true).open(hosts.here("a")).unwrap());
        let ended = sending.wait().expect_code(10);
        assert!(ended.stderr.contains("changed while it was sent"), "{what}: {}", ended.stderr);
        receiving.process.wait().expect_code(10);
        assert!(!hosts.there("a").exists(), "{what}");
    }
}

/// A relay on which 64 KiB take a while.
fn slow(destination: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut source in listener.incoming().map_while(Result::ok) {
            let Ok(mut destination) = TcpStream::connect(destination) else { return };
            let (back, forth) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
            thread::spawn(move || pass(forth, back, None));
            thread::spawn(move || {
                let mut buffer = vec![0; 64 << 10];
                while let Ok(read @ 1..) = source.read(&mut buffer) {
                    thread::sleep(std::time::Duration::from_millis(2));
                    if destination.write_all(&buffer[..read]).is_err() {
                        break;
                    }
                }
                let _ = destination.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    address
}

#[test]
fn ctrl_c_ends_it_and_what_arrived_is_kept() {
    let hosts = Hosts::new();
    fs::write(hosts.here("a"), noise(40 * MIB, 3)).unwrap();
    let receiving = hosts.receive("a", &[]);
    let sending = hosts.send("a", slow(receiving.address), &["--transport=tcp", "--lanes=1"]);
    wait_until("whole blocks arrive", || {
        fs::metadata(hosts.there("a.sterna-partial")).is_ok_and(|file| file.blocks() * 512 > 6 * MIB)
    });
    sending.signal(libc::SIGINT);
    sending.wait().expect_code(130).says("cancelled");
    receiving.process.says("a file did not arrive");
    let report = hosts.send("a", receiving.address, &[]).wait().expect_code(0).json();
    assert!(report["bytes_resumed"].as_u64() > Some(0), "{report}");
    hosts.same("a", "a");
}

/// A small file system, unmounted on drop.
struct Tmpfs(TempDir);

impl Tmpfs {
    fn of(size: &str) -> Option<Self> {
        let folder = tempfile::tempdir().ok()?;
        let options = format!("size={size}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "none"])
            .arg(folder.path())
            .status()
            .is_ok_and(|status| status.success());
        if !mounted {
            println!("skipped: mounting a tmpfs needs root: `sudo -E cargo test --test send`");
        }
        mounted.then_some(Self(folder))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_file_for_which_there_is_no_room_is_refused_at_once() {
    let Some(small) = Tmpfs::of("8M") else { return };
    let hosts = Hosts::new();
    let into = small.0.path().join("a").display().to_string();
    let receive = || hosts.destination.receive(&["--once", "--into", &into]);
    fs::write(hosts.here("a"), noise(16 * MIB, 5)).unwrap();
    let receiving = receive();
    hosts.send("a", receiving.address, &[]).wait().expect_code(11).says("free and the file needs 16 MiB");
    assert_eq!(fs::read_dir(small.0.path()).unwrap().count(), 0);
    // Holes need no room.
    sparse(&hosts.here("a"), 64 * MIB, &[(33 * MIB, 4 * MIB)]);
    let receiving = receive();
    hosts.send("a", receiving.address, &["--transport=tcp"]).wait().expect_code(0);
    assert!(fs::read(hosts.here("a")).unwrap() == fs::read(&into).unwrap());
}

#[test]
fn a_file_system_that_becomes_full_is_said_so_and_the_rest_is_sent_later() {
    let Some(small) = Tmpfs::of("24M") else { return };
    let hosts = Hosts::new();
    let (into, other) = (small.0.path().join("a"), small.0.path().join("other"));
    fs::write(hosts.here("a"), noise(20 * MIB, 5)).unwrap();
    // Generated before, because it takes time.
    let filling = noise(24 * MIB, 6);
    let receiving = hosts.destination.receive(&["--into", &into.display().to_string()]);
    let sending = hosts.send("a", slow(receiving.address), &["--transport=tcp", "--lanes=1"]);
    let partial = small.0.path().join("a.sterna-partial");
    wait_until("a part arrives", || fs::metadata(&partial).is_ok_and(|file| file.blocks() * 512 > 4 * MIB));
    let _ = File::create(&other).unwrap().write_all(&filling);
    sending.wait().expect_code(10);
    receiving.process.says("the file system is full");
    fs::remove_file(&other).unwrap();
    let report = hosts.send("a", receiving.address, &[]).wait().expect_code(0).json();
    assert!(report["bytes_resumed"].as_u64() > Some(0), "{report}");
    assert!(fs::read(hosts.here("a")).unwrap() == fs::read(&into).unwrap());
}

#[test]
fn a_file_in_memory_moves_by_rdma_and_one_on_a_disk_falls_back() {
    let Some(address) = RdmaPath::any_address() else {
        assert!(!in_a_lab(), "a lab has an RDMA device");
        println!(
            "skipped: no RDMA device on this machine. With one: `ci/lab uml cargo test --test send`, or make one with \
             `sterna soft-roce up`"
        );
        return;
    };
    let hosts = Hosts::on(Path::new("/dev/shm"));
    let listen = format!("--listen={address}");
    sparse(&hosts.here("a"), 64 * MIB - 5, &[(0, 3 * MIB), (33 * MIB + 7, 9 * MIB), (64 * MIB - 9, 4)]);
    let receiving = hosts.receive("a", &[&listen]);
    let report = hosts.send("a", receiving.address, &["--transport=rdma"]).wait().expect_code(0).json();
    assert_eq!(report["transport"], "rdma", "{report}");
    hosts.same("a", "a");
    assert!(allocated_bytes(&hosts.there("a")) <= allocated_bytes(&hosts.here("a")) + MIB / 4);

    // The file is damaged, then resumed.
    fs::rename(hosts.there("a"), hosts.there("a.sterna-partial")).unwrap();
    File::options()
        .write(true)
        .open(hosts.there("a.sterna-partial"))
        .unwrap()
        .write_all_at(b"damage", MIB)
        .unwrap();
    let receiving = hosts.receive("a", &[&listen]);
    let report = hosts.send("a", receiving.address, &["--transport=rdma"]).wait().expect_code(0).json();
    assert_eq!(report["bytes_sent"], 2 * MIB, "{report}");
    hosts.same("a", "a");

    let hosts = Hosts::on(Path::new(env!("CARGO_TARGET_TMPDIR")));
    fs::write(hosts.here("a"), noise(MIB, 1)).unwrap();
    let receiving = hosts.receive("a", &[&listen, "--once"]);
    hosts.send("a", receiving.address, &["--transport=rdma"]).wait().expect_code(11).says("is on a disk");
    receiving.process.wait().expect_code(10);
    let receiving = hosts.receive("a", &[&listen, "--once"]);
    let report = hosts.send("a", receiving.address, &[]).wait().expect_code(0).json();
    assert_eq!(report["transport"], "tcp", "{report}");
    hosts.same("a", "a");
}

/// The destination has a part from an earlier attempt; of the rest, TCP sends what RDMA cannot.
#[test]
fn a_file_goes_on_over_tcp_where_the_rdma_lanes_fail() {
    let Some(address) = RdmaPath::any_address() else {
        assert!(!in_a_lab(), "a lab has an RDMA device");
        println!("skipped: no RDMA device on this machine");
        return;
    };
    let hosts = Hosts::on(Path::new("/dev/shm"));
    sparse(&hosts.here("a"), 64 * MIB - 5, &[(0, 30 * MIB)]);
    let half = fs::read(hosts.here("a")).unwrap();
    let partial = File::create(hosts.there("a.sterna-partial")).unwrap();
    partial.set_permissions(Permissions::from_mode(0o600)).unwrap();
    partial.write_all_at(&half[..14 << 20], 0).unwrap();
    drop(partial);
    let receiving = hosts.receive("a", &[&format!("--listen={address}"), "--once"]);
    // The peer has no such queue pair: writes get no answer.
    let between = go_between(address, receiving.address, |message| {
        change_endpoints(message, |endpoint| endpoint.queue_pair_number ^= 0x00ff_0000);
    });
    let report = hosts.send("a", between, &[]).wait().expect_code(0).json();
    assert_eq!(report["transport"], "tcp", "{report}");
    assert_eq!(report["bytes_resumed"], 14 * MIB, "{report}");
    receiving.process.wait().expect_code(0);
    hosts.same("a", "a");
}
