# A distribution's own kernel in QEMU, with /dev/kvm: common.sh lists what this file has to define.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables shared with common.sh

# shellcheck source-path=SCRIPTDIR source=kernel.sh
. "$parts/kernel.sh"
# shellcheck source-path=SCRIPTDIR source=qemu.sh
. "$parts/qemu.sh"

# The modules for mounting the root file system, from which no module can be loaded before. Some kernels have
# parts of them built in.
vm_modules=(virtio_pci virtio_console 9pnet_virtio 9p overlay)
vm_kernel= # the cache's folder with the kernel
vm_qemu=   # the program that runs it

prepare() {
    local package version recipe
    [[ $(uname -m) == x86_64 ]] || die "the VM lab is for x86-64 machines"
    need_packages kmod iproute2 libibverbs1 ibverbs-providers
    package=$(vm_kernel_package) || { apt_update && package=$(vm_kernel_package); } ||
        die "apt knows no kernel package: linux-image-amd64 or linux-image-generic"
    version=$(candidate_version "$package")
    recipe=$({ echo "$package ${vm_modules[*]}" && cat "$parts/vm-init.sh"; } | sha256sum)
    cached "vm-$version-${recipe::12}" vm_build
    vm_kernel=$entry
    find_vm_qemu
}

# The newest that can be unpacked, or on other distributions the installed one.
find_vm_qemu() {
    local versions
    read -ra versions <<<"$(qemu_versions)"
    if ((${#versions[@]})); then
        prepare_qemu "${versions[-1]}"
        vm_qemu=$entry/qemu-system-x86_64
    else
        vm_qemu=$(command -v qemu-system-x86_64) ||
            die "the VM lab has no QEMU for $(os_release PRETTY_NAME): install qemu-system-x86"
    fi
}

# Debian's `cloud` kernels have no InfiniBand; 6.12 is the kernel that the lab was tested with.
vm_kernel_package() {
    newest_known_package linux-image-6.12-amd64 || known_package linux-image-amd64 linux-image-generic
}

vm_build() {
    local root=$1/initramfs tree=$1/entry package version
    need_packages busybox-static cpio gzip xz-utils zstd
    package=$(vm_kernel_package)
    unpack_kernel "$tree" "$package"
    version=$(basename "$tree"/lib/modules/*)

    say "packing the initramfs"
    mkdir -p "$root"/{bin,lower,layer,modules,proc,root}
    cp "$(command -v busybox)" "$root/bin/busybox"
    install -m 755 "$parts/vm-init.sh" "$root/init"
    copy_modules "$tree" "$version" "$root/modules" "${vm_modules[@]}"
    (cd "$root" && find . | cpio --quiet -o -H newc | gzip) >"$tree/initramfs"
}

lab_command() {
    # In one thread: with a thread for each CPU, a kernel that patches its own code on one CPU was seen to fail on
    # the other.
    local i accelerator=(-accel "tcg,thread=single" -cpu max)
    if vm_has_nested_kvm; then
        accelerator=(-accel kvm -cpu host)
    else
        say "no nested hardware KVM here: the machine is emulated, which makes it slow"
    fi
    command=(
        "$vm_qemu" -nodefaults -no-user-config -no-reboot -display none
        -machine q35 "${accelerator[@]}" -smp 2 -m "$memory"
        -kernel "$vm_kernel/vmlinuz" -initrd "$vm_kernel/initramfs"
        -append "console=ttyS0 quiet panic=-1 mitigations=off"
        -serial stdio
        -device virtio-rng-pci
        -device virtio-serial-pci
        -chardev "file,id=stdout,path=/dev/fd/3" -device "virtserialport,name=stdout,chardev=stdout"
        -chardev "file,id=stderr,path=/dev/fd/4" -device "virtserialport,name=stderr,chardev=stderr"
    )
    vm_share root / readonly=on
    vm_share kernel "$vm_kernel" readonly=on
    vm_share lab "$run" readonly=off
    for i in "${!writable[@]}"; do
        vm_share "writable$i" "${writable[i]}" readonly=off
    done
}

# vm_share TAG FOLDER ACCESS: 9p over virtio. QEMU wants a comma doubled; `remap` keeps inode numbers of
# several file systems apart.
vm_share() {
    command+=(-virtfs "local,mount_tag=$1,path=${2//,/,,},$3,security_model=none,multidevs=remap")
}

# Whether the host has hardware KVM that can give the guest a KVM of its own.
vm_has_nested_kvm() {
    [[ -w /dev/kvm ]] && grep -qwE 'svm|vmx' /proc/cpuinfo &&
        grep -qsE 'Y|1' /sys/module/kvm_{amd,intel}/parameters/nested
}
