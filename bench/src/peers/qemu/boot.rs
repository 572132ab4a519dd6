//! The guest that QEMU runs: a boot sector, assembled by hand.
//!
//! It touches all of its RAM from 1 MiB on once, so that no page is zero or equal to another. Then it either
//! halts for ever, or adds one to a byte of each page of a part of its RAM, over and over, as fast as it can.
//! It reports its progress in two words of its RAM, which QEMU keeps in a file.

/// The address where the sector writes [`TOUCHED`] when it has touched its RAM.
pub(super) const PHASE: u32 = 0x7e00;

/// All of RAM is touched. The value is unlikely to appear by accident.
pub(super) const TOUCHED: u32 = 0x6e72_7473;

/// The address of the sector's count of passes over the part that it writes.
pub(super) const PASSES: u32 = 0x7e04;

/// The first page that is touched: the memory below belongs to the BIOS and to the sector itself.
const TOUCH_FROM: u32 = 1 << 20;

/// The beginning of the part that is written over and over.
const LOOP_FROM: u32 = 16 << 20;

const PAGE: u32 = 4096;

/// The end of the part that is written over and over.
pub(super) fn loop_end(bytes: u32) -> u32 {
    LOOP_FROM + bytes
}

/// The address at which a BIOS loads the sector, and the selectors of its two segments.
const LOADED_AT: u32 = 0x7c00;
const CODE: u16 = 0x08;
const DATA: u16 = 0x10;

/// The offsets of the tables in the sector.
const GDT: usize = 0x100;
const GDTR: usize = GDT + 24;

/// The sector for a guest with RAM up to `ram_end`. The guest then writes `loop_bytes` over and over;
/// with `None` it halts.
pub(super) fn sector(ram_end: u32, loop_bytes: Option<u32>) -> [u8; 512] {
    let mut code = Vec::new();

    // 16 bits: segment 0 for data, load the descriptors, enter protected mode, and jump to the 32-bit
    // segment.
    code.extend([0xfa]); //                             cli
    code.extend([0x31, 0xc0]); //                       xor ax, ax
    code.extend([0x8e, 0xd8]); //                       mov ds, ax
    code.extend([0x0f, 0x01, 0x16]); //                 lgdt [GDTR]
    code.extend(address16(GDTR));
    code.extend([0x0f, 0x20, 0xc0]); //                 mov eax, cr0
    code.extend([0x0c, 0x01]); //                       or al, 1            ; protection enabled
    code.extend([0x0f, 0x22, 0xc0]); //                 mov cr0, eax
    code.extend([0xea]); //                             jmp CODE:wide
    code.extend(address16(code.len() + 4)); //          (`wide` is what follows the jump)
    code.extend(CODE.to_le_bytes());

    // wide: 32 bits from this address on.
    code.extend([0x66, 0xb8]); //                       mov ax, DATA
    code.extend(DATA.to_le_bytes());
    code.extend([0x8e, 0xd8]); //                       mov ds, ax
    code.extend([0xe4, 0x92]); //                       in al, 0x92
    code.extend([0x0c, 0x02]); //                       or al, 2            ; enable A20
    code.extend([0xe6, 0x92]); //                       out 0x92, al

    // The address of each page into its first four bytes.
    code.extend([0xbf]); //                             mov edi, TOUCH_FROM
    code.extend(TOUCH_FROM.to_le_bytes());
    let touch = code.len();
    code.extend([0x89, 0x3f]); //                touch: mov [edi], edi
    next_page(&mut code, ram_end, touch);
    code.extend([0xc7, 0x05]); //                       mov dword [PHASE], TOUCHED
    code.extend(PHASE.to_le_bytes());
    code.extend(TOUCHED.to_le_bytes());

    match loop_bytes {
        None => {
            let halt = code.len();
            code.extend([0xf4]); //               halt: hlt
            jump_back(&mut code, 0xeb, halt); //        jmp halt
        }
        Some(bytes) => {
            let pass = code.len();
            code.extend([0xbf]); //               pass: mov edi, LOOP_FROM
            code.extend(LOOP_FROM.to_le_bytes());
            let page = code.len();
            code.extend([0xfe, 0x07]); //         page: inc byte [edi]
            next_page(&mut code, LOOP_FROM + bytes, page);
            code.extend([0xff, 0x05]); //               inc dword [PASSES]
            code.extend(PASSES.to_le_bytes());
            jump_back(&mut code, 0xeb, pass); //        jmp pass
        }
    }

    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(&code);
    // Descriptors: the null one; code and data of 32 bits, from 0 to 4 GiB (Intel SDM, volume 3, 3.4.5).
    sector[GDT + 8..GDT + 16].copy_from_slice(&[0xff, 0xff, 0, 0, 0, 0x9a, 0xcf, 0]);
    sector[GDT + 16..GDT + 24].copy_from_slice(&[0xff, 0xff, 0, 0, 0, 0x92, 0xcf, 0]);
    // The operand of `lgdt`: the length less one, and the address.
    sector[GDTR..GDTR + 2].copy_from_slice(&[23, 0]);
    sector[GDTR + 2..GDTR + 4].copy_from_slice(&address16(GDT));
    // The mark of a boot sector.
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// add edi, PAGE; cmp edi, end; jb back
fn next_page(code: &mut Vec<u8>, end: u32, back: usize) {
    code.extend([0x81, 0xc7]);
    code.extend(PAGE.to_le_bytes());
    code.extend([0x81, 0xff]);
    code.extend(end.to_le_bytes());
    jump_back(code, 0x72, back);
}

/// A short jump: its distance counts from the instruction that follows.
fn jump_back(code: &mut Vec<u8>, opcode: u8, back: usize) {
    let distance = code.len() + 2 - back;
    code.extend([
        opcode,
        u8::try_from(256 - distance).expect("the sector is shorter than a short jump reaches"),
    ]);
}

/// The address of a byte of the sector.
fn address16(offset: usize) -> [u8; 2] {
    let address = LOADED_AT as usize + offset;
    u16::try_from(address).expect("the sector lies below 64 KiB").to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bios_takes_it_for_a_boot_sector_and_its_parts_do_not_overlap() {
        for loop_bytes in [None, Some(100 << 20)] {
            let sector = sector(1 << 30, loop_bytes);
            assert_eq!(sector[510..], [0x55, 0xaa]);
            assert_eq!(sector[0], 0xfa);
            let code_ends = sector[..GDT].iter().rposition(|&byte| byte != 0).unwrap();
            assert!(code_ends < GDT - 16, "the code ends at {code_ends:#x}");
            assert_eq!(sector[GDT..GDT + 8], [0; 8], "the null descriptor");
        }
    }

    /// Each jump must land on the instruction that it is meant for.
    #[test]
    fn jumps_land_where_they_should() {
        let sector = sector(1 << 30, Some(100 << 20));
        let far = sector.iter().position(|&byte| byte == 0xea).unwrap();
        let target = u16::from_le_bytes([sector[far + 1], sector[far + 2]]);
        assert_eq!(usize::from(target) - 0x7c00, far + 5);
        assert_eq!(sector[far + 5..far + 7], [0x66, 0xb8]);
        let lands = |at: usize| at + 2 - (256 - usize::from(sector[at + 1]));
        let short: Vec<usize> = (0..GDT).filter(|&at| sector[at] == 0x72 && sector[at + 1] > 0x80).collect();
        assert_eq!(short.len(), 2);
        assert_eq!(sector[lands(short[0])..][..2], [0x89, 0x3f], "touch");
        assert_eq!(sector[lands(short[1])..][..2], [0xfe, 0x07], "page");
        let last = sector[..GDT].iter().rposition(|&byte| byte == 0xeb).unwrap();
        assert_eq!(sector[lands(last)..][..5], [0xbf, 0, 0, 0, 1], "pass: mov edi, 16 MiB");
    }

    #[test]
    fn the_ends_are_where_they_were_asked_for() {
        let sector = sector(0x3000_0000, Some(0x0640_0000));
        let has = |end: u32| sector.windows(4).any(|window| window == end.to_le_bytes());
        assert!(has(0x3000_0000) && has((16 << 20) + 0x0640_0000));
    }
}
