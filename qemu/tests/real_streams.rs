//! Streams of a real QEMU: the blob loads, and every page is named.
//!
//! `STERNA_QEMU` lists programs to test with, separated by colons. Without it the test uses
//! `qemu-system-x86_64`, and does nothing where that is not installed.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

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

fn for_each_machine(test: impl Fn(&str, &str)) {
    let programs = std::env::var("STERNA_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned());
    for qemu in programs.split(':') {
        let Ok(help) = Command::new(qemu).args(["-machine", "help"]).output() else {
            eprintln!("{qemu} is not installed: nothing was tested");
            continue;
        };
        let help = String::from_utf8_lossy(&help.stdout).into_owned();
        // The forms of the stream follow the machine type: of 7.2, with flush marks, with zero pages in
        // packets.
        let machines = ["pc-i440fx-7.2", "pc-i440fx-8.1", "pc-q35-9.0", "q35"];
        for machine in machines.iter().filter(|machine| help.contains(&format!("{machine} "))) {
            eprintln!("{qemu} -machine {machine}");
            test(qemu, machine);
        }
    }
}

fn move_ram(qemu: &str, machine: &str, channels: usize) {
    let folder = tempfile::tempdir().unwrap();
    let mut source = Qemu::start(qemu, machine, folder.path(), Role::Source);
    until("the guest to write", || {
        fs::metadata(folder.path().join("serial")).is_ok_and(|file| file.len() > 0).then_some(())
    });
    let blocks = [SharedBlock { name: "mem0".to_owned(), len_bytes: RAM_BYTES }];
    let version = source.ask("query-version", &json!({}))["qemu"]["major"].as_u64().unwrap();
    let dialect = if version < 9 { Dialect::Seven } else { Dialect::Nine };
    let others = Channels::new(channels, dialect, &blocks, UNSHARED_MAX);
    let names = Named::default();

    let path = folder.path().join("stream");
    let listener = UnixListener::bind(&path).unwrap();
    if channels > 0 {
        source.ask(
            "migrate-set-capabilities",
            &json!({"capabilities": [{"capability": "multifd", "state": true}]}),
        );
        source.ask("migrate-set-parameters", &json!({"multifd-channels": channels}));
    }
    source.ask("migrate-set-parameters", &json!({"downtime-limit": 1}));
    source.ask("migrate", &json!({"uri": format!("unix:{}", path.display())}));
    let blob = thread::scope(|scope| {
        let reading = scope.spawn(|| read_from(&listener, &others, channels, &blocks, &names));
        until("several rounds", || {
            let answer = source.ask("query-migrate", &json!({}));
            let rounds = answer["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
            (rounds > ROUNDS || reading.is_finished()).then_some(())
        });
        source.ask("migrate-set-parameters", &json!({"downtime-limit": 60_000}));
        reading.join().unwrap()
    });
    source.await_status("query-migrate", "completed");
    source.await_status("query-status", "postmigrate");

    let mut destination = Qemu::start(qemu, machine, folder.path(), Role::Destination);
    copy_pages(&names, &source.ram(), &destination.ram());
    let path = folder.path().join("incoming");
    destination.ask("migrate-incoming", &json!({"uri": format!("unix:{}", path.display())}));
    let mut incoming = UnixStream::connect(&path).unwrap();
    blob.write_to(&mut incoming).unwrap();
    drop(incoming);
    destination.await_status("query-migrate", "completed");
    destination.await_status("query-status", "paused");
    let [sent, loaded] = [&mut source, &mut destination].map(|qemu| qemu.video_memory(folder.path()));
    let [sent, loaded] = [&sent, &loaded].map(|memory| memory.chunks(4096));
    let numbered = sent.zip(loaded).enumerate();
    let differing = numbered.filter_map(|(number, (sent, loaded))| (sent != loaded).then_some(number));
    let differing: Vec<_> = differing.collect();
    assert!(differing.is_empty(), "pages {differing:?} of video memory differ");
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

/// A QEMU with its monitor.
struct Qemu {
    process: Child,
    monitor: BufReader<UnixStream>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Source,
    Destination,
}

impl Qemu {
    fn start(program: &str, machine: &str, folder: &Path, role: Role) -> Self {
        let (image, monitor) = (folder.join("image"), folder.join(["source", "destination"][role as usize]));
        let mut sector = GUEST.to_vec();
        sector.resize(510, 0);
        sector.extend([0x55, 0xaa]);
        // The firmware boots from no disk of one sector.
        sector.resize(1 << 20, 0);
        fs::write(&image, sector).unwrap();
        let serial = match role {
            Role::Source => format!("file:{}", folder.join("serial").display()),
            Role::Destination => "null".to_owned(),
        };
        let mut command = Command::new(program);
        command
            .args(["-accel", "tcg", "-machine", &format!("{machine},memory-backend=mem0"), "-m", "32M"])
            .args(["-object", "memory-backend-memfd,id=mem0,size=32M,share=on"])
            .args(["-nodefaults", "-display", "none", "-serial", &serial])
            .args(["-device", "VGA", "-device", "virtio-balloon-pci", "-device", "virtio-rng-pci"])
            .args(["-device", "qemu-xhci", "-device", "virtio-blk-pci,drive=disk"])
            .args(["-drive", &format!("id=disk,if=none,format=raw,readonly=on,file={}", image.display())])
            .args(["-qmp", &format!("unix:{},server,nowait", monitor.display())])
            .args(if role == Role::Destination { &["-incoming", "defer", "-S"][..] } else { &[] })
            .stdin(Stdio::null());
        let process = command.spawn().unwrap();
        let stream = until("its monitor", || UnixStream::connect(&monitor).ok());
        let mut this = Self { process, monitor: BufReader::new(stream) };
        this.answer();
        this.ask("qmp_capabilities", &json!({}));
        this
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Value {
        let text = json!({"execute": command, "arguments": arguments}).to_string();
        self.monitor.get_mut().write_all(text.as_bytes()).unwrap();
        let answer = self.answer();
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        answer["return"].clone()
    }

    /// The next line that is no event.
    fn answer(&mut self) -> Value {
        loop {
            let mut line = String::new();
            assert!(self.monitor.read_line(&mut line).unwrap() > 0, "QEMU has ended");
            let value: Value = serde_json::from_str(&line).unwrap();
            if value.get("event").is_none() {
                return value;
            }
        }
    }

    fn await_status(&mut self, command: &str, status: &str) {
        until(status, || {
            let found = self.ask(command, &json!({}))["status"].clone();
            assert!(found != "failed", "{command} while {status} was awaited");
            (found == status).then_some(())
        });
    }

    /// The contents of the VGA device's first region, which is not shared.
    fn video_memory(&mut self, folder: &Path) -> Vec<u8> {
        let buses = self.ask("query-pci", &json!({}));
        let devices = buses[0]["devices"].as_array().unwrap();
        let vga = devices.iter().find(|device| device["class_info"]["class"] == 0x300).expect("a VGA device");
        let (address, size) = (&vga["regions"][0]["address"], &vga["regions"][0]["size"]);
        let file = folder.join("video-memory");
        self.ask("pmemsave", &json!({"val": address, "size": size, "filename": file}));
        fs::read(file).unwrap()
    }

    fn ram(&self) -> File {
        let folder = PathBuf::from(format!("/proc/{}/fd", self.process.id()));
        let files = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
        let is_ram = |path: &PathBuf| {
            path.read_link().is_ok_and(|to| to.to_string_lossy().contains("memfd:memory-backend-memfd"))
        };
        let ram = files.into_iter().find(is_ram).expect("QEMU has a memfd");
        File::options().read(true).write(true).open(ram).unwrap()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Polls until there is a value.
fn until<T>(what: &str, mut value: impl FnMut() -> Option<T>) -> T {
    let start = std::time::Instant::now();
    loop {
        if let Some(value) = value() {
            return value;
        }
        assert!(start.elapsed() < LIMIT, "waited too long for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
