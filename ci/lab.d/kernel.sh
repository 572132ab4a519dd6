# A distribution's kernel, unpacked for a machine in QEMU.
# Sourced by vm.sh and ci/guest after packages.sh.
# shellcheck shell=bash

# unpack_kernel DIR PACKAGE: downloads the kernel on which PACKAGE depends, with its modules: DIR/vmlinuz and
# DIR/lib/modules/VERSION, with modules.dep.
unpack_kernel() {
    local tree=$1 package=$2 packages version
    # Ubuntu has the kernel's modules in further packages.
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
}

# copy_modules TREE VERSION TO MODULE…: copies modules and those that they need, unpacked and numbered in the
# order of loading: busybox loads them one after the other.
copy_modules() {
    local tree=$1 version=$2 to=$3 module file number=100
    shift 3
    for module; do
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
