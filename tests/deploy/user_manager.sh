#!/usr/bin/env bash
# Run a command beside a systemd user instance of its own: user_manager.sh HOME COMMAND...
# Works without systemd as the machine's init: a private /run and process namespace is all that it needs (root).
set -euo pipefail
home=$1
shift
exec unshare --mount --pid --fork --mount-proc bash -euc '
    mount -t tmpfs tmpfs /run
    mkdir -p /run/systemd/system /run/user/0
    chmod 700 /run/user/0
    export XDG_RUNTIME_DIR=/run/user/0 XDG_CONFIG_HOME=$0/config SYSTEMD_LOG_TARGET=null
    mkdir -p "$XDG_CONFIG_HOME"
    systemd --user &
    for _ in $(seq 100); do [ -S /run/user/0/systemd/private ] && break; sleep 0.1; done
    "$@"
' "$home" "$@"
