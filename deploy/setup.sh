#!/usr/bin/env bash
# Build .venv: the GPU extra where nvidia-smi finds a GPU, else the CPU one; SLIPSTREAM_EXTRA=gpu or cpu says which.
# Runs again only when what it installs changed. A .venv of one kind becomes the other only on request: on the login
# node of a GPU cluster there is no GPU, and .venv is the one that its jobs run.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=.venv
kind=${SLIPSTREAM_EXTRA:-}
case $kind in '' | cpu | gpu) ;; *)
    echo "setup: SLIPSTREAM_EXTRA is 'cpu' or 'gpu', not '$kind'" >&2
    exit 2
    ;;
esac
if [ -z "$kind" ]; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then kind=gpu; else kind=cpu; fi
fi

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))'; then
    echo "setup: Python 3.11 or 3.12 is needed; '$python' is $("$python" -V 2>&1). Name another with PYTHON=..." >&2
    exit 2
fi

other=gpu
[ $kind = gpu ] && other=cpu
renew=
if compgen -G "$venv/.installed-$other-*" >/dev/null; then
    if [ -z "${SLIPSTREAM_EXTRA:-}" ]; then
        echo "setup: $venv is a $other build and this machine looks like $kind: keep it with SLIPSTREAM_EXTRA=$other, build it anew with SLIPSTREAM_EXTRA=$kind, or remove $venv" >&2
        exit 2
    fi
    renew=--clear # packages of both kinds would mix: each has its own torch and vLLM
fi

stamp="$venv/.installed-$kind-$(cat pyproject.toml deploy/setup.sh constraints/*.txt | sha256sum | cut -c1-16)"
[ -f "$stamp" ] && exit 0

echo "setup: building $venv for $kind (a few minutes the first time)"
[ -z "$renew" ] && [ -x "$venv/bin/python" ] || "$python" -m venv $renew "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

pip install --upgrade "pip>=25" "setuptools>=77,<82" wheel
if [ "$kind" = cpu ]; then
    echo "setup: torch (CPU build)"
    pip install "torch==2.13.0+cpu" 2>/dev/null \
        || pip install "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
    echo "setup: vLLM, DeepSpeed, MLflow and the rest, versions as pinned in constraints/cpu.txt"
    DS_BUILD_OPS=0 pip install --no-deps -r constraints/cpu.txt
    pip install --no-deps --no-build-isolation -e .
else
    echo "setup: vLLM with its torch, DeepSpeed, MLflow and the rest, versions as pinned in constraints/gpu.txt"
    DS_BUILD_OPS=0 pip install -c constraints/gpu.txt -e ".[gpu,dev]"
fi
# Compiled now, so that the first engine starts as fast as the second.
"$venv/bin/python" -m compileall -q -j 0 "$venv"/lib/python3*/site-packages/{vllm,transformers,torch,mlflow,deepspeed} >/dev/null 2>&1 || true
"$venv/bin/slipstream" --help >/dev/null
rm -f "$venv"/.installed-*
touch "$stamp"
echo "setup: done; the command is $venv/bin/slipstream"
