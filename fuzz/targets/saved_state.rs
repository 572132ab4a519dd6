#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| sterna::fuzzing::saved_state(input));
