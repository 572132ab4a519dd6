//! A guest of a VMM in another process: its RAM is a memfd of that process, and a stream names the pages that
//! the guest writes. `cargo run --example external_memory`
//!
//! The "VMM" is this program, started again with a Unix socket as its standard input. It understands the
//! lines `run`, `pause`, `save` and `load COUNT`, and answers each with a line; in between it says
//! `wrote PAGE` after each page that its guest wrote. The engine's process maps the memfd, moves the pages
//! and never sees them written.

use std::error::Error;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver as Answers, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use sterna::destination::{self, Receiver};
use sterna::dirty::{CaughtUp, DirtyError, DirtyLog, DirtyRegion, InitiallyDirty, SoftwareBitmap};
use sterna::guest::Refusal;
use sterna::guest::{
    DestinationGuest, Guest, GuestError, GuestHost, Heartbeat, Proposal, RunOutcome, SourceGuest, WriteQuota,
};
use sterna::memory::{GuestRam, PAGE_BYTES, RamRegion, RegionLayout};
use sterna::saved_state::{StateReader, StateWriter};
use sterna::source::{Options, migrate};
use sterna::state::HostState;
use sterna::transport::tcp::TcpProvider;
use vm_memory::bitmap::{Bitmap, NewBitmap};

const PAGES: u64 = 4096;
const RAM: RegionLayout = RegionLayout { guest_address: 0, len_bytes: PAGES * PAGE_BYTES };
const PAGE_LEN: usize = 4096;
const RAM_LEN: usize = 4096 * PAGE_LEN;

/// The guest, as the engine's process knows it.
struct Remote {
    process: Mutex<Child>,
    ram: GuestRam,
    memory: Arc<File>,
    commands: Mutex<(UnixStream, Answers<String>)>,
    written: Arc<Written>,
    /// RAM when the guest was started here, to be compared.
    arrived_with: Mutex<Vec<u8>>,
}

/// The pages that the stream named, and whether it has ended.
#[derive(Debug)]
struct Written {
    pages: SoftwareBitmap,
    ended: AtomicBool,
}

#[derive(Debug)]
struct StreamLog(Arc<Written>);

impl DirtyLog for StreamLog {
    fn start(&self) -> Result<InitiallyDirty, DirtyError> {
        Ok(InitiallyDirty::All)
    }

    fn catch_up(&self) -> Result<CaughtUp, DirtyError> {
        Ok(CaughtUp::Fully { unnamed_pages: 0 })
    }

    fn harvest(&self, _region: usize, dirty: &mut DirtyRegion) -> Result<(), DirtyError> {
        if self.0.ended.load(Ordering::SeqCst) {
            return Err(DirtyError::vmm("the VMM has ended its stream of written pages"));
        }
        self.0.pages.take(|word, bits| dirty.mark_word(word, bits));
        Ok(())
    }

    /// The harvest consumed the marks, and a page is named after it was written: what is written from now
    /// on is named again.
    fn clear(&self, _region: usize, _first_page: u64, _bits: &[u64]) -> Result<(), DirtyError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

impl Remote {
    /// Starts a VMM whose guest has never run.
    fn start_vmm() -> Result<Self, Box<dyn Error>> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut vmm = Command::new(std::env::current_exe()?);
        let process = Mutex::new(vmm.arg("vmm").stdin(OwnedFd::from(theirs)).spawn()?);
        drop(vmm);
        let pages = SoftwareBitmap::with_len(RAM_LEN);
        let written = Arc::new(Written { pages, ended: AtomicBool::new(false) });
        let (answer, answers) = mpsc::channel();
        let (lines, marks) = (BufReader::new(ours.try_clone()?).lines(), written.clone());
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let Some(page) = line.strip_prefix("wrote ") else {
                    drop(answer.send(line));
                    continue;
                };
                // The bitmap leaves out what lies outside of RAM.
                let Ok(page) = page.parse::<usize>() else { break };
                marks.pages.mark_dirty(page.saturating_mul(PAGE_LEN), 1);
            }
            marks.ended.store(true, Ordering::SeqCst);
        });
        let path = answers.recv_timeout(PATIENCE)?;
        let memory = Arc::new(File::options().read(true).write(true).open(path)?);
        let ram = GuestRam::from_regions([RamRegion::map_file(RAM, memory.clone(), 0)?])?;
        let commands = Mutex::new((ours, answers));
        Ok(Self { process, ram, memory, commands, written, arrived_with: Mutex::default() })
    }

    /// The VMM's answer. All pages that it named before are marked then: both come by the same stream.
    fn ask(&self, command: &str) -> Result<String, GuestError> {
        let mut commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(commands.0, "{command}")?;
        commands
            .1
            .recv_timeout(PATIENCE)
            .map_err(|error| GuestError::new(format!("no answer to {command}: {error}")))
    }

    /// A VMM whose answer is lost may have let its guest run.
    fn run(&self) -> RunOutcome {
        match self.ask("run") {
            Ok(_) => RunOutcome::Running,
            Err(error) => RunOutcome::Unknown { reason: error.to_string() },
        }
    }

    fn contents(&self) -> io::Result<Vec<u8>> {
        let mut contents = vec![0; RAM_LEN];
        self.memory.read_exact_at(&mut contents, 0)?;
        Ok(contents)
    }

    fn end_vmm(&self) -> io::Result<()> {
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        process.kill()?;
        process.wait().map(drop)
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        let _ = self.end_vmm();
    }
}

impl Guest for Remote {
    fn name(&self) -> &str {
        "external"
    }

    fn ram(&self) -> Result<GuestRam, GuestError> {
        Ok(self.ram.clone())
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        None
    }
}

impl SourceGuest for Remote {
    fn details(&self) -> Result<Vec<u8>, GuestError> {
        Ok(Vec::new())
    }

    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, GuestError> {
        Ok(Box::new(StreamLog(self.written.clone())))
    }

    fn throttle(&self, _percent: u8) -> Result<(), GuestError> {
        Err(GuestError::new("this VMM cannot slow its guest"))
    }

    fn write_quota(&self) -> Option<&dyn WriteQuota> {
        None
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.ask("pause").map(drop)
    }

    fn save(&self, state: &mut StateWriter<'_>) -> Result<(), GuestError> {
        Ok(state.section("count")?.write_all(self.ask("save")?.as_bytes())?)
    }

    fn resume(&self) -> Result<RunOutcome, GuestError> {
        Ok(self.run())
    }
}

impl DestinationGuest for Remote {
    fn can_arrive(&self) -> Result<(), GuestError> {
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        match process.try_wait()? {
            None => Ok(()),
            Some(status) => Err(GuestError::new(format!("the VMM ended with {status}"))),
        }
    }

    fn load(&self, state: &mut StateReader<'_>) -> Result<(), GuestError> {
        let mut count = String::new();
        state.section("count")?.take(20).read_to_string(&mut count)?;
        let count: u64 = count.parse().map_err(GuestError::new)?;
        self.ask(&format!("load {count}")).map(drop)
    }

    fn start(&self) -> Result<RunOutcome, GuestError> {
        *self.arrived_with.lock().unwrap_or_else(PoisonError::into_inner) = self.contents()?;
        Ok(self.run())
    }

    fn discard(self) -> Result<(), GuestError> {
        Ok(self.end_vmm()?)
    }
}

/// Starts VMMs for guests that arrive.
struct Host;

impl GuestHost for Host {
    type Guest = Remote;

    fn prepare(&self, _proposal: &Proposal<'_>) -> Result<Remote, Refusal> {
        Remote::start_vmm().map_err(|error| Refusal::Incompatible(error.to_string()))
    }
}

/// The VMM in its own process, until standard input ends. Its guest writes a count into one page after the
/// other.
fn vmm() -> Result<(), Box<dyn Error>> {
    let mut engine = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let memory = File::from(memfd_create("external-guest", MemfdFlags::CLOEXEC)?);
    memory.set_len(RAM.len_bytes)?;
    writeln!(engine, "/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd())?;
    let (command, commands) = mpsc::channel();
    let lines = BufReader::new(engine.try_clone()?).lines();
    thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| command.send(line)));
    let (mut running, mut count) = (false, 0u64);
    loop {
        let next = if running {
            commands.try_recv()
        } else {
            commands.recv().map_err(|_| TryRecvError::Disconnected)
        };
        match next.as_deref() {
            Err(TryRecvError::Disconnected) => return Ok(()),
            Err(TryRecvError::Empty) => {
                count += 1;
                let page = count.wrapping_mul(count) % PAGES;
                memory.write_all_at(&count.to_le_bytes(), page * PAGE_BYTES + count % 512 * 8)?;
                writeln!(engine, "wrote {page}")?;
                continue;
            }
            Ok("save") => writeln!(engine, "{count}")?,
            Ok(command) => {
                running = command == "run";
                if let Some(loaded) = command.strip_prefix("load ") {
                    count = loaded.parse()?;
                }
                writeln!(engine, "done")?;
            }
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    if std::env::args().nth(1).as_deref() == Some("vmm") {
        return vmm();
    }
    let [source, destination] = [(); 2].map(|()| HostState::lost_with_this_process());
    let receiver = Receiver::bind("127.0.0.1:0".parse()?, destination)?;
    let to = receiver.local_address()?.to_string();
    let arriving = thread::spawn(move || receiver.receive(&Host, &destination::Options::default(), &()));

    let guest = Remote::start_vmm()?;
    let claim = source.start(guest.name(), false)?;
    guest.ask("run")?;
    thread::sleep(Duration::from_millis(200));
    let options = Options { transports: TcpProvider.into(), ..Options::default() };
    let report = migrate(&guest, &claim, &to, &options, &())?;
    let arrival = arriving.join().expect("the destination does not panic")?;

    let arrived_with = arrival.guest.arrived_with.lock().unwrap_or_else(PoisonError::into_inner).clone();
    assert!(arrived_with == guest.contents()?, "the guest arrived with other memory than it left with");
    let left_at: u64 = guest.ask("save")?.parse()?;
    while arrival.guest.ask("save")?.parse::<u64>()? < left_at + 1000 {
        thread::sleep(Duration::from_millis(1));
    }
    println!(
        "moved after {left_at} writes, {} pages sent in {} rounds, {:.1} ms of downtime: all memory is equal, and the guest goes on",
        report.pages_sent,
        report.rounds.len(),
        report.downtime_ms
    );
    Ok(())
}

/// How long the VMM has for an answer.
const PATIENCE: Duration = Duration::from_secs(20);
