#!/usr/bin/env bash
# Install what the Slurm tests need, from Debian packages (15 MB), where that is possible; say so where it is not.
# No service is started: the tests bring up daemons of their own and end them. With the argument `ssh` also an SSH
# server, for the test of submission from elsewhere, which is one of `make test-slow`.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge)
programs=(slurmctld slurmd sbatch munged)
if [[ ${1:-} == ssh ]]; then
    packages+=(openssh-server rsync)
    programs+=(sshd rsync)
fi
missing=()
PATH=$PATH:/usr/sbin
for program in "${programs[@]}"; do
    command -v "$program" >/dev/null || missing+=("$program")
done
((${#missing[@]} > 0)) || exit 0

skip() {
    echo "install_slurm: $1; TESTS WILL BE SKIPPED for want of ${missing[*]}" >&2
    exit 0
}

command -v apt-get >/dev/null || skip "no apt-get here"
((EUID == 0)) || skip "not root; as root: apt-get install ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
echo "install_slurm: installing ${packages[*]}"
# Packages start their services on a machine with systemd; the tests need none of them.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null ||
    skip "the packages can not be installed"
