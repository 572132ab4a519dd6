# The labs' host side: messages, packages, the cache, and the life of one lab from job file to exit code.
# Sourced by ci/lab, which sets `checkout`, `parts` and `kind`, and followed by uml.sh or vm.sh, which define
#   prepare           makes sure of packages and kernel
#   lab_command       fills the array `command`, which starts the lab. The command keeps its files in the folder
#                     `run`, gives the lab the folders `writable`, and connects its stdout to descriptor 3 and
#                     its stderr to descriptor 4.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # this file and the others set variables for each other

cache=${STERNA_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sterna}
memory=${STERNA_LAB_MEMORY:-3G}
timeout_s=${STERNA_LAB_TIMEOUT:-1800}
run= # this lab's own folder; inside the lab it is /run/lab/host
lab= # process id of the running lab

say() { printf 'lab: %s\n' "$*" >&2; }

# env(1), timeout(1) and docker(1) exit with 125, too, when they fail themselves and not the command they run.
die() {
    say "$*"
    exit 125
}

# --- packages -------------------------------------------------------------------------------------------

# need_packages PACKAGE…: installs the missing ones, or prints the command that would.
need_packages() {
    local package missing=()
    command -v apt-get >/dev/null ||
        die "the labs take packages and kernels from Debian or Ubuntu, and this machine has no apt-get"
    for package; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    ((EUID == 0)) || die "packages are missing: sudo apt-get install --no-install-recommends ${missing[*]}"
    say "installing packages: ${missing[*]}"
    apt_install "${missing[@]}" || { apt_update && apt_install "${missing[@]}"; } ||
        die "apt-get could not install: ${missing[*]}"
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 install --yes --no-install-recommends "$@" \
        </dev/null >&2
}

apt_update() {
    ((EUID == 0)) || die "apt's package lists are missing or too old: sudo apt-get update"
    say "updating apt's package lists"
    apt-get -qq -o DPkg::Lock::Timeout=600 update >&2
}

# known_package NAME…: prints the first of these packages that apt can get.
known_package() {
    local name
    for name; do
        if [[ $(candidate_version "$name") ]]; then
            echo "$name"
            return
        fi
    done
    return 1
}

# newest_known_package NAME…: the same, but first updates lists that are older than a day and lack NAME: the
# image of a new machine has the package lists of the day on which it was made.
newest_known_package() {
    known_package "$@" && return
    ((EUID == 0)) && [[ $(find /var/lib/apt/lists -maxdepth 0 -mmin +1440) ]] && apt_update && known_package "$@"
}

candidate_version() {
    LC_ALL=C apt-cache policy "$1" 2>/dev/null | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'
}

# unpack_packages DIR PACKAGE…: downloads packages and unpacks them into DIR. Needs no root, installs nothing.
unpack_packages() {
    local dir=$1
    shift
    mkdir -p "$dir/debs"
    (
        cd "$dir/debs" || exit
        # As root, apt would download as the user _apt, which may not write to this folder.
        get=(apt-get -qq -o APT::Sandbox::User=root download "$@")
        "${get[@]}" >&2 || { apt_update && "${get[@]}" >&2; } || die "apt-get could not download: $*"
        for deb in ./*.deb; do
            dpkg -x "$deb" "$dir"
        done
    )
    rm -r "$dir/debs"
}

# --- the cache ------------------------------------------------------------------------------------------

# cached NAME BUILDER: sets `entry` to the cache's folder NAME. If the folder is missing, calls BUILDER WORK
# to fill WORK/entry, and then moves that into place whole: a lock makes a second lab wait, and an interrupted
# preparation leaves nothing that looks like an entry.
cached() {
    local name=$1 builder=$2
    entry=$cache/$name
    [[ -d $entry ]] && return
    mkdir -p "$cache"
    (
        flock --nonblock 9 || {
            say "waiting for another lab that is preparing"
            flock 9
        }
        [[ -d $entry ]] && exit
        rm -rf "$cache/$kind.partial".* # whoever left it holds the lock no more
        work=$(mktemp -d "$cache/$kind.partial.XXXXXX")
        trap 'rm -rf "$work"' EXIT
        mkdir "$work/entry"
        "$builder" "$work"
        mv "$work/entry" "$entry"
        say "kept in $entry"
    ) 9>"$cache/$kind.lock"
}

# logged LOG COMMAND…: runs a long command quietly; shows its output if it fails.
logged() {
    local log=$1
    shift
    "$@" >>"$log" 2>&1 || {
        tail -n 40 "$log" >&2
        die "failed: $*"
    }
}

# --- one lab, from its start to its end -----------------------------------------------------------------

# run_lab COMMAND…: runs it in the lab and exits with its exit code.
run_lab() {
    local code=0
    trap end_lab EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 141' PIPE
    trap 'exit 143' TERM
    run=$(mktemp -d "${TMPDIR:-/tmp}/sterna-lab.XXXXXX")
    find_writable
    cp "$parts/inside.sh" "$run/inside.sh"
    write_job "$@" >"$run/job"

    # The lab writes into pipes: given this script's stdout, it would set O_NONBLOCK on it for all processes
    # that share it. When the reader is gone, the lab ends, as a program in a pipeline does.
    exec 3> >(cat || kill -PIPE $$)
    local stdout=$!
    exec 4> >(cat >&2 || kill -PIPE $$)
    local stderr=$!
    lab_command
    # `timeout` gives the lab its own process group and kills the whole group; if this script is killed, the
    # kernel signals `timeout`.
    setpriv --pdeathsig TERM timeout --kill-after=5 "$timeout_s" "${command[@]}" </dev/null >"$run/console" 2>&1 &
    lab=$!
    exec 3>&- 4>&-
    wait "$lab" || code=$?
    lab=
    wait "$stdout" "$stderr" || true

    if [[ -s $run/status ]]; then
        exit "$(<"$run/status")"
    elif ((code == 124 || code == 137 && SECONDS >= timeout_s)); then
        say "ended after $timeout_s seconds; STERNA_LAB_TIMEOUT sets the limit"
        exit 124
    fi
    tail -n 30 "$run/console" >&2
    die "the lab stopped before the command did; above is the end of its console"
}

end_lab() {
    if [[ $lab ]]; then
        kill "$lab" 2>/dev/null || true
        wait "$lab" || true
    fi
    [[ ! $run ]] || rm -rf "$run"
}

# Sets `writable`: the host's folders that the lab may write to.
find_writable() {
    local target=${CARGO_TARGET_DIR:-}
    writable=("$checkout")
    if [[ -d $target ]]; then
        target=$(cd "$target" && pwd -P)
        [[ $target/ == "$checkout"/* ]] || writable+=("$target")
    fi
}

# Writes the input of inside.sh: the environment, the writable folders, and the command, all as shell words.
write_job() {
    local directory=$checkout
    [[ $(pwd -P)/ != "$checkout"/* ]] || directory=$(pwd -P)
    export -p
    printf 'export STERNA_LAB=1 STERNA_LAB_KIND=%q\n' "$kind"
    printf 'checkout=%q directory=%q\n' "$checkout" "$directory"
    printf 'writable=('
    printf ' %q' "${writable[@]}"
    printf ' )\nset --'
    printf ' %q' "$@"
    printf '\n'
}
