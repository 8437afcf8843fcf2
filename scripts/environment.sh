# Sourced by the other scripts: the Python environments of this checkout, each made at its first use. .venv is the one
# for development; a script that sets $venv before it sources this file has another.
#
# `environment` makes or completes it and sets $python. A stamp in it says what it was made from; while nothing of
# that changed, making it again is one comparison.

unset PYTHONDONTWRITEBYTECODE # packages come uncompiled; with it, each process would compile all that it imports again
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
venv=${venv:-.venv}
python=$PWD/$venv/bin/python
log=$venv/install.log
stamp=$venv/made-from

torch=${NORM_PLUGIN_TORCH:-torch==2.13.0}
triton=triton==3.7.1   # the kernels' tests run it on the CPU, in its interpreter
extras=cli,test,lint,release
room_mb=${room_mb:-5000} # .venv with the CPU build of torch, two more Tritons, the downloads, and some to spare

fail() { # fail "what is wrong" "what to do about it"
    printf '\nerror: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '  fix: %s\n' "$2" >&2
    exit 1
}

step() { # step "what it does" command...: one line with the time it took; its output is shown only if it fails
    local what=$1 begin=$SECONDS ticker=
    shift
    printf '  %s ... ' "$what"
    if [ -t 1 ]; then # the ticker, not the command, is in the background: Ctrl-C must reach the command
        (while sleep 1 && kill -0 $$ 2>/dev/null; do printf '\r  %s ... %d s ' "$what" $((SECONDS - begin)); done) &
        ticker=$!
    fi
    local status=0
    "$@" >"$log" 2>&1 || status=$?
    if [ -n "$ticker" ]; then
        kill "$ticker" 2>/dev/null
        wait "$ticker" 2>/dev/null
        printf '\r  %s ... ' "$what"
    fi
    if [ "$status" -ne 0 ]; then
        printf 'failed after %d s\n' $((SECONDS - begin))
        grep -v "WARNING: Location '.*' is ignored" "$log" | tail -30 | sed 's/^/    /'
        return "$status"
    fi
    printf '%d s\n' $((SECONDS - begin))
}

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() { # the Python that the environment is made with: 3.11 if there is one
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3.10 python3 python; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

make_venv() {
    local base
    "$python" -c '' 2>/dev/null && has pip && fail "the $venv here is $("$python" -V); norm_plugin needs Python 3.10 or newer." \
        "move it away (mv $venv $venv.old) and run this again."
    base=$(find_python) || fail "no Python 3.10 or newer on the PATH$(found_python)." \
        "install Python 3.11 (Debian, Ubuntu: apt install python3.11 python3.11-venv; anywhere: https://www.python.org/downloads) and run this again."
    "$base" -c 'import venv' 2>/dev/null || fail "$base has no venv module." \
        "install it (Debian, Ubuntu: apt install $base-venv) and run this again."
    local free_mb
    free_mb=$(df -Pm . | awk 'NR == 2 {print $4}')
    [ "$free_mb" -ge "$room_mb" ] || fail "$free_mb MB are free in $PWD and the environment takes up to $room_mb MB." \
        "free some space, or put the checkout on another disk."
    rm -rf $venv && mkdir $venv
    if "$base" -c 'import ensurepip' 2>/dev/null; then
        step "making $venv with $("$base" -V)" "$base" -m venv $venv
    elif "$base" -m pip --version >/dev/null 2>&1; then # as Debian packages it: the system's pip can fill a bare one
        step "making $venv with $("$base" -V)" "$base" -m venv --without-pip $venv &&
            step "installing pip" "$base" -m pip --python "$python" install pip
    else
        fail "$base has neither ensurepip nor pip." "install one (Debian, Ubuntu: apt install $base-venv) and run this again."
    fi || fail "the environment could not be made; the lines above say why." "mend that, delete $venv, run this again."
}

found_python() { # what there is instead, for the message
    local version
    version=$(python3 -V 2>/dev/null) && printf ' (python3 is %s)' "$version"
    return 0
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

pip_install() { # pip_install "what" requirement...
    # Python compiles what is imported, a small part of it, when it is, and keeps that
    local what=$1
    shift
    step "installing $what" "$python" -m pip install --no-compile --progress-bar off "$@" && return
    if grep -qi 'no space left' "$log"; then
        fail "the disk is full." "free $room_mb MB where $PWD and the temporary folder (${TMPDIR:-/tmp}) are, run this again."
    elif grep -q 'No matching distribution' "$log"; then
        fail "pip finds no $what for $("$python" -V) on this machine." \
            "if it is torch, name one that it finds: NORM_PLUGIN_TORCH='torch>=2.11' $0; or use Python 3.11 (delete $venv first)."
    fi
    fail "pip could not install $what; the lines above and $log say why." "mend that (no network? a proxy?), run this again."
}

collect_rarely() { # an engine's import makes objects by the million, which stay: looking for garbage is an eighth of it
    local packages
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') &&
        echo 'import gc; gc.set_threshold(50000, 50, 1000)' >"$packages/norm_plugin_collect_rarely.pth" ||
        fail "$venv cannot be written to." "delete $venv and run this again."
}

ingredients() { echo "$PWD, $("$python" -V 2>&1), $torch, $(cat pyproject.toml scripts/environment.sh | cksum)"; }

environment() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(ingredients)" ] && return
    { usable "$python" && has pip; } || make_venv
    rm -f "$stamp"
    # a torch that somebody put there stays, and so does the triton that came with it
    [ -z "${NORM_PLUGIN_TORCH:-}" ] && has torch || pip_install "$torch" "$torch"
    has triton || pip_install "$triton" "$triton"
    pip_install "norm_plugin, editable, with its extras $extras" --editable ".[$extras]"
    ingredients >"$stamp"
}

compiler_note() { # torch.compile on a CPU needs a C++ compiler and Python's headers; say so before it is missed
    local cxx=${CXX:-g++} headers
    [ "$(uname)" != Darwin ] || cxx=${CXX:-clang++}
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    command -v "$cxx" >/dev/null || echo "note: no $cxx here, so torch.compile cannot work (Debian, Ubuntu: apt install g++)."
    [ -f "$headers/Python.h" ] ||
        echo "note: no Python.h in $headers, so torch.compile cannot work (Debian, Ubuntu: apt install python3-dev)."
}
