#!/usr/bin/env bash
# Build the production image for this machine's platform, and a squashfs file for enroot/pyxis:
#
#     slurm/container/build.sh /shared/images/opd-$(uname -m).sqsh
#
# aarch64 is built on an aarch64 machine (a GB200 node), not emulated: compiling CUDA under emulation takes days.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${1:?usage: slurm/container/build.sh FILE.sqsh}
engine=${ENGINE:-docker}
tag=opd-megatron:$(git rev-parse --short=12 HEAD)

for program in "$engine" enroot; do
    command -v "$program" >/dev/null || { echo "build: $program is not on this machine" >&2; exit 78; }
done
[[ -z $(git status --porcelain) ]] || { echo "build: the checkout differs from its commit; commit first" >&2; exit 78; }

"$engine" build -f slurm/container/Dockerfile -t "$tag" .
case $engine in
    docker) source=dockerd://$tag ;;
    podman) source=podman://$tag ;;
    *) echo "build: import $tag yourself: enroot knows docker and podman" >&2; exit 78 ;;
esac
enroot import -o "$target" "$source"
echo "cluster.container_image=$target"
