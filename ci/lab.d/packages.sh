# Packages: small tools, which are installed, and large or particular ones, which are only unpacked.
# Sourced by ci/lab, ci/qemu, ci/guest and .ci/run after cache.sh.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables shared with the files that source this

# --- installed ------------------------------------------------------------------------------------------

# need_packages PACKAGE…: installs the missing ones, or prints the command that would. Never removes one.
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
        die "apt-get could not install, without removing a package: ${missing[*]}"
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 install --yes --no-remove \
        --no-install-recommends "$@" </dev/null >&2
}

apt_update() {
    ((EUID == 0)) || die "apt's package lists are missing or too old: sudo apt-get update"
    say "updating apt's package lists"
    apt-get -qq -o DPkg::Lock::Timeout=600 update >&2
}

# --- unpacked, from the sources of this machine -----------------------------------------------------------

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

# --- unpacked, from any release ---------------------------------------------------------------------------

# unpack_release DIR PACKAGE… -- SUITE…: unpacks packages into DIR, with all that they depend on, from these
# suites of the distribution. Options of apt-get may stand before the packages. apt works with lists, a cache and a status of its own in DIR/apt: the machine's
# sources, lists and packages stay as they are, and this needs no root. What the machine has installed does not
# count, so what is unpacked fits together.
unpack_release() {
    local dir=$1 deb name suite wanted=()
    shift
    while [[ $1 != -- ]]; do
        wanted+=("$1")
        shift
    done
    shift
    mkdir -p "$dir/apt/lists/partial" "$dir/apt/archives/partial"
    : >"$dir/apt/status"
    for suite; do
        apt_source "$suite"
    done >"$dir/apt/sources.list"
    {
        release_apt "$dir/apt" update &&
            release_apt "$dir/apt" install --yes --download-only --no-install-recommends "${wanted[@]}"
    } >"$dir/apt/log" 2>&1 || {
        tail -n 20 "$dir/apt/log" >&2
        die "apt-get could not download: ${wanted[*]}"
    }
    for deb in "$dir/apt/archives"/*.deb; do
        name=${deb##*/}
        # The C library goes with the machine's dynamic loader, and is at least as new.
        [[ ${name%%_*} == libc6 ]] || dpkg -x "$deb" "$dir"
    done
    rm -r "$dir/apt"
}

# release_apt DIR ARGUMENT…: apt-get with the sources, lists and status in DIR.
release_apt() {
    local dir=$1
    shift
    apt-get \
        -o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
        -o Dir::State::lists="$dir/lists" -o Dir::State::status="$dir/status" \
        -o Dir::Cache="$dir" -o Dir::Cache::archives="$dir/archives" \
        -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o APT::Sandbox::User=root -o Acquire::Retries=3 "$@"
}

# apt_source SUITE: a line for sources.list, with the mirror from which this machine takes its own packages.
apt_source() {
    local suite=$1 id archive=/debian components=main keyring options='' mirror
    id=$(os_release ID)
    keyring=/usr/share/keyrings/$id-archive-keyring.gpg
    case $id-$suite in
        ubuntu-*) archive=/ubuntu components="main universe" ;;
        *-security) archive=/debian-security ;;
    esac
    # shellcheck disable=SC2016 # apt-get fills these in
    mirror=$(apt-get indextargets --format '$(SITE) $(RELEASE)' 'Created-By: Packages' |
        awk -v archive="$archive" -v suite="$suite" -v own="$(os_release VERSION_CODENAME)" '
            substr($1, length($1) - length(archive) + 1) != archive { next }
            $2 == suite || $2 == own || $2 == own "-security" { print $1; exit }')
    if [[ ! $mirror ]]; then
        [[ $id == ubuntu ]] && mirror=http://archive.ubuntu.com/ubuntu || mirror=http://deb.debian.org$archive
    fi
    [[ ! -r $keyring ]] || options="[signed-by=$keyring] "
    echo "deb $options$mirror $suite $components"
}

# os_release NAME: a value of /etc/os-release.
os_release() (
    # shellcheck source=/dev/null
    . /etc/os-release
    echo "${!1:-}"
)
