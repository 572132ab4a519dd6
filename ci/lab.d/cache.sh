# Messages, and the cache of what is prepared once: kernels, QEMUs, guests for tests.
# Sourced by ci/lab, ci/qemu and ci/guest, which set `checkout` and `parts`.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables shared with the files that source this

cache=${STERNA_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sterna}

say() { printf 'lab: %s\n' "$*" >&2; }

# env(1), timeout(1) and docker(1) exit with 125, too, when they fail themselves and not the command they run.
die() {
    say "$*"
    exit 125
}

# cached NAME BUILDER [RECIPE]: sets `entry` to the cache's folder NAME. If the folder is missing or was made by
# another recipe, calls BUILDER WORK to fill WORK/entry, and then moves that into place whole: a lock makes a
# second process wait, and an interrupted preparation leaves nothing that looks like an entry.
cached() {
    local name=$1 builder=$2 recipe=${3:-}
    entry=$cache/$name
    made_by "$recipe" && return
    mkdir -p "$cache"
    (
        flock --nonblock 9 || {
            say "waiting for another process that is preparing $name"
            flock 9
        }
        made_by "$recipe" && exit
        rm -rf "$cache/$name.partial".* # whatever left it holds the lock no more
        work=$(mktemp -d "$cache/$name.partial.XXXXXX")
        trap 'rm -rf "$work"' EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM
        mkdir "$work/entry"
        chmod 755 "$work"
        "$builder" "$work"
        [[ ! $recipe ]] || echo "$recipe" >"$work/entry/recipe"
        rm -rf "$entry"
        mv "$work/entry" "$entry"
        say "kept in $entry"
    ) 9>"$cache/$name.lock"
}

# made_by RECIPE: whether the folder `entry` is complete. Some have the recipe in their name, and none within.
made_by() {
    [[ -d $entry ]] && [[ ! $1 || $(cat "$entry/recipe" 2>/dev/null) == "$1" ]]
}

# recipe_of FILE…: a word that changes with the content of the files.
recipe_of() {
    local sum
    sum=$(cat "$@" | sha256sum)
    echo "${sum::12}"
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
