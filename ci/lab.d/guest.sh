# Guests for tests of QEMU, built from tests/guests.
# Sourced by ci/guest after packages.sh.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables shared with cache.sh

# shellcheck source-path=SCRIPTDIR source=kernel.sh
. "$parts/kernel.sh"

guest_sources=$checkout/tests/guests
guest_kernel= # the cache's folder with the kernel

# What the load needs and a distribution's kernel may have as a module.
guest_modules=(virtio_pci virtio_blk virtio_net ext4)
# Drivers of the other devices that tests add, where the kernel has them: a device at work has more state to migrate.
guest_more_modules=(virtio_balloon virtio-rng virtio_console virtio_scsi sd_mod xhci_pci usbhid bochs)

# Sets `entry` to the folder with the file `image`.
prepare_boot_sector() {
    cached "guest-boot-sector-$(recipe_of "$guest_sources/boot-sector.S")" build_boot_sector
}

build_boot_sector() {
    need_packages gcc
    gcc -m32 -c -o "$1/boot-sector.o" "$guest_sources/boot-sector.S"
    ld -m elf_i386 --oformat binary -Ttext 0x7c00 -e _start -o "$1/entry/image" "$1/boot-sector.o"
}

# Sets `entry` to the folder with the files `vmlinuz` and `initramfs`.
prepare_linux_guest() {
    local recipe
    cached guest-kernel build_guest_kernel 1
    guest_kernel=$entry
    recipe=$(recipe_of "$guest_sources"/linux/* "$parts/guest.sh" "$guest_kernel/version")
    cached "guest-linux-$recipe" build_linux_guest
}

build_guest_kernel() {
    local package
    need_packages kmod
    # The smallest of Debian, made for virtual machines; Ubuntu's.
    package=$(newest_known_package linux-image-cloud-amd64 || known_package linux-image-virtual) ||
        { apt_update && package=$(known_package linux-image-cloud-amd64 linux-image-virtual); } ||
        die "apt knows no kernel package: linux-image-cloud-amd64 or linux-image-virtual"
    unpack_kernel "$1/entry" "$package"
    basename "$1/entry/lib/modules"/* >"$1/entry/version"
}

build_linux_guest() {
    local root=$1/initramfs version module modules=("${guest_modules[@]}")
    need_packages gcc libc6-dev busybox-static cpio gzip kmod xz-utils zstd
    mkdir -p "$root"/{bin,data,dev,modules,proc,sys}
    gcc -std=gnu17 -Wall -Wextra -O2 -static -pthread -o "$root/bin/load" "$guest_sources"/linux/*.c
    cp "$(command -v busybox)" "$root/bin/busybox"
    install -m 755 "$guest_sources/linux/init.sh" "$root/init"
    version=$(<"$guest_kernel/version")
    for module in "${guest_more_modules[@]}"; do
        ! PATH=$PATH:/usr/sbin:/sbin modinfo -b "$guest_kernel" -k "$version" "$module" &>/dev/null || modules+=("$module")
    done
    copy_modules "$guest_kernel" "$version" "$root/modules" "${modules[@]}"
    (cd "$root" && find . | cpio --quiet -o -H newc | gzip) >"$1/entry/initramfs"
    ln "$guest_kernel/vmlinuz" "$1/entry/vmlinuz"
}
