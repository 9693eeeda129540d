# What the scripts of launch/ have in common: one part of one stage, in a Slurm job.
#
#   bash launch/stage.sh prepare|train|score <stage or recipe file>
#
# Exit status of the part: 0 done, 2 a user's mistake, 75 saved before the end. After 75 the job is
# queued again; after any other failure too, a bounded number of times, without the node that failed.
# shellcheck shell=bash
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit "${2:-2}"
}

part=$1
[[ $# -eq 2 ]] || fail "give one stage or recipe file: sbatch launch/<script>.slurm pretrain-stage1"
stage=$2
cd "$SLURM_SUBMIT_DIR" # Slurm runs a copy of the script
# shellcheck source=/dev/null
[[ ! -f launch/site.sh ]] || source launch/site.sh
python=${VENV:-.venv}/bin/python
[[ -x $python ]] || fail "$python: no such program; 'make install' makes it, VENV= names another"

export SCALE=${SCALE:-full} PYTHONPATH=$PWD
start=${SLURM_RESTART_COUNT:-0}
# FORCE=1 sets the old run aside at the first start, not again at each requeue.
[[ $start -eq 0 ]] || unset FORCE
# Slurm has these GPUs as `8` or `h100:8`. SLURM_GPUS_ON_NODE counts those of an exclusive node that
# nobody asked for as well.
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
export GPUS_A_NODE=${gpus##*:}
# A layout that is fitted is fitted to the job's GPUs, not to those of its first node.
[[ $part != train || $GPUS_A_NODE -eq 0 ]] || export GPUS=${GPUS:-$((SLURM_NNODES * GPUS_A_NODE))}

folder=$("$python" -m launch folder "$stage")
# The stage takes its lock itself, without waiting; a dead node's lock outlives the node a little.
lock=${folder%/*}/.${folder##*/}.lock
[[ ! -e $lock ]] || flock --wait 120 "$lock" true ||
  fail "$folder: another process is running this stage; wait for it, or end it"
log_begin=$(stat --format=%s "$folder/log.txt" 2>/dev/null || echo 0)

# Keeps the job, which is queued, off nodes: Slurm changes the excluded nodes of a queued job alone.
leave_out() {
  local excluded
  excluded=$(scontrol show job "$SLURM_JOB_ID" --oneliner | sed 's/.* ExcNodeList=\([^ ]*\) .*/\1/')
  [[ $excluded != "(null)" ]] || excluded=
  [[ $# -eq 0 ]] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(IFS=, && echo "${excluded:+$excluded,}$*")"
}

# Queues the job again; $1 says why, the rest are nodes to do without.
queue_again() {
  local why=$1
  shift
  trap '' TERM # for the commands below too: Slurm ends a queued job's script by SIGTERM, then SIGKILL
  scontrol requeue "$SLURM_JOB_ID"
  leave_out "$@"
  echo "$stage: $why, queued again${1:+ without $*}"
  exit "$status"
}

# At SIGTERM, or where the part ends just before it: somebody cancelled the job, or Slurm lost a node
# and has queued the job again. A node that comes back is not to be used. There is no time to wait for
# the part, since srun waits for the node.
ended() {
  trap '' TERM
  kill -TERM "$child" 2>/dev/null || true
  [[ -z ${lost:-} ]] || return 0
  mapfile -t lost < <(sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --states=down --format=%N)
  [[ -n ${lost:-} ]] && leave_out "${lost[@]}" || return 0 # the state is COMPLETING in either case
  echo "$stage: lost a node, queued again without ${lost[*]}"
}

# Nodes of the job that cannot run a command, or whose GPUs do not answer.
dead_nodes() {
  export CHECK_NODE=${CHECK_NODE:-'! command -v nvidia-smi || nvidia-smi'}
  # shellcheck disable=SC2016
  scontrol show hostnames "$SLURM_JOB_NODELIST" | xargs -P 64 -I{} bash -c '
    timeout --kill-after=5 60 srun --overlap --nodes=1 --ntasks=1 --nodelist={} bash -c "$CHECK_NODE" \
      >/dev/null 2>&1 </dev/null || echo {}'
}

# In the background: bash runs a trap only once the foreground command is over.
"$python" -m launch run "$stage" --part "$part" &
child=$!
trap 'kill -USR1 "$child" 2>/dev/null || true' USR1
trap ended TERM
while wait "$child" || true; kill -0 "$child" 2>/dev/null; do :; done
status=0
wait "$child" || status=$?

[[ $status -ne 0 && $status -ne 2 ]] || exit "$status"
if [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) != RUNNING ]]; then
  ended
  exit "$status"
fi
# 138: USR1 before anything was to be saved
[[ $status -ne 75 && $status -ne 138 ]] || queue_again "saved before its end"

# A line for each failure: the checkpoint that the job stood at. One that gets on may go on failing.
failures=slurm-$SLURM_JOB_NAME-$SLURM_JOB_ID.failures
at=$(find "$folder/checkpoints" -maxdepth 1 -name '*[0-9]' -printf '%f\n' 2>/dev/null | sort -V | tail -n 1) || true
echo "${at:-none}" >>"$failures"
count=$(grep -cx "${at:-none}" "$failures")
[[ $count -le ${MAX_RESTARTS:-3} ]] ||
  fail "$stage: failed $count times at checkpoint ${at:-none}, MAX_RESTARTS=${MAX_RESTARTS:-3}" "$status"
mapfile -t bad < <(dead_nodes)
if [[ ${#bad[@]} -eq 0 ]]; then # all answer: the node whose task was the first to fail
  mapfile -t bad < <(tail -c +$((log_begin + 1)) "$folder/log.txt" 2>/dev/null |
    sed -n 's/.*srun: error: \([^: ]*\): task.*/\1/p' | head -n 1)
fi
queue_again "failed with status $status at checkpoint ${at:-none}" "${bad[@]}"
