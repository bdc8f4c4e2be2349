#!/usr/bin/env bash
# install.sh VENV   make a virtual environment with the project and everything it needs, versions as in constraints.txt.
#
# PyTorch first, by itself: on a machine without an NVIDIA GPU its CPU build, so that gigabytes of CUDA never come by
# surprise; TORCH_BUILD=gpu or cpu decides instead, such as on a login node for nodes that have GPUs and no internet.
# PIP_EXTRA_INDEX_URL and pip's own configuration are respected; PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")"
venv=${1:?usage: install.sh VENV}
python=${PYTHON:-python3}
torch=$(grep -E '^torch==' constraints.txt)

build=${TORCH_BUILD:-cpu}
[[ -n ${TORCH_BUILD:-} ]] || ! nvidia-smi > /dev/null 2>&1 || build=gpu
[[ $build == gpu || $build == cpu ]] || { echo "error: TORCH_BUILD=$build: expected gpu or cpu" >&2; exit 2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $python is older than 3.10" >&2; exit 2; }
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
if [[ $build == gpu ]]; then
  echo "installing $torch, GPU build"
  "${pip[@]}" "$torch"
else
  echo "installing $torch, CPU build"
  "${pip[@]}" "$torch+cpu" 2> /dev/null || "${pip[@]}" "$torch+cpu" --index-url https://download.pytorch.org/whl/cpu
fi
echo "installing the project"
# DeepSpeed's wheel is built here, against the PyTorch just installed, without compiling any op
"${pip[@]}" setuptools wheel ninja py-cpuinfo psutil numpy -c constraints.txt
DS_BUILD_OPS=0 "${pip[@]}" --no-build-isolation -c constraints.txt deepspeed
"${pip[@]}" --no-build-isolation -c constraints.txt -e '.[dev]'
