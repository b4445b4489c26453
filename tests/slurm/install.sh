#!/usr/bin/env bash
# Put Debian's Slurm, munge and Prometheus here for the cluster tests; starts none of their services.
set -euo pipefail
missing=()
for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge prometheus:prometheus promtool:prometheus; do
    PATH=$PATH:/usr/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "test-slurm: ${missing[*]} not found, and only root on Debian or Ubuntu can install them: tests that need them are skipped" >&2
    exit 0
fi
# RUNLEVEL=1: the packages' scripts start no daemon; the tests start their own, on ports of their own.
export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive
apt-get update -qq || true
apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null \
    || echo "test-slurm: ${missing[*]} could not be installed: tests that need them are skipped" >&2
