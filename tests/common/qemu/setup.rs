//! Command lines of QEMU.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use sterna::host::{KvmAccess, kvm_access};
use tempfile::TempDir;

use super::super::in_a_lab;
use super::disk::Disk;
use super::memory::Memory;
use super::network::{GUEST_ADDRESS, Network};
use super::programs::Program;
use super::running::Qemu;

/// A machine, as its source and its destination start it.
#[derive(Clone, Debug)]
pub(crate) struct Setup<'a> {
    program: Program,
    machine: String,
    accelerator: String,
    cpu: Option<String>,
    memory: Memory,
    memory_mib: u64,
    prealloc: bool,
    cpus: u32,
    devices: Devices,
    guest: Guest,
    disk: Option<&'a Disk>,
    network: Option<&'a Network>,
    extra: Vec<String>,
}

/// Which devices the machine has, beside the serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Devices {
    /// What the guest needs.
    Few,
    /// What a server has as well: VGA, balloon, random numbers, USB, virtio-serial, virtio-scsi, sound.
    Many,
}

/// The parameters of the boot sector; all sizes are in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BootSector {
    /// The machine's memory. All but the first is written and checked.
    pub(crate) memory_mib: u32,
    /// How much is rewritten in each sweep.
    pub(crate) hot_mib: u32,
    /// Passes of an empty loop after each page that is rewritten.
    pub(crate) delay: u32,
}

/// The parameters of the Linux guest's load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinuxGuest {
    /// The machine's memory; the kernel needs at least 96 MiB beside the load.
    pub(crate) memory_mib: u32,
    /// Memory that the load writes and checks.
    pub(crate) load_mib: u32,
    /// Pages that it rewrites a second; 0 for as many as possible.
    pub(crate) rate: u32,
}

#[derive(Clone, Debug)]
enum Guest {
    BootSector(BootSector),
    Linux(LinuxGuest),
}

impl Default for BootSector {
    fn default() -> Self {
        Self { memory_mib: 64, hot_mib: 16, delay: 0 }
    }
}

impl Default for LinuxGuest {
    /// In the VM lab, whose machine is often emulated, the guest is smaller and writes less, so that
    /// a migration still converges.
    fn default() -> Self {
        let (load_mib, rate) = if is_vm_lab() { (16, 200) } else { (64, 2000) };
        Self { memory_mib: 192, load_mib, rate }
    }
}

impl<'a> Setup<'a> {
    /// A small machine: q35, one CPU, a memfd, the serial port.
    pub(crate) fn boot_sector(program: &Program, guest: BootSector) -> Self {
        Self::new(program, guest.memory_mib, Guest::BootSector(guest))
    }

    /// A machine with two CPUs and [many devices](Devices::Many), on KVM where the processor provides it. In
    /// a lab it has one CPU: UML has no more, and with the second, its kernel boots twice as long in either
    /// lab. In the VM lab, whose machine is often emulated, it has few devices.
    pub(crate) fn linux(program: &Program, guest: LinuxGuest) -> Self {
        let setup = Self::new(program, guest.memory_mib, Guest::Linux(guest));
        // With a thread for each CPU, QEMU 10 sometimes aborts while Linux boots (`iotlb_to_section`).
        let accelerator = if processor_has_kvm() { "kvm" } else { "tcg,thread=single" };
        let cpus = if in_a_lab() { 1 } else { 2 };
        let devices = if is_vm_lab() { Devices::Few } else { Devices::Many };
        Self { cpus, devices, ..setup }.accelerator(accelerator)
    }

    fn new(program: &Program, memory_mib: u32, guest: Guest) -> Self {
        Self {
            program: program.clone(),
            machine: "q35".to_owned(),
            accelerator: "tcg".to_owned(),
            cpu: None,
            memory: Memory::Memfd,
            memory_mib: memory_mib.into(),
            prealloc: false,
            cpus: 1,
            devices: Devices::Few,
            guest,
            disk: None,
            network: None,
            extra: Vec::new(),
        }
    }

    /// The same machine in another version of QEMU; both need one [machine type](Self::machine).
    pub(crate) fn program(self, program: &Program) -> Self {
        Self { program: program.clone(), ..self }
    }

    /// A machine type, such as `pc` or `pc-q35-7.2`.
    pub(crate) fn machine(self, machine: &str) -> Self {
        Self { machine: machine.to_owned(), ..self }
    }

    /// `tcg`, `kvm`, or with options of QEMU.
    pub(crate) fn accelerator(self, accelerator: &str) -> Self {
        Self { accelerator: accelerator.to_owned(), ..self }
    }

    pub(crate) fn cpu(self, cpu: &str) -> Self {
        Self { cpu: Some(cpu.to_owned()), ..self }
    }

    pub(crate) fn cpus(self, cpus: u32) -> Self {
        Self { cpus, ..self }
    }

    pub(crate) fn memory(self, memory: Memory) -> Self {
        Self { memory, ..self }
    }

    /// Allocates all RAM at the start.
    pub(crate) fn prealloc(self) -> Self {
        Self { prealloc: true, ..self }
    }

    pub(crate) fn devices(self, devices: Devices) -> Self {
        Self { devices, ..self }
    }

    /// The Linux guest mounts it and writes to it.
    pub(crate) fn disk(self, disk: &'a Disk) -> Self {
        Self { disk: Some(disk), ..self }
    }

    pub(crate) fn network(self, network: &'a Network) -> Self {
        Self { network: Some(network), ..self }
    }

    /// Further arguments.
    pub(crate) fn arguments<S: Into<String>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.extra.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// The names of the RAM blocks that hold its memory.
    pub(crate) fn blocks(&self) -> &'static [&'static str] {
        self.memory.blocks()
    }

    /// Starts the guest.
    pub(crate) fn start(&self) -> Qemu {
        self.start_with("source", &[])
    }

    /// Starts a machine that waits for the guest: `-incoming defer -S`.
    pub(crate) fn start_incoming(&self) -> Qemu {
        self.start_with("destination", &["-incoming", "defer", "-S"])
    }

    /// Starts the machine with its vCPUs stopped.
    pub(crate) fn start_stopped(&self) -> Qemu {
        self.start_with("source", &["-S"])
    }

    /// Starts the guest in memory that no other process can map.
    pub(crate) fn start_with_private_memory(&self) -> Qemu {
        Self { memory: Memory::Private, ..self.clone() }.start()
    }

    /// Its command line for a shell, with the files in this folder.
    pub(super) fn shell_command(&self, folder: &TempDir) -> String {
        let command = self.command("started", folder);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words: Vec<_> = words.map(|word| format!("'{}'", word.to_string_lossy())).collect();
        words.join(" ")
    }

    fn start_with(&self, role: &str, arguments: &[&str]) -> Qemu {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let name = format!("{role}-{}", STARTED.fetch_add(1, Ordering::Relaxed));
        let folder = tempfile::Builder::new().prefix("sterna-qemu-").tempdir().expect("a temporary folder");
        let mut command = self.command(&name, &folder);
        command.args(arguments);
        Qemu::start(command, name, folder)
    }

    fn command(&self, name: &str, folder: &TempDir) -> Command {
        let (memory, machine) = self.memory.arguments(name, self.memory_mib, self.prealloc);
        let mut command = Command::new(&self.program.path);
        command.args(["-name", name, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.args(["-machine", &format!("{}{machine}", self.machine), "-accel", &self.accelerator]);
        command.args(["-m", &format!("{}M", self.memory_mib), "-smp", &self.cpus.to_string()]).args(memory);
        command.args(self.cpu.iter().flat_map(|cpu| ["-cpu", cpu]));
        for argument in Qemu::channels(folder.path()) {
            command.arg(argument);
        }
        self.add_guest(&mut command, folder.path());
        command.args(self.disk.map(Disk::arguments).unwrap_or_default());
        command.args(self.network.map(|network| network.plug_in(name)).unwrap_or_default());
        if self.devices == Devices::Few {
            command.args(["-global", "virtio-net-pci.romfile="]);
        }
        if self.devices == Devices::Many {
            command.args(MANY_DEVICES.split_whitespace());
        }
        command.args(&self.extra);
        command
    }

    fn add_guest(&self, command: &mut Command, folder: &Path) {
        match &self.guest {
            Guest::BootSector(parameters) => {
                let image = folder.join("boot-sector");
                fs::write(&image, parameters.image(self.program.boot_sector()))
                    .expect("the temporary folder can be written");
                let node = format!("file,node-name=boot,read-only=on,filename={}", image.display());
                command.args(["-blockdev", &node, "-device", "virtio-blk-pci,drive=boot,bootindex=0"]);
            }
            Guest::Linux(parameters) => {
                let append = format!(
                    "console=ttyS0 loglevel=5 panic=-1 mitigations=off cryptomgr.notests sterna.memory={} sterna.rate={} \
                     sterna.threads={} sterna.address={GUEST_ADDRESS}",
                    parameters.load_mib, parameters.rate, self.cpus
                );
                let folder = self.program.linux_guest();
                command.arg("-kernel").arg(folder.join("vmlinuz"));
                command.arg("-initrd").arg(folder.join("initramfs")).args(["-append", &append]);
            }
        }
    }
}

impl BootSector {
    /// The image with these parameters at the places that its source names.
    fn image(&self, mut image: Vec<u8>) -> Vec<u8> {
        assert_eq!(image.len(), 512, "a boot sector");
        let mib = |count: u32| count << 20;
        let parameters = [mib(1 + self.hot_mib), mib(self.memory_mib), self.delay];
        for (place, value) in image[498..510].chunks_exact_mut(4).zip(parameters) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        // The firmware reads no disk that is smaller than a cylinder.
        image.resize(1 << 20, 0);
        image
    }
}

fn is_vm_lab() -> bool {
    std::env::var_os("STERNA_LAB_KIND").is_some_and(|kind| kind == "vm")
}

/// Whether KVM works by the processor. Where it works by software, Linux takes too long to boot.
fn processor_has_kvm() -> bool {
    let description = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = description.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has_flag = flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx");
    has_flag && matches!(kvm_access(), KvmAccess::Usable)
}

const MANY_DEVICES: &str = "
    -vga std
    -device virtio-balloon-pci
    -device virtio-rng-pci
    -device qemu-xhci,id=usb -device usb-tablet,bus=usb.0
    -device virtio-serial-pci,id=ports -chardev null,id=port -device virtserialport,bus=ports.0,chardev=port
    -device virtio-scsi-pci,id=scsi
    -blockdev null-co,node-name=scsi-disk,size=67108864,read-zeroes=on -device scsi-hd,bus=scsi.0,drive=scsi-disk
    -audiodev none,id=sound -device intel-hda -device hda-output,audiodev=sound
";
