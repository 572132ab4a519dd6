//! Streams of real QEMUs whose guest writes: the blob loads, and every page is named.

mod common;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use common::qemu::{Qemu, programs, start};
use serde_json::{Value, json};
use sterna_qemu::Marks;
use sterna_qemu::input::Input;
use sterna_qemu::multifd::{ChannelPages, Channels, ChannelsError, Dialect};
use sterna_qemu::names::{Content, PageNames, SharedBlock};
use sterna_qemu::stream::{Blob, Expected, Stage, Watch, read};

const RAM_BYTES: u64 = 32 << 20;
const PAGES: usize = 32 << 8;
const PAGE_BYTES: u64 = 4096;
const UNSHARED_MAX: u64 = 1 << 30;
/// Only a hang takes as long.
const LIMIT: Duration = Duration::from_secs(300);
/// Rounds after which the guest may be stopped.
const ROUNDS: u64 = 6;
/// The multifd channels, where the test uses them.
const CHANNELS: usize = 2;

/// A boot sector that writes a byte to the serial port, and then fills video memory and 512 KiB of RAM again
/// and again, a quarter of the times with zeros.
///
/// In mode 0x12 QEMU sees each write to video memory. Where the guest writes to it directly, such as in mode
/// 0x13, QEMU loses dirty pages with TCG, 10.0 too: the last contents in its stream are not those in memory.
const GUEST: [u8; 65] = [
    0xfa, // cli
    0x31, 0xc0, // xor %ax,%ax
    0x8e, 0xd8, // mov %ax,%ds
    0x8e, 0xd0, // mov %ax,%ss
    0xbc, 0x00, 0x7c, // mov $0x7c00,%sp
    0xb8, 0x12, 0x00, // mov $0x12,%ax
    0xcd, 0x10, // int $0x10
    0xba, 0xf8, 0x03, // mov $0x3f8,%dx
    0xb0, 0x52, // mov $0x52,%al
    0xee, // out %al,(%dx)
    0x30, 0xdb, // xor %bl,%bl
    0xfe, 0xc3, // inc %bl
    0x80, 0xe3, 0x03, // and $0x3,%bl
    0xbd, 0x00, 0xa0, // mov $0xa000,%bp
    0xe8, 0x12, 0x00, // call 34 <fill>
    0xbd, 0x00, 0x10, // mov $0x1000,%bp
    0xe8, 0x0c, 0x00, // call 34 <fill>
    0x81, 0xc5, 0x00, 0x10, // add $0x1000,%bp
    0x81, 0xfd, 0x00, 0x90, // cmp $0x9000,%bp
    0x75, 0xf3, // jne 25 <next>
    0xeb, 0xe3, // jmp 17 <again>
    0x8e, 0xc5, // mov %bp,%es
    0x88, 0xd8, // mov %bl,%al
    0x31, 0xff, // xor %di,%di
    0xb9, 0xff, 0xff, // mov $0xffff,%cx
    0xf3, 0xaa, // rep stos %al,%es:(%di)
    0xaa, // stos %al,%es:(%di)
    0xc3, // ret
];

#[test]
fn a_real_stream_becomes_a_blob_that_the_destination_loads() {
    for_each_machine(|qemu, machine| move_ram(qemu, machine, 0));
}

#[test]
fn a_real_stream_with_multifd_becomes_a_blob_for_a_destination_without() {
    for_each_machine(|qemu, machine| move_ram(qemu, machine, CHANNELS));
}

fn for_each_machine(test: impl Fn(&Path, &str)) {
    for program in programs() {
        let help = Command::new(&program).args(["-machine", "help"]).output().unwrap();
        let help = String::from_utf8_lossy(&help.stdout).into_owned();
        // The forms of the stream follow the machine type: of 7.2, with flush marks, with zero pages in
        // packets.
        let machines = ["pc-i440fx-7.2", "pc-i440fx-8.1", "pc-q35-9.0", "q35"];
        for machine in machines.iter().filter(|machine| help.contains(&format!("{machine} "))) {
            println!("{} -machine {machine}", program.display());
            test(&program, machine);
        }
    }
}

fn move_ram(program: &Path, machine: &str, channels: usize) {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    write_image(&image);
    let machine = machine_arguments(machine, &image);
    let source = start_with(program, &machine, &["-serial", "file:FOLDER/serial"]);
    source.monitor.cont().unwrap();
    until("the guest to write", || {
        fs::metadata(source.folder.path().join("serial")).is_ok_and(|file| file.len() > 0).then_some(())
    });
    let blocks = [SharedBlock { name: "mem0".to_owned(), len_bytes: RAM_BYTES }];
    let version = source.monitor.version().unwrap();
    let dialect = if version.major < 9 { Dialect::Seven } else { Dialect::Nine };
    let others = Channels::new(channels, dialect, &blocks, UNSHARED_MAX);
    let names = Named::default();

    let path = folder.path().join("stream");
    let listener = UnixListener::bind(&path).unwrap();
    if channels > 0 {
        let multifd = json!({"capabilities": [{"capability": "multifd", "state": true}]});
        ask(&source, "migrate-set-capabilities", &multifd);
        ask(&source, "migrate-set-parameters", &json!({"multifd-channels": channels}));
    }
    ask(&source, "migrate-set-parameters", &json!({"downtime-limit": 1}));
    source.monitor.migrate(&format!("unix:{}", path.display())).unwrap();
    let blob = thread::scope(|scope| {
        let reading = scope.spawn(|| read_from(&listener, &others, channels, &blocks, &names));
        until("several rounds", || {
            let answer = ask(&source, "query-migrate", &json!({}));
            let rounds = answer["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
            (rounds > ROUNDS || reading.is_finished()).then_some(())
        });
        ask(&source, "migrate-set-parameters", &json!({"downtime-limit": 60_000}));
        reading.join().unwrap()
    });
    await_status(&source, "query-migrate", "completed");
    await_status(&source, "query-status", "postmigrate");

    let destination = start_with(program, &machine, &["-serial", "null", "-incoming", "defer"]);
    copy_pages(&names, &ram(&source), &ram(&destination));
    let path = folder.path().join("incoming");
    destination.monitor.migrate_incoming(&format!("unix:{}", path.display())).unwrap();
    let mut incoming = UnixStream::connect(&path).unwrap();
    blob.write_to(&mut incoming).unwrap();
    drop(incoming);
    await_status(&destination, "query-migrate", "completed");
    await_status(&destination, "query-status", "paused");
    let [sent, loaded] = [&source, &destination].map(video_memory);
    let numbered = sent.chunks(4096).zip(loaded.chunks(4096)).enumerate();
    let differing = numbered.filter_map(|(number, (sent, loaded))| (sent != loaded).then_some(number));
    let differing: Vec<_> = differing.collect();
    assert!(differing.is_empty(), "pages {differing:?} of video memory differ");
}

fn write_image(path: &Path) {
    let mut image = GUEST.to_vec();
    image.resize(510, 0);
    image.extend([0x55, 0xaa]);
    // The firmware boots from no disk of one sector.
    image.resize(1 << 20, 0);
    fs::write(path, image).unwrap();
}

/// Reads all channels of the stream. QEMU connects one after the other, in any order.
fn read_from(
    listener: &UnixListener,
    others: &Channels,
    channels: usize,
    blocks: &[SharedBlock],
    names: &Named,
) -> Blob {
    thread::scope(|scope| {
        let mut main = None;
        for _ in 0..=channels {
            let mut socket = Socket::accept(listener);
            if socket.first == *b"QEVM" {
                main = Some(socket);
            } else {
                scope.spawn(move || others.read(&mut socket, names).expect("a channel of QEMU"));
            }
        }
        let expected = Expected {
            shared: blocks,
            machine: None,
            unshared_max_bytes: UNSHARED_MAX,
            state_max_bytes: 64 << 20,
        };
        read(&mut main.expect("the main channel"), &expected, names, &mut Finishing(others)).unwrap()
    })
}

/// Moves the named pages, and checks that no page differs.
fn copy_pages(names: &Named, source: &File, destination: &File) {
    let named = names.0.lock().unwrap();
    let mut page = [0; 4096];
    for (number, _) in named.iter().enumerate().filter(|(_, named)| **named) {
        let at = number as u64 * PAGE_BYTES;
        source.read_exact_at(&mut page, at).unwrap();
        destination.write_all_at(&page, at).unwrap();
    }
    let mut other = page;
    for number in 0..PAGES as u64 {
        source.read_exact_at(&mut page, number * PAGE_BYTES).unwrap();
        destination.read_exact_at(&mut other, number * PAGE_BYTES).unwrap();
        assert!(page == other, "page {number} differs");
    }
}

struct Named(Mutex<Vec<bool>>);

impl Default for Named {
    fn default() -> Self {
        Self(Mutex::new(vec![false; PAGES]))
    }
}

impl PageNames for Named {
    fn named(&self, block: usize, page: u64, _: Content) {
        assert_eq!(block, 0);
        self.0.lock().unwrap()[usize::try_from(page).unwrap()] = true;
    }
}

struct Finishing<'a>(&'a Channels);

impl Watch for Finishing<'_> {
    fn reached(&mut self, _: Stage, _: Marks) {}

    fn finish_channels(&mut self, marks: Marks) -> Result<ChannelPages, ChannelsError> {
        self.0.finish(marks, LIMIT)
    }
}

/// A channel, whose first bytes say which it is.
struct Socket {
    first: [u8; 4],
    unread: usize,
    stream: UnixStream,
}

impl Socket {
    fn accept(listener: &UnixListener) -> Self {
        let (mut stream, _) = listener.accept().unwrap();
        let mut first = [0; 4];
        stream.read_exact(&mut first).unwrap();
        Self { first, unread: 4, stream }
    }
}

impl Input for Socket {
    fn read_exact(&mut self, into: &mut [u8]) -> io::Result<()> {
        Read::read_exact(self, into)
    }

    fn read_some(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.read(into)
    }

    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        match io::copy(&mut Read::by_ref(self).take(bytes), &mut io::sink())? {
            copied if copied == bytes => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.unread == 0 {
            return self.stream.read(into);
        }
        let mut first = &self.first[4 - self.unread..];
        let read = Read::read(&mut first, into)?;
        self.unread -= read;
        Ok(read)
    }
}

/// The arguments of both ends, but for the serial port.
fn machine_arguments(machine: &str, image: &Path) -> Vec<String> {
    let machine = format!("{machine},memory-backend=mem0");
    let drive = format!("id=disk,if=none,format=raw,readonly=on,file={}", image.display());
    let mut arguments = vec!["-machine", &machine, "-m", "32M", "-drive", &drive];
    arguments.extend(["-object", "memory-backend-memfd,id=mem0,size=32M,share=on"]);
    for device in ["VGA", "virtio-balloon-pci", "virtio-rng-pci", "qemu-xhci", "virtio-blk-pci,drive=disk"] {
        arguments.extend(["-device", device]);
    }
    arguments.into_iter().map(str::to_owned).collect()
}

fn start_with(program: &Path, machine: &[String], more: &[&str]) -> Qemu {
    let machine = machine.iter().map(String::as_str);
    start(program, &machine.chain(more.iter().copied()).collect::<Vec<_>>())
}

fn ask(qemu: &Qemu, command: &str, arguments: &Value) -> Value {
    qemu.monitor.client().execute(command, arguments).unwrap()
}

fn await_status(qemu: &Qemu, command: &str, status: &str) {
    until(status, || {
        let found = ask(qemu, command, &json!({}))["status"].clone();
        assert!(found != "failed", "{command} while {status} was awaited");
        (found == status).then_some(())
    });
}

/// The contents of the VGA device's first region, which is not shared.
fn video_memory(qemu: &Qemu) -> Vec<u8> {
    let buses = ask(qemu, "query-pci", &json!({}));
    let devices = buses[0]["devices"].as_array().unwrap();
    let vga = devices.iter().find(|device| device["class_info"]["class"] == 0x300).expect("a VGA device");
    let (address, size) = (&vga["regions"][0]["address"], &vga["regions"][0]["size"]);
    let file = qemu.folder.path().join("video-memory");
    ask(qemu, "pmemsave", &json!({"val": address, "size": size, "filename": file}));
    fs::read(file).unwrap()
}

/// The file of the shared RAM.
fn ram(qemu: &Qemu) -> File {
    let folder = PathBuf::from(format!("/proc/{}/fd", qemu.process()));
    let files = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let is_ram = |path: &PathBuf| {
        path.read_link().is_ok_and(|to| to.to_string_lossy().contains("memfd:memory-backend-memfd"))
    };
    let ram = files.into_iter().find(is_ram).expect("QEMU has a memfd");
    File::options().read(true).write(true).open(ram).unwrap()
}

/// Polls until there is a value.
fn until<T>(what: &str, mut value: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = value() {
            return value;
        }
        assert!(start.elapsed() < LIMIT, "waited too long for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
