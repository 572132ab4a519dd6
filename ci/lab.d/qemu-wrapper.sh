#!/bin/sh
# Starts the program of its own name with the libraries, modules and firmware in the folder `root` beside it.
self=$(readlink -f "$0")
root=${self%/*}/root
libraries=$root/usr/lib/x86_64-linux-gnu
export LD_LIBRARY_PATH="$libraries:$root/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export QEMU_MODULE_DIR="$libraries/qemu"
case ${self##*/} in
    qemu-system-*) set -- -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L "$root/usr/lib/ipxe/qemu" "$@" ;;
esac
exec "$root/usr/bin/${self##*/}" "$@"
