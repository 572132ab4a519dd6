# QEMU in several versions side by side, unpacked in the cache and never installed.
# Sourced by ci/qemu and vm.sh after packages.sh.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables shared with the files that source this

# To be raised when a prepared QEMU has to be prepared anew.
qemu_recipe=1

# qemu_versions: which versions this distribution has, oldest first.
qemu_versions() {
    case $(qemu_distribution) in
        debian-bookworm | debian-trixie) echo 7.2 10 ;;
        ubuntu-noble) echo 8.2 ;;
    esac
}

# qemu_packages VERSION: the arguments of unpack_release for this version.
qemu_packages() {
    case $(qemu_distribution)-$1 in
        debian-*-7.2) echo qemu-system-x86 qemu-utils -- bookworm bookworm-security ;;
        debian-bookworm-10)
            echo --target-release bookworm-backports qemu-system-x86 qemu-utils \
                -- bookworm bookworm-security bookworm-backports
            ;;
        debian-trixie-10) echo qemu-system-x86 qemu-utils -- trixie trixie-security ;;
        ubuntu-noble-8.2) echo qemu-system-x86 qemu-utils -- noble noble-updates noble-security ;;
    esac
}

qemu_distribution() { echo "$(os_release ID)-$(os_release VERSION_CODENAME)"; }

# prepare_qemu VERSION: sets `entry` to the folder with this QEMU's programs.
prepare_qemu() {
    local version=$1
    command -v apt-get >/dev/null || die "QEMU for tests comes from packages of Debian or Ubuntu, and this machine has no apt-get"
    [[ $(uname -m) == x86_64 ]] || die "QEMU for tests is prepared on x86-64 machines only"
    [[ " $(qemu_versions) " == *" $version "* ]] || die "no QEMU $version for $(os_release PRETTY_NAME)." \
        "Debian 12 and 13 have 7.2 and 10, Ubuntu 24.04 has 8.2; ci/qemu alone prepares what this machine can have"
    qemu_version=$version
    cached "qemu-$version" build_qemu "$qemu_recipe"
}

build_qemu() {
    local work=$1 root=$1/root tree=$1/entry program packages folder
    read -ra packages <<<"$(qemu_packages "$qemu_version")"
    say "downloading QEMU $qemu_version"
    unpack_release "$root" "${packages[@]}"
    for folder in usr/bin usr/lib usr/share/qemu usr/share/seabios lib; do
        [[ ! -e $root/$folder ]] || { mkdir -p "$(dirname "$tree/root/$folder")" && mv "$root/$folder" "$tree/root/$folder"; }
    done
    for program in qemu-system-x86_64 qemu-img qemu-io; do
        install -m 755 "$parts/qemu-wrapper.sh" "$tree/$program"
        "$tree/$program" --version | head -n 1 >&2 || die "$program $qemu_version was unpacked and does not start"
    done
}
