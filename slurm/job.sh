# Sourced by the sbatch files. run SCRIPT [args]: as many ranks as the job has tasks, and the job again if time runs out.
set -euo pipefail
source slurm/site.env
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer takes it from the job by itself

run() {
    local code=0 stop=0 step id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    id=${id:-$SLURM_JOB_ID} # the last task of an array has the id of the whole as its own
    # USR1 must not end a rank that is still starting; it is sent until they leave.
    srun --kill-on-bad-exit=1 --wait=0 bash -c 'trap "" USR1; exec "$@"' - "$PYTHON" "$@" &
    step=$!
    trap 'stop=1' USR1 TERM # srun hands USR1 on to the ranks, which save; at a TERM it would kill them
    while kill -0 "$step" 2>/dev/null; do
        if ((stop)); then
            kill -USR1 "$step" || true
            sleep 3
        else
            wait "$step" || true # until it ends, or a signal comes
        fi
    done
    wait "$step" || code=$?
    if ((code == 75)); then # saved, not finished
        trap '' USR1 TERM
        if [[ $(scontrol show job -o "$id") =~ JobState=(CANCELLED|COMPLETING|PREEMPTED|TIMEOUT|PENDING) ]]; then
            echo "job $id was ended from outside and is not requeued by itself"
        elif ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
            echo "error: job $id was requeued $SLURM_RESTART_COUNT times: ask for more time, then submit it again" >&2
            exit 1
        else
            echo "job $id is requeued and goes on from there"
            # last of all: from here on Slurm ends this script
            scontrol requeue "$id" || echo "error: job $id could not be requeued: submit it again, it goes on" >&2
        fi
    fi
    exit "$code"
}
