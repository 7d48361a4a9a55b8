#!/usr/bin/env bash
# The learner's tests on the newest Megatron-Core, which needs Python 3.12, in an environment of its own.
# Without a Python 3.12 nothing is run, and that is said loudly; everything else that fails, fails.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv-megatron-latest
TE=$VENV/transformer-engine # its Python part alone; Megatron would not start with it on the path

is_312() { "$1" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in "${PYTHON312:-python3.12}" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
        if is_312 "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

if ! python=$(find_python); then
    printf '%s\n' \
        '################################################################################' \
        '# SKIPPED: no Python 3.12 here, so the newest Megatron-Core was NOT tested.    #' \
        '# Install Python 3.12, or name it: make test-megatron-latest PYTHON312=/path   #' \
        '################################################################################' >&2
    exit 0
fi

lock_hash=$(cat locks/megatron-latest.lock locks/megatron-latest-te.lock locks/torch-cpu.txt | sha256sum)
if [[ ! -f $VENV/.stamp || $(<"$VENV/.stamp") != "$lock_hash" ]]; then
    printf 'megatron-latest: installing %s with %s\n' "$VENV" "$("$python" --version)"
    rm -rf "$VENV"
    "$python" -m venv "$VENV"
    pip() { "$VENV/bin/python" -m pip install --quiet --no-input --progress-bar off --no-compile "$@"; }
    pip --no-deps --require-hashes -r locks/megatron-latest.lock
    pip -r locks/torch-cpu.txt
    pip --no-deps --require-hashes --target "$TE" -r locks/megatron-latest-te.lock
    printf '%s\n' "$lock_hash" >"$VENV/.stamp"
fi

export OMP_NUM_THREADS=1 PYTHONPATH=$PWD OPD_TRANSFORMER_ENGINE_SITE=$PWD/$TE
exec "$VENV/bin/python" -m pytest -q -p no:cacheprovider tests/unit/megatron tests/real/test_megatron_*.py \
    -m "${MARKS:-not gpu and not slow}" --durations=10 "$@"
