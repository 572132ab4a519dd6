# The labs' host side: the life of one lab from job file to exit code.
# Sourced by ci/lab, which sets `checkout`, `parts` and `kind`, after cache.sh and packages.sh, and followed by
# uml.sh or vm.sh, which define
#   prepare           makes sure of packages and kernel
#   lab_command       fills the array `command`, which starts the lab. The command keeps its files in the folder
#                     `run`, gives the lab the folders `writable`, and connects its stdout to descriptor 3 and
#                     its stderr to descriptor 4.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # this file and the others set variables for each other

memory=${STERNA_LAB_MEMORY:-3G}
timeout_s=${STERNA_LAB_TIMEOUT:-1800}
run= # this lab's own folder; inside the lab it is /run/lab/host
lab= # process id of the running lab

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
