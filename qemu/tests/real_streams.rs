//! Streams of a real QEMU: the blob loads, and every page is named.
//!
//! `STERNA_QEMU` lists programs to test with, separated by colons. Without it the test uses
//! `qemu-system-x86_64`, and does nothing where that is not installed.

use std::fs::File;
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
/// The multifd channels, where the test uses them.
const CHANNELS: usize = 2;

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
    let mut source = Qemu::start(qemu, machine, &folder.path().join("source"), false);
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
    source.ask("migrate", &json!({"uri": format!("unix:{}", path.display())}));
    let blob = read_from(&listener, &others, channels, &blocks, &names);
    source.await_status("query-migrate", "completed");
    source.await_status("query-status", "postmigrate");

    let mut destination = Qemu::start(qemu, machine, &folder.path().join("destination"), true);
    copy_pages(&names, &source.ram(), &destination.ram());
    let path = folder.path().join("incoming");
    destination.ask("migrate-incoming", &json!({"uri": format!("unix:{}", path.display())}));
    let mut incoming = UnixStream::connect(&path).unwrap();
    blob.write_to(&mut incoming).unwrap();
    drop(incoming);
    destination.await_status("query-migrate", "completed");
    destination.await_status("query-status", "paused");
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

impl Qemu {
    fn start(program: &str, machine: &str, monitor: &Path, incoming: bool) -> Self {
        let mut command = Command::new(program);
        command
            .args(["-accel", "tcg", "-machine", &format!("{machine},memory-backend=mem0"), "-m", "32M"])
            .args(["-object", "memory-backend-memfd,id=mem0,size=32M,share=on"])
            .args(["-nodefaults", "-display", "none", "-device", "VGA", "-device", "virtio-balloon-pci"])
            .args(["-qmp", &format!("unix:{},server,nowait", monitor.display())])
            .args(if incoming { &["-incoming", "defer", "-S"][..] } else { &[] })
            .stdin(Stdio::null());
        let process = command.spawn().unwrap();
        let stream = until("its monitor", || UnixStream::connect(monitor).ok());
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
