#!/usr/bin/env bash
# Guess: a worker whose trial was failed by another one (its heartbeat was late) is told so: study.optimize raises ValueError
#   "Cannot tell a FAIL trial.", or UpdateFinishedTrialError, which a worker can catch and go on.
# What happens: study.optimize ends with AssertionError("Should not reach."); the ValueError is only its __context__. catch=(Exception,)
#   does not hold it, for it is raised after the objective has returned.
# Seen: optuna 5.0.0, 2026-11-30, SQLite with heartbeat_interval.
# Why it matters: bit-width searches run for hours on shared storages; a server that restarts makes heartbeats late, and a worker that
#   expects the documented errors dies with a finished evaluation in hand.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q optuna==5.0.0
cd "$folder"; "$folder/venv/bin/python" - <<'PY'
import optuna
optuna.logging.set_verbosity(optuna.logging.ERROR)
storage = optuna.storages.RDBStorage("sqlite:///study.db", heartbeat_interval=60)
study = optuna.create_study(storage=storage)
def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    # What optuna.storages.fail_stale_trials does in another process when it has seen no heartbeat for the grace period.
    optuna.storages.RDBStorage("sqlite:///study.db").set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)
    return x
try:
    study.optimize(objective, n_trials=1, catch=(Exception,))
    found = "no error"
except BaseException as error:
    found = f"{type(error).__name__}: {error}; context {type(error.__context__).__name__}: {error.__context__}"
print("optuna", optuna.__version__)
print(found)
assert found == "AssertionError: Should not reach.; context ValueError: Cannot tell a FAIL trial.", found
PY
echo "as described"
