//! The guest's code: 64-bit, position-independent, plain integer instructions (some hosts interpret them).
//!
//! Registers, from start to end:
//!
//! | register | holds |
//! |---|---|
//! | r15 | the vCPU's control page; the interrupt handlers rely on it |
//! | r14 | generation being written |
//! | r13 | progress: pages written over all passes |
//! | r12 | address of the next page |
//! | r11 | its number plus the generation (gives the slot) |
//! | r10 | `WORD_STEP` |
//! | r9  | pages still to write in this tick |
//! | r8  | `PAGE_FACTOR` |
//! | rsi | the word for block 0 of the next page |
//! | rbp | 1 in the second run of pages, else 0 |
//! | rbx | pages left in the run |
//!
//! rax, rcx, rdx and rdi are for passing use.
#![expect(unsafe_code, reason = "assembly, and the symbols that mark its beginning and end")]

use std::arch::global_asm;
use std::slice;

use crate::guest::layout::JOURNAL;
use crate::guest::{beat_page, control, pattern};

/// The guest beats by a 32-bit write of its count to this port.
pub(crate) const PORT_BEAT: u16 = 0x510;
/// The console.
pub(crate) const PORT_SERIAL: u16 = 0x3f8;

pub(crate) const VECTOR_PIT: u8 = 0x20;
pub(crate) const VECTOR_PIC_SPURIOUS: u8 = 0x27;
pub(crate) const VECTOR_TIMER: u8 = 0x30;
pub(crate) const VECTOR_SPURIOUS: u8 = 0xff;

/// Pages between two looks at the clock.
const BATCH_PAGES: u64 = 16;

// Model specific registers (Intel SDM volume 4; their meaning in volume 3, the chapter on the APIC).
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_X2APIC_EOI: u32 = 0x80b;
const MSR_X2APIC_SPURIOUS: u32 = 0x80f;
const MSR_X2APIC_LVT_TIMER: u32 = 0x832;
const MSR_X2APIC_LVT_LINT0: u32 = 0x835;

global_asm!(
    ".pushsection .rodata.sterna_guest, \"a\", @progbits",
    ".balign 16",
    ".globl sterna_guest_start",
    "sterna_guest_start:",
    // Every vCPU begins here: rdi is its control page, rsp its stack, interrupts are off.
    "mov r15, rdi",
    "mov ecx, {MSR_X2APIC_SPURIOUS}",
    "mov eax, 0x100 + {VECTOR_SPURIOUS}", // bit 8: the local APIC is on
    "xor edx, edx",
    "wrmsr",
    "mov ecx, {MSR_X2APIC_LVT_TIMER}",
    "mov eax, 0x40000 + {VECTOR_TIMER}", // bits 18..17 = 2: TSC deadline
    "wrmsr",
    "cmp qword ptr [r15 + {INDEX}], 0",
    "jne .Lguest_begin",
    "call .Lguest_board",
    ".Lguest_begin:",
    "mov r8, {PAGE_FACTOR}",
    "mov r10, {WORD_STEP}",
    "mov r13, [r15 + {PROGRESS}]",
    "mov r14, [r15 + {FIRST_GENERATION}]",
    "call .Lguest_first_run",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov [r15 + {TICK_START}], rax",
    "sti",
    // A tick: check on request, beat, write what the rate allows, sleep until the next.
    ".Lguest_tick:",
    "mov rax, [r15 + {CHECK_REQUEST}]",
    "cmp rax, [r15 + {CHECK_DONE}]",
    "je .Lguest_no_check",
    "call .Lguest_check",
    ".Lguest_no_check:",
    "call .Lguest_beat",
    "mov r9, [r15 + {PAGES_PER_TICK}]",
    "test r9, r9",
    "jz .Lguest_once",
    "add r9, [r15 + {CREDIT}]",
    "mov eax, r9d",
    "mov [r15 + {CREDIT}], rax",
    "shr r9, 32",
    "jmp .Lguest_sweep",
    ".Lguest_once:",
    "mov r9, [r15 + {TARGET}]",
    "sub r9, r13",
    "jae .Lguest_sweep",
    "xor r9d, r9d",
    // Write r9 pages, in batches that end with the run.
    ".Lguest_sweep:",
    "test r9, r9",
    "jz .Lguest_idle",
    "mov ecx, {BATCH_PAGES}",
    "cmp r9, rcx",
    "jae .Lguest_batch_in_tick",
    "mov ecx, r9d",
    ".Lguest_batch_in_tick:",
    "cmp rbx, rcx",
    "jae .Lguest_batch_in_run",
    "mov ecx, ebx",
    ".Lguest_batch_in_run:",
    "sub r9, rcx",
    "sub rbx, rcx",
    ".Lguest_page:",
    "mov rax, rsi",
    "mov edx, r11d",
    "and edx, 63",
    "lea rdi, [r12 + rdx * 8]",
    "mov [rdi], rax",
    "add rax, r10",
    "mov [rdi + 0x200], rax",
    "add rax, r10",
    "mov [rdi + 0x400], rax",
    "add rax, r10",
    "mov [rdi + 0x600], rax",
    "add rax, r10",
    "mov [rdi + 0x800], rax",
    "add rax, r10",
    "mov [rdi + 0xa00], rax",
    "add rax, r10",
    "mov [rdi + 0xc00], rax",
    "add rax, r10",
    "mov [rdi + 0xe00], rax",
    "inc r13",
    "mov [r15 + {PROGRESS}], r13",
    "add rsi, r8",
    "inc r11",
    "add r12, 0x1000",
    "dec ecx",
    "jnz .Lguest_page",
    "test rbx, rbx",
    "jnz .Lguest_batch_done",
    "call .Lguest_next_run",
    ".Lguest_batch_done:",
    "call .Lguest_beat_if_due",
    "mov rax, [r15 + {CHECK_REQUEST}]",
    "cmp rax, [r15 + {CHECK_DONE}]",
    "je .Lguest_sweep",
    "call .Lguest_check",
    "jmp .Lguest_sweep",
    // Sleep until the tick is over, by the local APIC's timer. A guest that is late continues at once, but
    // does not make up for more than four ticks.
    ".Lguest_idle:",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov rdx, [r15 + {TICK_START}]",
    "add rdx, [r15 + {TICK_TSC}]",
    "cmp rax, rdx",
    "jae .Lguest_late",
    "mov [r15 + {TICK_START}], rdx",
    "mov qword ptr [r15 + {TIMER_FIRED}], 0",
    "mov eax, edx",
    "shr rdx, 32",
    "mov ecx, {MSR_TSC_DEADLINE}",
    "wrmsr",
    ".Lguest_wait:",
    "cli", // or the timer could fire between the test of the flag and the hlt
    "cmp qword ptr [r15 + {TIMER_FIRED}], 0",
    "jne .Lguest_awake",
    "sti",
    "hlt",
    "jmp .Lguest_wait",
    ".Lguest_awake:",
    "sti",
    "jmp .Lguest_tick",
    ".Lguest_late:",
    "mov rcx, rax",
    "sub rcx, rdx",
    "mov rdi, [r15 + {TICK_TSC}]",
    "shl rdi, 2",
    "cmp rcx, rdi",
    "ja .Lguest_too_late",
    "mov [r15 + {TICK_START}], rdx",
    "jmp .Lguest_tick",
    ".Lguest_too_late:",
    "mov [r15 + {TICK_START}], rax",
    "jmp .Lguest_tick",
    // Go to the next run of pages: the second, or the first with a new generation.
    ".Lguest_next_run:",
    "test ebp, ebp",
    "jnz .Lguest_next_pass",
    "mov rbx, [r15 + {SECOND_PAGES}]",
    "test rbx, rbx",
    "jz .Lguest_next_pass",
    "mov ebp, 1",
    "mov r12, [r15 + {SECOND_ADDRESS}]",
    "jmp .Lguest_aim",
    ".Lguest_next_pass:",
    "inc r14",
    ".Lguest_first_run:",
    "xor ebp, ebp",
    "mov rbx, [r15 + {FIRST_PAGES}]",
    "mov r12, [r15 + {FIRST_ADDRESS}]",
    ".Lguest_aim:",
    "mov rsi, r12",
    "shr rsi, 12",
    "lea r11, [rsi + r14]",
    "imul rsi, r8",
    "mov rax, {GENERATION_FACTOR}",
    "imul rax, r14",
    "add rsi, rax",
    "ret",
    // Beat if a tick has passed since the last beat. Changes rax and rdx.
    ".Lguest_beat_if_due:",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "cmp rax, [r15 + {NEXT_BEAT}]",
    "jae .Lguest_beat_now",
    "ret",
    ".Lguest_beat:",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    ".Lguest_beat_now:",
    "add rax, [r15 + {TICK_TSC}]",
    "mov [r15 + {NEXT_BEAT}], rax",
    "mov rax, [r15 + {BEATS}]",
    "inc rax",
    "mov [r15 + {BEATS}], rax",
    "mov edx, {PORT_BEAT}",
    "out dx, eax",
    "ret",
    // Check all pages of this vCPU, and the journal on vCPU 0; rax is the number of the request.
    ".Lguest_check:",
    "push rbx",
    "push rbp",
    "push rsi",
    "push r9",
    "push r11",
    "push r12",
    "push rax",
    "mov qword ptr [r15 + {CHECK_PAGES}], 0",
    "mov qword ptr [r15 + {CHECK_WRONG}], 0",
    "mov qword ptr [r15 + {CHECK_FIRST_WRONG}], -1",
    // The control page itself: the progress in it must be the one in r13.
    "inc qword ptr [r15 + {CHECK_PAGES}]",
    "mov r12, r15",
    "cmp [r15 + {PROGRESS}], r13",
    "je .Lguest_check_begin",
    "call .Lguest_note_wrong",
    ".Lguest_check_begin:",
    // r9: how many pages already have generation r14; the rest have the one before.
    "mov rax, [r15 + {FIRST_PAGES}]",
    "add rax, [r15 + {SECOND_PAGES}]",
    "lea rdx, [r14 - 1]",
    "imul rdx, rax",
    "mov r9, r13",
    "sub r9, rdx",
    "mov r12, [r15 + {FIRST_ADDRESS}]",
    "mov rbp, [r15 + {FIRST_PAGES}]",
    "call .Lguest_check_run",
    "mov r12, [r15 + {SECOND_ADDRESS}]",
    "mov rbp, [r15 + {SECOND_PAGES}]",
    "call .Lguest_check_run",
    "cmp qword ptr [r15 + {INDEX}], 0",
    "jne .Lguest_check_done",
    "call .Lguest_check_journal",
    ".Lguest_check_done:",
    "pop rax",
    "mov [r15 + {CHECK_DONE}], rax",
    "pop r12",
    "pop r11",
    "pop r9",
    "pop rsi",
    "pop rbp",
    "pop rbx",
    "ret",
    // Check rbp pages from r12 on.
    ".Lguest_check_run:",
    "test rbp, rbp",
    "jz .Lguest_check_run_done",
    ".Lguest_check_page:",
    "mov r11, r14",
    "test r9, r9",
    "jnz .Lguest_check_new",
    "dec r11",
    "jmp .Lguest_check_words",
    ".Lguest_check_new:",
    "dec r9",
    ".Lguest_check_words:",
    "mov rax, r12",
    "shr rax, 12",
    "mov rcx, rax",
    "add rcx, r11",
    "and ecx, 63",
    "lea rdi, [r12 + rcx * 8]",
    "xor edx, edx",
    "test r11, r11",
    "jz .Lguest_check_untouched",
    "imul rax, r8",
    "mov rdx, {GENERATION_FACTOR}",
    "imul rdx, r11",
    "add rax, rdx",
    "mov rdx, r10",
    "jmp .Lguest_check_compare",
    ".Lguest_check_untouched:", // generation 0 is all zero
    "xor eax, eax",
    ".Lguest_check_compare:",
    "cmp [rdi], rax",
    "jne .Lguest_check_bad",
    "add rax, rdx",
    "cmp [rdi + 0x200], rax",
    "jne .Lguest_check_bad",
    "add rax, rdx",
    "cmp [rdi + 0x400], rax",
    "jne .Lguest_check_bad",
    "add rax, rdx",
    "cmp [rdi + 0x600], rax",
    "jne .Lguest_check_bad",
    "add rax, rdx",
    "cmp [rdi + 0x800], rax",
    "jne .Lguest_check_bad",
    "add rax, rdx",
    "cmp [rdi + 0xa00], rax",
    "jne .Lguest_check_bad",
    "add rax, rdx",
    "cmp [rdi + 0xc00], rax",
    "jne .Lguest_check_bad",
    "add rax, rdx",
    "cmp [rdi + 0xe00], rax",
    "je .Lguest_check_good",
    ".Lguest_check_bad:",
    "call .Lguest_note_wrong",
    ".Lguest_check_good:",
    "inc qword ptr [r15 + {CHECK_PAGES}]",
    "call .Lguest_beat_if_due",
    "add r12, 0x1000",
    "dec rbp",
    "jnz .Lguest_check_page",
    ".Lguest_check_run_done:",
    "ret",
    // Record the page at r12 as wrong.
    ".Lguest_note_wrong:",
    "inc qword ptr [r15 + {CHECK_WRONG}]",
    "cmp qword ptr [r15 + {CHECK_FIRST_WRONG}], -1",
    "jne .Lguest_noted",
    "mov [r15 + {CHECK_FIRST_WRONG}], r12",
    ".Lguest_noted:",
    "ret",
    // Check the journal, page by page. No beat falls within a page, so the VMM does not write meanwhile.
    ".Lguest_check_journal:",
    "mov r12d, {JOURNAL}",
    "mov ebp, {JOURNAL_PAGES}",
    "xor r11d, r11d", // the position in the journal, in words
    ".Lguest_journal_page:",
    "mov r9, [r15 + {BEATS}]",
    "xor esi, esi",
    ".Lguest_journal_word:",
    "mov rax, r9",
    "sub rax, r11",
    "and eax, {JOURNAL_WORDS} - 1",
    "mov rcx, r9",
    "sub rcx, rax", // the latest beat that wrote this word; none if it is not positive
    "jle .Lguest_journal_unwritten",
    "imul rcx, r8",
    "add rcx, r10",
    "jmp .Lguest_journal_compare",
    ".Lguest_journal_unwritten:",
    "xor ecx, ecx",
    ".Lguest_journal_compare:",
    "cmp [r12 + rsi * 8], rcx",
    "jne .Lguest_journal_bad",
    "inc r11",
    "inc rsi",
    "cmp rsi, 512",
    "jb .Lguest_journal_word",
    "jmp .Lguest_journal_next",
    ".Lguest_journal_bad:",
    "or r11, 511",
    "inc r11",
    "call .Lguest_note_wrong",
    ".Lguest_journal_next:",
    "inc qword ptr [r15 + {CHECK_PAGES}]",
    "call .Lguest_beat_if_due",
    "add r12, 0x1000",
    "dec ebp",
    "jnz .Lguest_journal_page",
    "ret",
    // vCPU 0 sets up the platform: the PIC, its route to the local APIC, the PIT; and prints a greeting.
    ".Lguest_board:",
    "mov ecx, {MSR_X2APIC_LVT_LINT0}",
    "mov eax, 0x700", // ExtINT, not masked
    "xor edx, edx",
    "wrmsr",
    "mov al, 0x11", // both PICs: ICW1, cascade, ICW4 follows
    "out 0x20, al",
    "out 0xa0, al",
    "mov al, {VECTOR_PIT}", // ICW2: vectors
    "out 0x21, al",
    "mov al, {VECTOR_PIT} + 8",
    "out 0xa1, al",
    "mov al, 4", // ICW3: the second PIC is on line 2
    "out 0x21, al",
    "mov al, 2",
    "out 0xa1, al",
    "mov al, 1", // ICW4: 8086 mode
    "out 0x21, al",
    "out 0xa1, al",
    "mov al, 0xfe", // line 0 alone: the PIT
    "out 0x21, al",
    "mov al, 0xff",
    "out 0xa1, al",
    "mov al, 0x34", // PIT channel 0, both bytes, mode 2
    "out 0x43, al",
    "xor eax, eax", // count 65,536: 18.2 Hz
    "out 0x40, al",
    "out 0x40, al",
    "lea rsi, [rip + .Lguest_hello]",
    "mov edx, {PORT_SERIAL}",
    ".Lguest_say:",
    "mov al, [rsi]",
    "test al, al",
    "jz .Lguest_said",
    "out dx, al",
    "inc rsi",
    "jmp .Lguest_say",
    ".Lguest_said:",
    "ret",
    ".Lguest_hello:",
    ".asciz \"sterna guest: up\\r\\n\"",
    // Interrupts.
    ".balign 16",
    ".globl sterna_guest_timer",
    "sterna_guest_timer:",
    "push rax",
    "push rcx",
    "push rdx",
    "mov qword ptr [r15 + {TIMER_FIRED}], 1",
    "inc qword ptr [r15 + {TIMER_INTERRUPTS}]",
    "mov ecx, {MSR_X2APIC_EOI}",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
    ".balign 16",
    ".globl sterna_guest_pit",
    "sterna_guest_pit:",
    "push rax",
    "inc qword ptr [r15 + {PIT_INTERRUPTS}]",
    "mov al, 0x20", // end of interrupt
    "out 0x20, al",
    "pop rax",
    "iretq",
    ".balign 16",
    ".globl sterna_guest_spurious",
    "sterna_guest_spurious:",
    "iretq",
    ".globl sterna_guest_end",
    "sterna_guest_end:",
    ".popsection",
    INDEX = const control::INDEX,
    FIRST_ADDRESS = const control::FIRST_ADDRESS,
    FIRST_PAGES = const control::FIRST_PAGES,
    SECOND_ADDRESS = const control::SECOND_ADDRESS,
    SECOND_PAGES = const control::SECOND_PAGES,
    TICK_TSC = const control::TICK_TSC,
    PAGES_PER_TICK = const control::PAGES_PER_TICK,
    TARGET = const control::TARGET,
    FIRST_GENERATION = const control::FIRST_GENERATION,
    CHECK_REQUEST = const control::CHECK_REQUEST,
    PROGRESS = const control::PROGRESS,
    BEATS = const control::BEATS,
    CHECK_DONE = const control::CHECK_DONE,
    CHECK_PAGES = const control::CHECK_PAGES,
    CHECK_WRONG = const control::CHECK_WRONG,
    CHECK_FIRST_WRONG = const control::CHECK_FIRST_WRONG,
    TIMER_INTERRUPTS = const control::TIMER_INTERRUPTS,
    PIT_INTERRUPTS = const control::PIT_INTERRUPTS,
    TIMER_FIRED = const control::TIMER_FIRED,
    CREDIT = const control::CREDIT,
    TICK_START = const control::TICK_START,
    NEXT_BEAT = const control::NEXT_BEAT,
    PAGE_FACTOR = const pattern::PAGE_FACTOR,
    GENERATION_FACTOR = const pattern::GENERATION_FACTOR,
    WORD_STEP = const pattern::WORD_STEP,
    JOURNAL = const JOURNAL,
    JOURNAL_PAGES = const beat_page::PAGES,
    JOURNAL_WORDS = const beat_page::WORDS,
    BATCH_PAGES = const BATCH_PAGES,
    PORT_BEAT = const PORT_BEAT,
    PORT_SERIAL = const PORT_SERIAL,
    VECTOR_PIT = const VECTOR_PIT,
    VECTOR_TIMER = const VECTOR_TIMER,
    VECTOR_SPURIOUS = const VECTOR_SPURIOUS,
    MSR_TSC_DEADLINE = const MSR_TSC_DEADLINE,
    MSR_X2APIC_EOI = const MSR_X2APIC_EOI,
    MSR_X2APIC_SPURIOUS = const MSR_X2APIC_SPURIOUS,
    MSR_X2APIC_LVT_TIMER = const MSR_X2APIC_LVT_TIMER,
    MSR_X2APIC_LVT_LINT0 = const MSR_X2APIC_LVT_LINT0,
);

// The journal's word for a beat is computed with the sweep's registers, and a position in it by masking.
const _: () = assert!(beat_page::WORDS.is_power_of_two() && pattern::PAGE_WORDS == 512);
const _: () = assert!(pattern::BLOCK_BYTES == 0x200 && pattern::BLOCK_WORDS == 64);

unsafe extern "C" {
    static sterna_guest_start: u8;
    static sterna_guest_timer: u8;
    static sterna_guest_pit: u8;
    static sterna_guest_spurious: u8;
    static sterna_guest_end: u8;
}

/// The guest's code. It begins with its entry point.
pub(crate) fn code() -> &'static [u8] {
    let len_bytes = offset(&raw const sterna_guest_end);
    // SAFETY: the assembly above places start and end in this order in one read-only section of the program,
    // so all bytes between them are initialised and never change.
    unsafe { slice::from_raw_parts(&raw const sterna_guest_start, len_bytes) }
}

/// The interrupt handlers: vector, and offset in the code.
pub(crate) fn handlers() -> [(u8, u64); 4] {
    [
        (VECTOR_TIMER, offset(&raw const sterna_guest_timer) as u64),
        (VECTOR_PIT, offset(&raw const sterna_guest_pit) as u64),
        (VECTOR_PIC_SPURIOUS, offset(&raw const sterna_guest_spurious) as u64),
        (VECTOR_SPURIOUS, offset(&raw const sterna_guest_spurious) as u64),
    ]
}

fn offset(symbol: *const u8) -> usize {
    symbol.addr() - (&raw const sterna_guest_start).addr()
}
