//! The processor a guest sees, as a description that two hosts can compare.

use serde::{Deserialize, Serialize};

/// The most CPUID entries that a description may hold (KVM's own bound).
pub const MAX_CPUID_ENTRIES: usize = 256;
/// The most model specific registers that a description may hold.
pub const MAX_MSRS: usize = 1024;

/// The difference of TSC rates that a guest tolerates, in parts per million: a clock discipline corrects as
/// much.
const TSC_TOLERANCE_PPM: u64 = 250;

/// A processor: what a guest sees, or what a host can offer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuDescription {
    /// CPUID leaf 0's name of the maker, such as `GenuineIntel`; `synthetic` for a machine without a
    /// processor.
    pub vendor: String,
    /// CPUID as KVM supports it, without the parts that differ between vCPUs.
    pub cpuid: Vec<CpuidEntry>,
    /// The bits of XCR0 that may be set (CPUID leaf 0xD).
    pub xcr0: u64,
    /// The size of the XSAVE area, in bytes.
    pub xsave_bytes: u32,
    /// The model specific registers that belong to a vCPU's state.
    pub msrs: Vec<u32>,
    /// The rate of the time stamp counter, in kHz.
    pub tsc_khz: u32,
    /// Whether the host can run a guest at a TSC rate other than its own (`KVM_CAP_TSC_CONTROL`).
    pub tsc_control: bool,
}

/// One CPUID leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX on input.
    pub function: u32,
    /// ECX on input.
    pub index: u32,
    /// EAX, EBX, ECX and EDX on output.
    pub registers: [u32; 4],
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;
const REGISTER_NAMES: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];

/// The registers that are sets of features, by leaf and subleaf: the host must have every bit that the guest
/// has (Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst).
const FEATURES: [(u32, u32, &[usize]); 11] = [
    (0x1, 0, &[ECX, EDX]),
    (0x7, 0, &[EBX, ECX, EDX]),
    (0x7, 1, &[EAX, EBX, ECX, EDX]),
    (0x7, 2, &[EDX]),
    (0xd, 1, &[EAX]),
    (0x14, 0, &[EBX, ECX]),
    (0x4000_0001, 0, &[EAX]),
    (0x8000_0001, 0, &[ECX, EDX]),
    (0x8000_0007, 0, &[EDX]),
    (0x8000_0008, 0, &[EBX]),
    (0x8000_0021, 0, &[EAX]),
];

/// The common names of the bits in which hosts differ most often.
const NAMES: [(u32, u32, usize, u32, &str); 18] = [
    (0x1, 0, ECX, 12, "fma"),
    (0x1, 0, ECX, 20, "sse4.2"),
    (0x1, 0, ECX, 21, "x2apic"),
    (0x1, 0, ECX, 24, "tsc-deadline"),
    (0x1, 0, ECX, 25, "aes"),
    (0x1, 0, ECX, 26, "xsave"),
    (0x1, 0, ECX, 28, "avx"),
    (0x1, 0, ECX, 30, "rdrand"),
    (0x7, 0, EBX, 3, "bmi1"),
    (0x7, 0, EBX, 5, "avx2"),
    (0x7, 0, EBX, 8, "bmi2"),
    (0x7, 0, EBX, 16, "avx512f"),
    (0x7, 0, EBX, 29, "sha"),
    (0x7, 0, ECX, 2, "umip"),
    (0x7, 0, ECX, 3, "pku"),
    (0x7, 0, EDX, 24, "amx-tile"),
    (0x7, 1, EAX, 5, "avx512-bf16"),
    (0x8000_0001, 0, EDX, 26, "1 GiB pages"),
];

impl CpuDescription {
    /// The description of a machine that has no processor.
    #[must_use]
    pub fn synthetic() -> Self {
        Self { vendor: "synthetic".to_owned(), ..Self::default() }
    }

    /// What a guest with this processor would miss on `host`, one line each; empty if `host` can run the
    /// guest.
    #[must_use]
    pub fn missing_on(&self, host: &Self) -> Vec<String> {
        if self.vendor != host.vendor {
            return vec![format!("a {} processor: the host has {}", self.vendor, host.vendor)];
        }
        let mut missing = Vec::new();
        for (function, index, registers) in FEATURES {
            let (ours, theirs) = (self.leaf(function, index), host.leaf(function, index));
            for &register in registers {
                let lacking = ours[register] & !theirs[register];
                missing.extend((0..32).filter(|bit| lacking >> bit & 1 == 1).map(|bit| {
                    let name = feature_name(function, index, register, bit);
                    format!("CPUID {function:#x}.{index} {} bit {bit}{name}", REGISTER_NAMES[register])
                }));
            }
        }
        let address_bits = |cpu: &Self| cpu.leaf(0x8000_0008, 0)[EAX] & 0xff;
        if address_bits(self) > address_bits(host) {
            missing.push(format!(
                "{} physical address bits: the host has {}",
                address_bits(self),
                address_bits(host)
            ));
        }
        if self.xcr0 & !host.xcr0 != 0 {
            missing.push(format!("the bits {:#x} of XCR0", self.xcr0 & !host.xcr0));
        }
        if self.xsave_bytes > host.xsave_bytes {
            missing.push(format!(
                "{} bytes of XSAVE state: the host has {}",
                self.xsave_bytes, host.xsave_bytes
            ));
        }
        missing.extend(
            self.msrs
                .iter()
                .filter(|msr| !host.msrs.contains(msr))
                .map(|msr| format!("model specific register {msr:#x}")),
        );
        if !same_rate(self.tsc_khz, host.tsc_khz) && !host.tsc_control {
            missing.push(format!(
                "a time stamp counter of {} kHz: the host's runs at {} kHz and cannot be scaled",
                self.tsc_khz, host.tsc_khz
            ));
        }
        missing
    }

    /// Whether the description is within its bounds; check it before using a peer's description.
    #[must_use]
    pub fn is_within_bounds(&self) -> bool {
        self.vendor.len() <= 12 && self.cpuid.len() <= MAX_CPUID_ENTRIES && self.msrs.len() <= MAX_MSRS
    }

    fn leaf(&self, function: u32, index: u32) -> [u32; 4] {
        let wanted = |entry: &&CpuidEntry| entry.function == function && entry.index == index;
        self.cpuid.iter().find(wanted).map_or([0; 4], |entry| entry.registers)
    }
}

/// Whether a guest tolerates the difference between two TSC rates.
pub(crate) fn same_rate(one_khz: u32, other_khz: u32) -> bool {
    u64::from(one_khz.abs_diff(other_khz)) * 1_000_000 <= u64::from(one_khz) * TSC_TOLERANCE_PPM
}

fn feature_name(function: u32, index: u32, register: usize, bit: u32) -> String {
    let known = NAMES.iter().find(|&&(f, i, r, b, _)| (f, i, r, b) == (function, index, register, bit));
    known.map_or_else(String::new, |(.., name)| format!(" ({name})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu() -> CpuDescription {
        let entry = |function, registers| CpuidEntry { function, index: 0, registers };
        CpuDescription {
            vendor: "GenuineIntel".to_owned(),
            cpuid: vec![entry(1, [0x806f8, 0, 0x0120_0000, 0]), entry(0x8000_0008, [46, 0, 0, 0])],
            xcr0: 7,
            xsave_bytes: 4096,
            msrs: vec![0x10, 0x6e0],
            tsc_khz: 2_000_000,
            tsc_control: false,
        }
    }

    #[test]
    fn a_guest_can_go_to_an_equal_or_richer_host() {
        let mut host = cpu();
        assert_eq!(cpu().missing_on(&host), Vec::<String>::new());
        host.cpuid[0].registers[ECX] |= 1 << 28;
        host.msrs.push(0x11);
        host.tsc_khz += 400;
        assert_eq!(cpu().missing_on(&host), Vec::<String>::new());
    }

    #[test]
    fn what_is_missing_is_named() {
        let missing = |change: fn(&mut CpuDescription)| {
            let mut host = cpu();
            change(&mut host);
            let missing = cpu().missing_on(&host);
            assert_eq!(missing.len(), 1, "{missing:?}");
            missing[0].clone()
        };
        assert!(missing(|host| host.cpuid[0].registers[ECX] = 0x20_0000).contains("tsc-deadline"));
        assert!(missing(|host| host.vendor = "AuthenticAMD".to_owned()).contains("AuthenticAMD"));
        assert!(missing(|host| host.cpuid[1].registers[EAX] = 39).contains("39"));
        assert!(missing(|host| host.xcr0 = 3).contains("0x4"));
        assert!(missing(|host| host.xsave_bytes = 832).contains("832"));
        assert!(missing(|host| host.msrs.truncate(1)).contains("0x6e0"));
        assert!(missing(|host| host.tsc_khz = 3_000_000).contains("3000000"));
        let mut scaling = cpu();
        (scaling.tsc_khz, scaling.tsc_control) = (3_000_000, true);
        assert_eq!(cpu().missing_on(&scaling), Vec::<String>::new());
    }
}
