# A distribution's own kernel in QEMU, with /dev/kvm: common.sh lists what this file has to define.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables shared with common.sh

# The modules for mounting the root file system, from which no module can be loaded before. Some kernels have
# parts of them built in.
vm_modules=(virtio_pci virtio_console 9pnet_virtio 9p overlay)

prepare() {
    local package version recipe
    [[ $(uname -m) == x86_64 ]] || die "the VM lab is for x86-64 machines"
    need_packages qemu-system-x86 kmod iproute2 libibverbs1 ibverbs-providers
    package=$(vm_kernel_package) || { apt_update && package=$(vm_kernel_package); } ||
        die "apt knows no kernel package: linux-image-amd64 or linux-image-generic"
    version=$(candidate_version "$package")
    recipe=$({ echo "$package ${vm_modules[*]}" && cat "$parts/vm-init.sh"; } | sha256sum)
    cached "vm-$version-${recipe::12}" vm_build
}

# Debian's `cloud` kernels have no InfiniBand; 6.12 is the kernel that the lab was tested with.
vm_kernel_package() {
    newest_known_package linux-image-6.12-amd64 || known_package linux-image-amd64 linux-image-generic
}

vm_build() {
    local work=$1 root=$1/initramfs tree=$1/entry package packages version
    need_packages busybox-static cpio gzip xz-utils zstd
    package=$(vm_kernel_package)
    # The package depends on the current kernel; Ubuntu has the kernel's modules in further packages.
    mapfile -t packages < <(
        apt-cache depends --recurse --important "$package" | grep -xE 'linux-(image|modules|modules-extra)-[0-9]\S+' |
            sort -u
    )
    say "downloading the kernel: ${packages[*]}"
    unpack_packages "$tree" "${packages[@]}"
    rm -rf "${tree:?}/usr/share"
    # Some releases pack /lib/modules and some /usr/lib/modules, and kmod reads one or the other.
    mkdir -p "$tree/usr"
    if [[ -d $tree/lib ]]; then ln -sT ../lib "$tree/usr/lib"; else ln -sT usr/lib "$tree/lib"; fi
    version=$(basename "$tree"/lib/modules/*)
    mv "$tree/boot/vmlinuz-$version" "$tree/vmlinuz"
    PATH=$PATH:/usr/sbin:/sbin depmod -b "$tree" "$version"

    say "packing the initramfs"
    mkdir -p "$root"/{bin,lower,layer,modules,proc,root}
    cp "$(command -v busybox)" "$root/bin/busybox"
    install -m 755 "$parts/vm-init.sh" "$root/init"
    vm_copy_modules "$tree" "$version" "$root/modules"
    (cd "$root" && find . | cpio --quiet -o -H newc | gzip) >"$tree/initramfs"
}

# Unpacked and numbered in the order of loading: busybox loads them one after the other.
vm_copy_modules() {
    local tree=$1 version=$2 to=$3 module file number=100
    for module in "${vm_modules[@]}"; do
        PATH=$PATH:/usr/sbin:/sbin modprobe -d "$tree" -S "$version" --show-depends "$module" |
            awk '$1 == "insmod" { print $2 }'
    done | awk '!seen[$0]++' | while read -r file; do
        number=$((number + 1))
        module=$(basename "$file")
        case $file in
            *.xz) xz -dc "$file" ;;
            *.zst) zstd -qdc "$file" ;;
            *.gz) gzip -dc "$file" ;;
            *) cat "$file" ;;
        esac >"$to/$number-${module%%.*}.ko"
    done
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
        qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none
        -machine q35 "${accelerator[@]}" -smp 2 -m "$memory"
        -kernel "$entry/vmlinuz" -initrd "$entry/initramfs"
        -append "console=ttyS0 quiet panic=-1 mitigations=off"
        -serial stdio
        -device virtio-rng-pci
        -device virtio-serial-pci
        -chardev "file,id=stdout,path=/dev/fd/3" -device "virtserialport,name=stdout,chardev=stdout"
        -chardev "file,id=stderr,path=/dev/fd/4" -device "virtserialport,name=stderr,chardev=stderr"
    )
    vm_share root / readonly=on
    vm_share kernel "$entry" readonly=on
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
