#!/usr/bin/env bash
# Moves a guest of QEMU to another QEMU on this machine, as from one host to another. The guest writes its memory all
# the time, and checks every page: a line `W` would name a wrong one.
set -euo pipefail

usage() {
    cat >&2 <<'HELP'
Usage: examples/qemu/move.sh [OPTION...]    options of `sterna migrate`, such as --verify=full

  STERNA    the command [target/release/sterna]
  QEMU      qemu-system-x86_64, 9.0 or later [that of `ci/qemu 10`]
HELP
    exit 2
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage; fi
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
sterna=${STERNA:-$checkout/target/release/sterna}
[[ -x $sterna ]] || { echo "no $sterna: cargo build --release, or set STERNA" >&2; exit 1; }
QEMU=${QEMU:-$("$checkout/ci/qemu" 10)}
guest=$("$checkout/ci/guest" boot-sector)/image
folder=$(mktemp -d)
export QEMU GUEST_DISK=$folder/disk

processes=()
finish() {
    for process in "${processes[@]}"; do kill "$process" 2>/dev/null || true; done
    wait
    # A guest stays in its QEMU when Sterna ends.
    for pid in "$folder"/*/tern.pid; do if [[ -e $pid ]]; then kill "$(<"$pid")" 2>/dev/null || true; fi; done
    rm -rf "$folder"
}
trap finish EXIT

# A host is a folder for its sockets and one for its state.
on() {
    local host=$folder/$1
    install -d -m 700 "$host" "$host/run" "$host/state"
    GUEST_FOLDER=$host STERNA_RUNTIME_DIR=$host/run STERNA_STATE_DIR=$host/state STERNA_STATE_DIR_ANYWAY=1 "${@:2}"
}

until_says() {
    for ((i = 0; i < 600; i++)); do
        if grep -q "$2" "$1" 2>/dev/null; then return; fi
        sleep 0.1
    done
    echo "in a minute $1 had no line with: $2" >&2
    cat "$1" >&2
    exit 1
}

# Firmware reads no disk that is smaller than a cylinder.
cp "$guest" "$GUEST_DISK"
truncate -s 1M "$GUEST_DISK"

echo "host-a: a guest starts"
monitor=$(on host-a "$checkout/examples/qemu/guest.sh" tern)
until_says "$folder/host-a/tern.log" '^S '

on host-a exec "$sterna" adopt tern --qmp "$monitor" >"$folder/adopt" 2>&1 &
processes+=($!)
on host-b exec "$sterna" receive --port 0 --start "$checkout/examples/qemu/guest.sh" >"$folder/receive" 2>&1 &
processes+=($!)
until_says "$folder/adopt" 'is adopted'
until_says "$folder/receive" 'listening at'
address=$(sed -n 's/^listening at \([^ ]*\) .*/\1/p' "$folder/receive")

echo "sterna migrate tern --to $address $*"
on host-a "$sterna" migrate tern --to "$address" "$@"

until_says "$folder/host-b/tern.log" '^S '
sleep 2
echo "host-b: $(grep -c '^S ' "$folder/host-b/tern.log") passes over memory since, $(grep -c '^W ' "$folder"/host-?/tern.log | awk -F: '{ wrong += $2 } END { print wrong }') wrong pages"
