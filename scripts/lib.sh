# lib.sh: what scripts/demo and scripts/test share: a .venv in the checkout with pcshare installed in it, editable.
#
# Sourced by bash scripts that have set -euo pipefail. Installs nothing outside the checkout and asks nothing. What this
# host lacks is named with the command that mends it, exit 3; a set-up that failed leaves no stamp and is done again at
# the next start.
#
# Stamps in .venv remember what was installed from elsewhere and the checksum of what the build read, so that a second
# start only sums up some files, and a changed C file costs a build and no download.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
PYTHON_MIN_MINOR=11 # of Python 3
PYTHONS=${PCSHARE_PYTHON:-python3 python3.13 python3.12 python3.11}
EXIT_HOST=3

# cannot WHAT [DEBIAN FEDORA]: this host lacks something; the other two are the packages that mend it.
cannot() {
    printf 'pcshare: %s\n' "$1" >&2
    [ -z "${2-}" ] || printf '  Debian, Ubuntu: %s\n' "apt-get install $2" >&2
    [ -z "${3-}" ] || printf '  Fedora, RHEL:   %s\n' "dnf install $3" >&2
    exit $EXIT_HOST
}

say() { printf 'pcshare: %s\n' "$*" >&2; }

# Prints the first Python that is new enough. A name on the PATH is no proof: version managers put names there that
# only complain.
find_python() {
    local candidate
    for candidate in $PYTHONS; do
        if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, $PYTHON_MIN_MINOR))" 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    cannot "no Python 3.$PYTHON_MIN_MINOR or newer among: $PYTHONS (PCSHARE_PYTHON=... names another)" \
        "python3 python3-venv python3-dev" "python3 python3-devel"
}

check_python() {
    local python=$1 header
    command -v uv >/dev/null || "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        cannot "$python cannot make virtual environments (module venv or ensurepip is missing)" "python3-venv" "python3"
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
    [ -e "$header" ] || cannot "no $header, which compiling for $python needs" "python3-dev" "python3-devel"
}

# Compiles a program that opens a uffd, which asks the compiler, the system's headers and the kernel at once.
check_host() {
    local cc=${CC:-cc} scratch status=0
    command -v "${cc%% *}" >/dev/null || cannot "no C compiler: ${cc%% *} is not on the PATH" \
        "gcc libc6-dev" "gcc glibc-devel"
    scratch=$(mktemp -d)
    cat >"$scratch/probe.c" <<'C'
#include <errno.h>
#include <linux/userfaultfd.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <fcntl.h>
#include <unistd.h>

int main(void)
{
    int error;

    if (syscall(SYS_userfaultfd, 1 /* user mode only, since Linux 5.11 */) >= 0)
        return 0;
    error = errno;
    if (open("/dev/userfaultfd", O_RDWR) >= 0)
        return 0;
    return error == ENOSYS || error == EINVAL ? 4 : 5;
}
C
    # shellcheck disable=SC2086  # CC may hold flags
    if ! $cc "$scratch/probe.c" -o "$scratch/probe" 2>"$scratch/errors"; then
        cat "$scratch/errors" >&2
        rm -r "$scratch"
        cannot "$cc does not find the system's headers (above)" \
            "gcc libc6-dev linux-libc-dev" "gcc glibc-devel kernel-headers"
    fi
    "$scratch/probe" || status=$?
    rm -r "$scratch"
    case $status in
    0) ;;
    4) cannot "this kernel has no userfaultfd: pcshare needs Linux 5.11 or newer with CONFIG_USERFAULTFD" \
        "linux-image-$(dpkg --print-architecture 2>/dev/null || uname -m)" "kernel" ;;
    *) cannot "userfaultfd is forbidden here, for this user or by this container's seccomp filter
  as root:        sysctl -w vm.unprivileged_userfaultfd=1
  in a container: start it with --security-opt seccomp=unconfined, or with --device /dev/userfaultfd" ;;
    esac
}

# checksum FILE...: of names and contents, from the root of the checkout.
checksum() { sha256sum -- "$@" | sha256sum | cut -d' ' -f1; }

# What the build reads. The place counts too: an environment that was moved with its checkout points to where it was.
build_key() (
    cd "$ROOT"
    shopt -s nullglob
    sum=$(checksum pyproject.toml setup.py pcshare/core/{build.py,*.[ch]} pcshare/bench/*.[ch] helpers/*.[ch] \
        helpers/hostile/*.[ch])
    printf '%s %s %s\n' "$ROOT" "$sum" "${PCSHARE_SANITIZE:-}"
)

# requirements EXTRA...: what pyproject.toml asks for to build and to run with these extras, one a line.
requirements() {
    "$VENV/bin/python" - "$ROOT/pyproject.toml" "$@" <<'PY'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)
wanted = project["build-system"]["requires"] + project["project"]["dependencies"]
for extra in sys.argv[2:]:
    wanted += project["project"]["optional-dependencies"][extra]
print("\n".join(sorted(set(wanted))))
PY
}

# The environment in VENV, made anew if it does not run, is too old, or was moved here with its checkout.
make_venv() {
    local python=$1
    if [ "$ROOT" = "$(cat "$VENV/stamp.place" 2>/dev/null)" ] &&
        "$VENV/bin/python" -c "import sys; sys.exit(sys.version_info < (3, $PYTHON_MIN_MINOR))" 2>/dev/null; then
        return
    fi
    rm -rf "$VENV"
    say "making $VENV with $python"
    if command -v uv >/dev/null; then
        uv venv --quiet --python "$python" "$VENV"
    else
        "$python" -m venv "$VENV"
    fi || {
        rm -rf "$VENV"
        cannot "$python could not make $VENV (above)" "python3-venv" "python3"
    }
    printf '%s\n' "$ROOT" >"$VENV/stamp.place"
}

install_into_venv() {
    if command -v uv >/dev/null; then
        uv pip install --quiet --python "$VENV/bin/python" "$@"
    else
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    fi
}

# install_packages demo|test EXTRA...: everything that comes from elsewhere, if it changed.
install_packages() {
    local stamp=$VENV/stamp.packages-$1 wanted lines
    shift
    wanted=$(requirements "$@")
    if [ "$wanted" = "$(cat "$stamp" 2>/dev/null)" ]; then
        return
    fi
    mapfile -t lines <<<"$wanted"
    say "installing ${#lines[@]} packages into $VENV"
    install_into_venv "${lines[@]}" || cannot "packages could not be installed (above)
  no network:     name an index within reach by PIP_INDEX_URL, or a folder of wheels by PIP_FIND_LINKS
                  (with uv: UV_INDEX_URL, UV_FIND_LINKS)"
    printf '%s\n' "$wanted" >"$stamp"
}

build_pcshare() {
    local options=(--no-deps --no-build-isolation --editable .)
    command -v uv >/dev/null && options+=(--reinstall) # uv does not look whether a C file changed
    say "building pcshare"
    if ! (cd "$ROOT" && install_into_venv "${options[@]}"); then
        say "building pcshare failed in $ROOT (above)"
        exit 1
    fi
}

# is_set_up demo|test KEY. What was built lies beside the sources, where a clean-up may have removed it.
is_set_up() {
    [ "$2" = "$(cat "$VENV/stamp.$1" 2>/dev/null)" ] && [ -x "$VENV/bin/pcshare" ] &&
        [ -x "$ROOT/pcshare/_bin/pcshare-keeper" ] && compgen -G "$ROOT/pcshare/core/_core*.so" >/dev/null
}

# set_up_venv demo|test: .venv is ready when this returns.
set_up_venv() {
    local kind=$1 key python lock extras=(numpy)
    [ "$kind" = demo ] || extras+=(test)
    key=$(build_key)
    ! is_set_up "$kind" "$key" || return 0
    python=$(find_python)
    check_python "$python"
    check_host
    exec {lock}<"$ROOT"
    flock "$lock" # one set-up at a time
    if ! is_set_up "$kind" "$key"; then
        rm -f "$VENV/stamp.demo" "$VENV/stamp.test"
        make_venv "$python"
        install_packages "$kind" "${extras[@]}"
        build_pcshare
        printf '%s\n' "$key" >"$VENV/stamp.$kind"
        # The demo needs less than the tests.
        [ "$kind" = demo ] || printf '%s\n' "$key" >"$VENV/stamp.demo"
    fi
    exec {lock}<&-
}
