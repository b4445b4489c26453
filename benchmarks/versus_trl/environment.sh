#!/usr/bin/env bash
# An environment of its own for TRL: our torch, transformers and accelerate, so that only the trainers differ.
#
#   benchmarks/versus_trl/environment.sh FOLDER        kept in FOLDER and used again
#
# The CPU build of torch goes in first; what comes after finds it there and pulls no other.
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=$1
release=trl==1.16.0
stamp="$folder/.ready-$(cat "$0" constraints/cpu.txt | sha256sum | cut -c1-16)"
[ -f "$stamp" ] && exit 0

echo "versus_trl: building $folder (a few minutes the first time)" >&2
"${PYTHON:-.venv/bin/python}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install "torch==2.13.0+cpu" 2>/dev/null \
    || pip install "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
# The second line is what our verifier, question sets and recipes import: both sides are scored by them.
pip install -c constraints/cpu.txt "$release" transformers accelerate \
    pydantic sympy math-verify latex2sympy2-extended pebble jinja2
"$folder/bin/python" -m compileall -q -j 0 "$folder"/lib/python3*/site-packages/{trl,transformers,torch,accelerate} \
    >/dev/null 2>&1 || true
touch "$stamp"
