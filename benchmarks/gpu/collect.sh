#!/usr/bin/env bash
# Collects the wheels that run.sh needs on a machine without a network, into a folder (default: wheels/).
#
#     bash benchmarks/gpu/collect.sh wheels
#
# PYTHON_VERSION is that of the machine with the GPU; torch, transformers and lightning have to be there already.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-wheels}
python3 -m pip download --quiet --no-deps --only-binary :all: --python-version "${PYTHON_VERSION:-3.12}" \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --dest "$folder" \
  -c constraints.txt bitsandbytes datasets dill docstring-parser execnet gguf hypothesis iniconfig jsonargparse \
  multiprocess peft pluggy pytest pytest-timeout pytest-xdist rich typeshed-client typing-extensions 'trl==1.13.0'
ls "$folder"
