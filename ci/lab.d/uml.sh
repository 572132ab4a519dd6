# User-mode Linux with soft-RoCE built in: common.sh lists what this file has to define.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables shared with common.sh

uml_mappings=4000000

prepare() {
    local package version config
    need_packages iproute2 libibverbs1 ibverbs-providers
    package=$(uml_source_package) || { apt_update && package=$(uml_source_package); } ||
        die "apt knows no package linux-source-6.12 and no other linux-source"
    version=$(candidate_version "$package")
    config=$(grep '^CONFIG_' "$parts/uml.config" | LC_ALL=C sort | sha256sum)
    cached "uml-$version-${config::12}" uml_build

    # UML maps its processes' memory page by page, and dies when the host refuses the next mapping.
    if (($(</proc/sys/vm/max_map_count) < uml_mappings)); then
        if ((EUID == 0)); then
            say "raising this machine's limit of mappings per process: sysctl -w vm.max_map_count=$uml_mappings"
            sysctl -q -w "vm.max_map_count=$uml_mappings" || say "not permitted; a large guest may end the lab"
        else
            say "a large guest may end the lab; to prevent it: sudo sysctl -w vm.max_map_count=$uml_mappings"
        fi
    fi
}

# 6.12 is the kernel that the lab was tested with; a distribution without it has another one under the same
# name.
uml_source_package() {
    newest_known_package linux-source-6.12 ||
        apt-cache pkgnames linux-source- | grep -E '^linux-source-[0-9][0-9.]*$' | sort -Vr | head -n 1 | grep .
}

uml_build() {
    local work=$1 package log=$1/log tarball option make
    package=$(uml_source_package)
    need_packages gcc make flex bison bc libc6-dev libelf-dev libssl-dev xz-utils bzip2
    say "downloading $package"
    unpack_packages "$work/package" "$package"
    tarball=$(find "$work/package/usr/src" -name 'linux-source-*.tar.*' -type f)
    mkdir "$work/source" "$work/build"
    tar -xf "$tarball" --strip-components=1 -C "$work/source"

    say "building the kernel, which takes about 6 minutes on 2 CPUs"
    make=(make -C "$work/source" ARCH=um "O=$work/build")
    grep '^CONFIG_' "$parts/uml.config" >"$work/wanted"
    logged "$log" "${make[@]}" tinyconfig
    logged "$log" "$work/source/scripts/kconfig/merge_config.sh" -m -O "$work/build" "$work/build/.config" "$work/wanted"
    logged "$log" "${make[@]}" olddefconfig
    for option in HOSTFS OVERLAY_FS RDMA_RXE SSL VETH; do
        grep -qx "CONFIG_$option=y" "$work/build/.config" || die "$package cannot have CONFIG_$option with uml.config"
    done
    logged "$log" "${make[@]}" -j "$(nproc)" linux
    strip -o "$work/entry/linux" "$work/build/linux"
    cp "$work/build/.config" "$work/entry/config"
}

lab_command() {
    install -m 755 "$parts/uml-init.sh" "$run/init"
    command=(
        env "TMPDIR=$(uml_memory_folder)" "$entry/linux" "mem=$memory" "uml_dir=$run/uml"
        root=/dev/root rootfstype=hostfs ro "init=$run/init" quiet
        con=null "con0=null,fd:1" ssl=null "ssl0=null,fd:3" "ssl1=null,fd:4"
    )
}

# UML keeps its memory in an unlinked file and runs code out of it: /dev/shm where that is large enough (a
# container's often is not) and allows it, else on disk.
uml_memory_folder() {
    local free_bytes
    free_bytes=$(df --output=avail --block-size=1 /dev/shm 2>/dev/null | tail -n 1)
    if ((${free_bytes:-0} > $(numfmt --from=iec "${memory^^}"))) && ! findmnt -n -o OPTIONS /dev/shm | grep -qw noexec; then
        echo /dev/shm
    else
        echo "${TMPDIR:-/tmp}"
    fi
}
