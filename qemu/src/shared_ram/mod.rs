//! The files behind a guest's RAM, opened by this process too.
//!
//! Each file is found by way of the address at which QEMU has the block: the memory map of the process says
//! which file is mapped there, and one of its descriptors leads to that very file. Neither names nor sizes
//! decide.

mod address;
mod error;
mod fresh;
mod maps;
mod process;

use std::fs::File;
use std::os::unix::fs::MetadataExt;

pub use self::error::SharedRamError;
use crate::monitor::{MemoryBackend, Monitor, RamBlock};
use crate::names::SharedBlock;
use maps::{Mapping, mapping_of};
use process::Process;

/// `statfs(2)` calls the file system of huge pages so.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// The size of an ordinary page.
const PAGE_BYTES: u64 = 4096;

/// A block of RAM with the file behind it.
#[derive(Debug)]
pub struct SharedRam {
    /// The block.
    pub block: SharedBlock,
    /// The file, open for reading and writing.
    pub file: File,
    /// Where the block begins in the file.
    pub offset_bytes: u64,
    /// The size of the file's pages: more than 4096 if they are huge.
    pub page_bytes: u64,
    /// QEMU allocated all pages at the start.
    pub prealloc: bool,
}

/// Finds and opens the files behind all memory backends that the guest uses.
///
/// # Errors
///
/// Memory that is not shared, or a file that this process may not open or cannot identify.
pub fn shared_ram(monitor: &Monitor) -> Result<Vec<SharedRam>, SharedRamError> {
    let backends = monitor.memory_backends()?;
    let mut blocks = monitor.ram_blocks()?;
    let used: Vec<_> = backends
        .iter()
        .filter_map(|backend| Some((backend, blocks.iter().position(|block| is_of(block, backend))?)))
        .collect();
    if used.is_empty() {
        return Err(SharedRamError::NoBackend);
    }
    if let Some((backend, block)) = used.iter().find(|(backend, _)| !backend.share) {
        let (name, bytes) = (blocks[*block].name.clone(), backend.size);
        return Err(SharedRamError::NotShared { name, bytes });
    }
    let process = Process::open(monitor.client().peer()?.process)?;
    process.check_is_qemu()?;
    let of_backends = used.iter().map(|&(_, block)| block);
    address::find_missing(monitor, &mut blocks, of_backends)?;
    let mappings = process.mappings()?;
    let find = |&(backend, block): &(_, usize)| find(&process, &mappings, backend, &blocks[block]);
    let found = used.iter().map(find).collect::<Result<Vec<_>, _>>()?;
    // The addresses were those of this process, not of a successor.
    monitor.version()?;
    Ok(found)
}

fn is_of(block: &RamBlock, backend: &MemoryBackend) -> bool {
    let Some(id) = &backend.id else { return false };
    // Machine types before 4.1 use the path.
    block.name == *id || block.name.strip_prefix("/objects/") == Some(id)
}

fn find(
    process: &Process,
    mappings: &[Mapping],
    backend: &MemoryBackend,
    block: &RamBlock,
) -> Result<SharedRam, SharedRamError> {
    let name = || block.name.clone();
    if block.used_bytes != backend.size || block.used_bytes == 0 {
        return Err(SharedRamError::Size { name: name(), block: block.used_bytes, backend: backend.size });
    }
    let address = block.host_address.ok_or_else(|| SharedRamError::NoAddress { name: name() })?;
    let no_file = || SharedRamError::NoFile { name: name(), bytes: backend.size };
    let mapping = mapping_of(mappings, address, block.used_bytes).ok_or_else(no_file)?;
    if !mapping.writable || !mapping.shared {
        return Err(SharedRamError::Mapping { name: name() });
    }
    let file = process.open_file(mapping.file, &block.name)?.ok_or_else(no_file)?;
    let failed = |error| SharedRamError::Io { name: name(), error };
    let file_bytes = file.metadata().map_err(failed)?.size();
    if mapping.offset.checked_add(block.used_bytes).is_none_or(|end| end > file_bytes) {
        return Err(SharedRamError::Short { name: name(), file: file_bytes, block: block.used_bytes });
    }
    let page_bytes = page_bytes(&file).map_err(|error| failed(error.into()))?;
    let block = SharedBlock { name: name(), len_bytes: block.used_bytes };
    Ok(SharedRam { block, file, offset_bytes: mapping.offset, page_bytes, prealloc: backend.prealloc })
}

fn page_bytes(file: &File) -> rustix::io::Result<u64> {
    let system = rustix::fs::fstatfs(file)?;
    let huge = (system.f_type == HUGETLBFS_MAGIC).then(|| u64::try_from(system.f_bsize).ok());
    Ok(huge.flatten().unwrap_or(PAGE_BYTES))
}
