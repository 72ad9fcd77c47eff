#!/bin/bash
# Flux. See docs/schedulers.md.
#
#   flux batch flux/batch.flux                               examples/digits.py
#   flux batch flux/batch.flux train.py --epochs 50          your script and its flags
#
# flux: --job-name=mpips
# flux: # --queue=cpu --bank=mine              # <-- 1. your site's; remove the second #
# flux: --time-limit=1h                        # <-- 2. a job that needs longer goes on by itself
# flux: --nodes=1 --exclusive
# flux: --output=mpips-{{id}}.out
# flux: --signal=SIGUSR1@120s                  # before the time limit

layout=${layout:-cpu}                          # <-- 3. cpu; gpu: a rank for each GPU, rank 0 trains, too; server: one rank more,
                                               #     rank 0, which serves on the CPU
# module load openmpi python                   # <-- 4. what gives your `python`; an active environment is inherited
job=$(flux job id --to=dec "$(flux getattr jobid)")
nodes=$(flux getattr size)
per_node=4                                     # <-- 5. ranks of a node: 1 server and 3 workers, or as many as GPUs
args=${args:-$(printf '%q ' "${@:-examples/digits.py}")}
run_dir=${run_dir:-runs/mpips-$job}            # a job that goes on finds its checkpoints here
eval "train=(python -u ${args:=examples/digits.py})"
train+=(--mpips.resume auto --mpips.run_dir "$run_dir")
[[ $layout == gpu ]] && train+=(--mpips.server_trains=true)
export run_dir args layout OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} # each rank's torch threads

# Open MPI needs pmi=pmix (from flux-pmix), MPICH pmi=simple, Cray's MPICH pmi=cray-pals. Affinity is off, as every rank needs all
# its cores, and all GPUs of its node within reach. A rank that is still there a minute after the first has ended is killed.
if [[ $layout == server ]]; then
  # shellcheck disable=SC2016 # for the rank's own shell
  train=(bash -c '[[ $FLUX_TASK_RANK != 0 ]] || export CUDA_VISIBLE_DEVICES=; exec "$@"' rank "${train[@]}")
fi
start() {
  flux run --nodes="$nodes" --tasks-per-node="$per_node" --exclusive -o pmi=pmix -o cpu-affinity=off -o gpu-affinity=off \
    -o exit-timeout=60s "${train[@]}" &
}
after() { read -rt "$1" <> <(:) || "${@:2}"; }  # no `sleep`, which would stay when the shell that waits is ended
pass_on() { flux job kill --signal=USR1 "$(flux job last)"; }
again() { flux --parent batch "$0"; }          # with run_dir and args from the environment

# ---- from here on all files of pbs/, lsf/ and flux/ are the same; tests/test_schedulers.py compares them ----
retries=3 timer=                               # so often the ranks start again when one was killed
# Preempted ranks write a checkpoint and exit with status 75. Should they not end, say for a hung disk, they are killed.
preempted() {
  [[ $timer ]] && return
  pass_on
  after 90 kill -KILL "$step" &
  timer=$!
}
trap preempted USR1 TERM
while start; step=$!; do
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done # the signal ends `wait`, not the step
  wait "$step"
  status=$?
  # From 129 to 192: a rank, or the step, was killed by a signal. Whatever ends by itself is left to its user.
  ((status > 128 && status < 193 && retries-- > 0)) && [[ ! $timer ]] || break
  echo "mpips: a rank was killed (status $status): the ranks start again from the newest checkpoint in $run_dir"
done
[[ $timer ]] && kill "$timer" 2>/dev/null
[[ ${alarm-} ]] && kill "$alarm" 2>/dev/null
# 75: the checkpoint is written. After the signal any other failure also means: unfinished, for example because it came
# before the script had connected. Either way the job goes on from its newest checkpoint.
if [[ $status == 75 || ($timer && $status != 0) ]]; then
  echo "mpips: job $job was preempted (status $status) and goes on later from $run_dir"
  again || echo "mpips: but it cannot submit itself again. To go on, submit it with the variable run_dir=$run_dir" >&2
  status=75
fi
exit "$status"
