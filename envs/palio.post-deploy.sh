#!/usr/bin/env bash
# Run by Snakemake in the repository's root after it has made the environment of palio.yaml.
set -euo pipefail
pip install --no-deps --requirement envs/lock.txt
pip install --no-deps --editable .
