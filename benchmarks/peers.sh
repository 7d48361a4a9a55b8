#!/usr/bin/env bash
# Install the peers into .venv-peers, on top of .venv: same torch, same Megatron. Skipped when it is current.
# PYTHON_ENV: the environment to lay it on (default .venv).
set -euo pipefail
cd "$(dirname "$0")/.."

BASE=${PYTHON_ENV:-.venv}
VENV=.venv-peers
wanted=$({ realpath "$BASE"; cat benchmarks/peers.txt; } | sha256sum)
[[ -f $VENV/.stamp && $(<"$VENV/.stamp") == "$wanted" ]] && exit 0

[[ -x $BASE/bin/python ]] || {
    printf 'peers: %s is no environment; run `make install`, or set PYTHON_ENV\n' "$BASE" >&2
    exit 78
}
printf 'peers: installing %s packages into %s ...\n' "$(grep -c '==' benchmarks/peers.txt)" "$VENV" >&2
rm -rf "$VENV"
"$BASE/bin/python" -m venv "$VENV"
"$VENV/bin/python" -m pip install -q --disable-pip-version-check --no-input --no-deps -r benchmarks/peers.txt
# After the peers' own packages on the path, so that theirs win where both have one.
"$BASE/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base_environment.pth"
"$VENV/bin/python" -c 'import torch, trl, verl, liger_kernel, torchtune' 2>/dev/null || {
    printf 'peers: the installation does not import; %s/bin/python -c "import trl, verl, liger_kernel, torchtune" says why\n' "$VENV" >&2
    exit 75
}
printf '%s\n' "$wanted" >"$VENV/.stamp"
