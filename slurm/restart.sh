# shellcheck shell=bash
# Sourced by the batch scripts. 'restartable COMMAND...' runs a command that continues where it was, and requeues this
# job where Slurm does not do so by itself. Exit codes: 0 done; 2 what only its user mends (input, a start on a full disk);
# 75 stopped after saving, start me again; anything else (a save that failed, too) is a failure, which a restart may mend.

# Of a job array, this member alone: one of them has the number of the whole array as its SLURM_JOB_ID.
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
job="${job:-$SLURM_JOB_ID}"
# Written after an unclean end: what srun returned and what Slurm said. The next start reads it and puts it into run.json.
export NANODIST_END_NOTE="$SLURM_SUBMIT_DIR/nanodist-$job.end"

restartable() {
    local code=0 reason='' log old ended=no
    log=$(scontrol show job "$job" | sed -n 's/^ *StdErr=//p' || true)
    old=$(stat --format=%s "$log" 2> /dev/null || echo 0)
    # SIGTERM reaches this shell only where the whole job is ended: by scancel, its time limit, a node's death, or Slurm
    # requeueing it. Signals that ask to save (--signal, the grace time of a preemption) reach the ranks alone.
    trap 'ended=yes' TERM
    # In the background, since bash would see to the signal only after a command in the foreground.
    "$@" &
    wait $! || code=$?
    if [ "$ended" = yes ]; then
        reason=$(squeue --noheader --jobs="$job" --format=%r || true)
        # At once: this shell is killed together with the ranks, KillWait seconds after the limit.
        if [ "$reason" = TimeLimit ]; then
            note 143
            start_again "reached its time limit"
        fi
        code=0
        wait $! || code=$?
    fi
    if [ "$code" -eq 0 ]; then
        rm -f "$NANODIST_END_NOTE"
        return 0
    fi
    note "$code"
    # srun returns the highest code, which may be that of a rank which it killed after the one with the wrong input.
    if [ "$code" -ne 75 ] && grep --quiet 'Exited with exit code 2$' "$NANODIST_END_NOTE"; then code=2; fi
    if [ "$code" -eq 2 ]; then
        echo "nanodist: exit 2, which no restart mends (the reason stands above); the job is not started again" >&2
    elif [ "$ended" = no ]; then
        start_again "ended with $code"
    elif [ "$reason" != TimeLimit ]; then
        echo "nanodist: the job was ended from outside; Slurm starts it again by itself unless it was cancelled" >&2
    fi
    exit "$code"
}

# Uses the variables of restartable.
note() {
    {
        printf 'restarts=%s\nexit=%s\nended=%s\nreason=%s\n' "${SLURM_RESTART_COUNT:-0}" "$1" "$ended" "$reason"
        tail --bytes="+$((old + 1))" "$log" 2> /dev/null | grep --text -E '^(srun|slurmstepd)[^ ]*: ' | tail --lines=40
    } > "$NANODIST_END_NOTE" || true
}

start_again() {
    local restarts=${SLURM_RESTART_COUNT:-0}
    if [ "$restarts" -ge "$NANODIST_MAX_RESTARTS" ]; then
        echo "nanodist: the job $1 after $restarts restarts (NANODIST_MAX_RESTARTS); giving up" >&2
    else
        echo "nanodist: the job $1; requeueing it (restart $((restarts + 1)))" >&2
        scontrol requeue "$job" || echo "nanodist: Slurm refused to requeue the job" >&2
    fi
}
