#!/usr/bin/env bash
# Install what the Slurm tests need, from Debian packages (15 MB), where that is possible; say so where it is not.
# No service is started: the tests bring up daemons of their own and end them.
set -euo pipefail

missing=()
PATH=$PATH:/usr/sbin
for program in slurmctld slurmd sbatch munged; do
    command -v "$program" >/dev/null || missing+=("$program")
done
((${#missing[@]} > 0)) || exit 0

skip() {
    echo "install_slurm: $1; THE SLURM TESTS WILL BE SKIPPED (missing: ${missing[*]})" >&2
    exit 0
}

command -v apt-get >/dev/null || skip "no apt-get here"
((EUID == 0)) || skip "not root; as root: apt-get install slurmctld slurmd slurm-client munge"
export DEBIAN_FRONTEND=noninteractive
echo "install_slurm: installing slurmctld slurmd slurm-client munge"
# Packages start their services on a machine with systemd; the tests need none of them.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null ||
    skip "the packages can not be installed"
