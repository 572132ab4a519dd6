#!/bin/bash
# Process 1 of either lab, once its root file system is mounted: brings up the network and the soft-RoCE
# device, runs the job and switches the lab off. Files to and from the host are in /run/lab/host.
# shellcheck disable=SC2154 # checkout, directory and writable come from the job file
set -uo pipefail

main() {
    mount_system
    open_output
    mount_writable
    [[ $STERNA_LAB_KIND != vm ]] || load_modules
    make_network
    soft_roce_up || fail "no soft-RoCE device: the command that makes it failed"
    wait_for_device
    raise_limits
    [[ $STERNA_LAB_KIND != vm || -c /dev/kvm ]] || fail "no /dev/kvm in the lab: see the host's nested KVM"
    run_job "$@"
}

mount_system() {
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    mkdir -p /dev/pts /dev/shm
    mount -t devpts -o ptmxmode=666 devpts /dev/pts
    mount -t tmpfs tmpfs /dev/shm
    [[ ! ${XDG_RUNTIME_DIR:-} ]] || install -d -m 700 "$XDG_RUNTIME_DIR"
    ln -sfn /proc/self/fd /dev/fd
    ln -sfn /proc/self/fd/0 /dev/stdin
    ln -sfn /proc/self/fd/1 /dev/stdout
    ln -sfn /proc/self/fd/2 /dev/stderr
}

# The command writes into pipes and not to the lab's devices, so that it can open /dev/stdout anew, and so
# that this script sees the end of its output.
open_output() {
    local out err
    if [[ $STERNA_LAB_KIND == vm ]]; then
        out=$(virtio_port stdout) err=$(virtio_port stderr)
    else
        out=/dev/ttyS0 err=/dev/ttyS1
        # Held open, or the settings would be lost. Raw: a line feed stays one and does not become CR LF.
        exec 5<>$out 6<>$err
        stty -F $out raw -echo
        stty -F $err raw -echo
    fi
    exec 3> >(exec cat >"$out")
    stdout_cat=$!
    exec 4> >(exec cat >"$err" 3>&-)
    stderr_cat=$!
}

# virtio_port NAME: the device of the port that QEMU gave this name.
virtio_port() {
    local name
    name=$(grep -lx "$1" /sys/class/virtio-ports/*/name)
    name=${name%/name}
    echo "/dev/${name##*/}"
}

mount_writable() {
    local i
    for i in "${!writable[@]}"; do
        mkdir -p "${writable[i]}"
        case $STERNA_LAB_KIND in
            uml) mount -t hostfs -o "${writable[i]}" none "${writable[i]}" ;;
            vm) mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=mmap "writable$i" "${writable[i]}" ;;
        esac || fail "cannot mount ${writable[i]}"
    done
}

# The UML kernel has all modules built in.
load_modules() {
    local module
    mkdir -p /lib/modules /run/lab/kernel
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro kernel /run/lab/kernel
    ln -sfn /run/lab/kernel/lib/modules/"$(uname -r)" /lib/modules/"$(uname -r)"
    for module in veth rdma_rxe ib_uverbs rdma_ucm; do
        modprobe "$module" || fail "the kernel $(uname -r) has no module $module"
    done
    # One of the two fits the processor.
    modprobe -q kvm_amd || modprobe -q kvm_intel
}

make_network() {
    ip link set lo up
    ip link add veth0 type veth peer name veth1
    ip address add 10.77.0.1/24 dev veth0
    ip address add 10.77.0.2/24 dev veth1
    ip link set veth0 mtu 9000 up
    ip link set veth1 mtu 9000 up
} >&4 2>&4

# By Sterna's own command as on any machine, or by the commands that it runs, if it is not built yet.
soft_roce_up() {
    local sterna=$checkout/target/release/sterna
    if [[ -x $sterna ]]; then
        "$sterna" soft-roce up --netdev veth0 >/run/lab/soft-roce 2>&1 || { cat /run/lab/soft-roce && return 1; }
    else
        rdma link add rxe0 type rxe netdev veth0
    fi
} >&4 2>&4

# The kernel fills the GID table a moment after the device appears: wait for the IPv4-mapped entry of
# 10.77.0.1.
wait_for_device() {
    local attempt
    for ((attempt = 0; attempt < 100; attempt++)); do
        grep -qs ffff:0a4d:0001 /sys/class/infiniband/rxe0/ports/1/gids/* && return
        sleep 0.1
    done
    fail "no soft-RoCE device rxe0 with a GID of 10.77.0.1"
}

raise_limits() {
    ulimit -l unlimited
    ulimit -n 65536
}

run_job() {
    local code=0 program
    cd "$directory" || fail "cannot enter $directory"
    export PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    program=$(type -P -- "$1" || true)
    [[ $STERNA_LAB_KIND != vm || ! $program ]] || copy_program "$(realpath -- "$program")"
    (exec "$@") </dev/null >&3 2>&4 3>&- 4>&- 5>&- 6>&- || code=$?
    finish "$code"
}

# Paging a program in over 9p is slow: mount a copy in memory over it, under the same path.
copy_program() {
    [[ $1 == "$checkout"/* || $1 == "${writable[-1]}"/* ]] || return 0
    cp -- "$1" /run/lab/program && mount --bind /run/lab/program "$1"
}

fail() {
    printf 'lab: %s\n' "$*" >&4
    finish 125
}

# finish CODE: ends the processes that the job left running, which closes the output pipes; waits until they
# are empty; reports CODE to the host and switches the lab off.
finish() {
    local process
    for process in /proc/[0-9]*; do
        process=${process##*/}
        ((process == 1 || process == stdout_cat || process == stderr_cat)) || kill -KILL "$process" 2>/dev/null
    done
    exec 3>&- 4>&-
    wait "$stdout_cat" "$stderr_cat"
    if [[ $STERNA_LAB_KIND == uml ]]; then
        # Setting a terminal's mode waits until its output has been sent.
        stty -F /dev/ttyS0 raw
        stty -F /dev/ttyS1 raw
    fi
    echo "$1" >/run/lab/host/status
    sync
    echo o >/proc/sysrq-trigger
    while :; do read -rt 60 <> <(:); done # process 1 must not return
}

# shellcheck source=/dev/null # written by common.sh
. /run/lab/host/job
main "$@"
