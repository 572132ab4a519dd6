#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| sterna_qemu::fuzzing::qemu_description(input));
