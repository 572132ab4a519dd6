#!/usr/bin/env bash
# The command line of a guest, the same on both hosts. With an argument it starts the guest of that name. Without, it
# is the command of `sterna receive --start`: it starts a QEMU that waits for the guest that comes.
set -euo pipefail

name=${1:-${STERNA_GUEST_NAME:?a name, as an argument or from sterna}}
folder=${GUEST_FOLDER:?where the sockets of the guest are to be on this host}
disk=${GUEST_DISK:?the disk image of the guest, which both hosts see}
machine=${STERNA_GUEST_MACHINE:-pc-q35-10.0}
bytes=${STERNA_GUEST_MEMORY_BYTES:-134217728}

waits=()
if (($# == 0)); then waits=(-incoming defer -S); fi

# -daemonize: the script goes on when QEMU has made its sockets.
"${QEMU:-qemu-system-x86_64}" -name "$name" -nodefaults -display none -daemonize \
    -machine "$machine,memory-backend=ram0" -accel "${STERNA_GUEST_ACCELERATOR:-tcg}" \
    -smp "${STERNA_GUEST_VCPUS:-1}" -m "${bytes}B" \
    -object "memory-backend-memfd,id=ram0,size=$bytes,share=on" \
    -blockdev "driver=raw,node-name=disk0,read-only=on,file.driver=file,file.filename=$disk" \
    -device virtio-blk-pci,id=blk0,bus=pcie.0,addr=3,drive=disk0 \
    -chardev "file,id=log0,path=$folder/$name.log,append=on" -serial chardev:log0 \
    -pidfile "$folder/$name.pid" -qmp "unix:$folder/$name.qmp,server=on,wait=off" "${waits[@]}" >&2

echo "$folder/$name.qmp"
