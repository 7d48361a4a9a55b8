#!/usr/bin/env bash
# Install the CPU environment into .venv from the locks: what every `make` target runs first.
# With the argument `launch`, NeMo-Run (the extra `launch`) on top of it.
# Stamps inside .venv say what was installed, so a call with nothing to do takes milliseconds.
# On failure: the reason, the tail of the log, exit code 78 (something here must change) or 75 (try again).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
WITH=${1:-}
VENV=.venv
LOG=$VENV/install.log
MIN_GLIBC=2.34 # SGLang's wheel is built for manylinux_2_34
MIN_FREE_MIB=3000

lock_hash=$(cat locks/cpu.lock locks/torch-cpu.txt | sha256sum)
launch_hash=$(sha256sum <locks/launch-cpu.lock)
project_hash=$(printf '%s' "$PWD" | cat - pyproject.toml | sha256sum)

is_current() { [[ -f $VENV/.stamp-$1 && $(<"$VENV/.stamp-$1") == "$2" ]]; }

all_current() {
    is_current lock "$lock_hash" && is_current project "$project_hash" &&
        { [[ $WITH != launch ]] || is_current launch "$launch_hash"; }
}

if all_current; then exit 0; fi

refuse() {
    printf 'install: %s\n' "$1" >&2
    exit 78
}

check_machine() {
    [[ $(uname -sm) == "Linux x86_64" ]] ||
        refuse "$(uname -sm) is not Linux x86_64, which locks/cpu.lock is made for"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
        refuse "$PYTHON is not a Python 3.11; install it (Debian: apt-get install python3.11 python3.11-venv) or set PYTHON=/path/to/python3.11"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        refuse "$PYTHON has no venv module; install it (Debian: apt-get install python3.11-venv)"
    local glibc
    glibc=$(getconf GNU_LIBC_VERSION | cut -d' ' -f2)
    [[ $(printf '%s\n' "$MIN_GLIBC" "$glibc" | sort -V | head -n 1) == "$MIN_GLIBC" ]] ||
        refuse "glibc $glibc is older than $MIN_GLIBC, which SGLang's wheel needs; use Debian 12, Ubuntu 22.04, RHEL 9 or newer"
}

check_disk() {
    local free_mib
    free_mib=$(df -Pm . | awk 'NR == 2 { print $4 }')
    ((free_mib >= MIN_FREE_MIB)) ||
        refuse "$free_mib MiB free here; the environment needs $MIN_FREE_MIB MiB; free some space"
}

stage() {
    local title=$1 started=$SECONDS
    shift
    printf 'install: %-58s' "$title ..."
    printf '\n== %s: %s\n' "$title" "$*" >>"$LOG"
    if "$@" >>"$LOG" 2>&1; then
        printf '%4d s\n' $((SECONDS - started))
    else
        printf ' failed after %d s\n' $((SECONDS - started))
        grep -v 'already satisfied' "$LOG" | tail -n 20 >&2
        printf 'install: "%s" failed; the whole log is %s\n' "$title" "$LOG" >&2
        exit 75
    fi
}

# --no-compile: Python compiles what is really imported, on first use.
pip_install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off --no-compile "$@"
}

check_torch() {
    "$VENV/bin/python" - <<'PY'
import torch
build = "the CPU build" if torch.version.cuda is None else "a CUDA build; see locks/torch-cpu.txt"
print(f"torch {torch.__version__} is {build}")
PY
}

check_machine
[[ -w . ]] || refuse "$PWD may not be written; copy the project to a folder of your own"
mkdir -p "$VENV"
exec 9>"$VENV/.install-lock"
flock 9 # two `make` at once: the second waits, then finds the work done
if all_current; then exit 0; fi

: >"$LOG"
if ! is_current lock "$lock_hash"; then
    rm -f "$VENV"/.stamp-{lock,project,launch}
    check_disk
    [[ -x $VENV/bin/pip ]] || stage "Create .venv with $("$PYTHON" --version)" "$PYTHON" -m venv "$VENV"
    stage "Install $(grep -c '==' locks/cpu.lock) pinned packages" \
        pip_install --no-deps --require-hashes -r locks/cpu.lock
    stage "Install torch" pip_install -r locks/torch-cpu.txt
    stage "Check that torch loads" check_torch
    printf '%s\n' "$lock_hash" >"$VENV/.stamp-lock"
fi
if ! is_current project "$project_hash"; then
    stage "Install this project, editable" pip_install --no-deps --no-build-isolation -e .
    printf '%s\n' "$project_hash" >"$VENV/.stamp-project"
fi
if [[ $WITH == launch ]] && ! is_current launch "$launch_hash"; then
    stage "Install NeMo-Run and $(($(grep -c '==' locks/launch-cpu.lock) - 1)) packages" \
        pip_install --no-deps --require-hashes -r locks/launch-cpu.lock
    printf '%s\n' "$launch_hash" >"$VENV/.stamp-launch"
fi
