#!/bin/sh
# A sweep on a cluster. Each worker is a job of its own; the study lives in a database.
#
#   pip install "lq_plugin[demo,postgresql]" hydra-submitit-launcher
#   STORAGE=postgresql+psycopg2://lq:secret@db.example.org/lq WORKERS=8 examples/sweep_cluster.sh
#   examples/sweep_cluster.sh search.n_trials=1000      # go on: the same study, more trials
#   lq-report "$STORAGE" --study cluster                # at any time, from anywhere
#
# Without STORAGE and with LAUNCHER=joblib it runs on this machine, on a SQLite file.
set -eu
last=$((${WORKERS:-8} - 1))
exec lq-search --config-dir "$(dirname "$0")/cluster" --config-name cluster --multirun \
  "worker=$(seq -s, 0 $last)" hydra/launcher="${LAUNCHER:-slurm}" "$@"
