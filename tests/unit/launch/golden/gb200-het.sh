#!/bin/bash
# opd-big: written by `opd submit`. Roles and nodes are in /lustre/runs/big/slurm/roles.json.
#SBATCH --job-name=opd-big
#SBATCH --output=/lustre/runs/big/slurm/job.log
#SBATCH --open-mode=append
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --account=research
#SBATCH --partition=batch
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --segment=4
#SBATCH hetjob
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --account=research
#SBATCH --partition=batch
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --segment=2
#SBATCH hetjob
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --account=research
#SBATCH --partition=batch
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --segment=1

# Exit codes: 0 the run is done, 75 a retry helps, 78 something must change first.
set +vx -u
run=/lustre/runs/big
slurm_dir=$run/slurm
attempt='' attempt_dir='' stopping=
declare -A pid=() restarts=()

say() { printf 'opd: %s %s\n' "$(date -u +%H:%M:%S)" "$*"; }

# What a surrounding step would hand down to the steps that are started here.
unset SLURM_CPU_BIND SLURM_CPU_BIND_LIST SLURM_CPU_BIND_TYPE SLURM_CPU_BIND_VERBOSE SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_TASK

# ---------------------------------------------------------------- roles, from one table

role_0() { # controller: 1 node(s) from node 0, 0 device(s) each
    export CUDA_DEVICE_MAX_CONNECTIONS=32
    export NCCL_MNNVL_ENABLE=1
    export NCCL_NET_GDR_C2C=1
    export NCCL_NET_GDR_LEVEL=PHB
    export NCCL_NVLS_ENABLE=0
    exec srun --overlap --het-group=0 --nodes=1 --ntasks=1 --ntasks-per-node=1 --kill-on-bad-exit=1 --unbuffered --input=none --cpu-bind=none --mem=0 --mpi=none \
        /opt/opd/bin/python -m opd_megatron.launch.slurm.agent --run-dir /lustre/runs/big --role controller --attempt "$attempt"
}

role_1() { # learner: 4 node(s) from node 0, 4 device(s) each
    export CUDA_DEVICE_MAX_CONNECTIONS=32
    export NCCL_MNNVL_ENABLE=1
    export NCCL_NET_GDR_C2C=1
    export NCCL_NET_GDR_LEVEL=PHB
    export NCCL_NVLS_ENABLE=0
    exec srun --overlap --het-group=0 --nodes=4 --ntasks=4 --ntasks-per-node=1 --kill-on-bad-exit=1 --unbuffered --input=none --cpu-bind=none --mem=0 --gpus-per-node=4 --mpi=none --output="$run/logs/attempt_$attempt/learner/agent-%t.log" --open-mode=append \
        /opt/opd/bin/python -m opd_megatron.launch.slurm.agent --run-dir /lustre/runs/big --role learner --attempt "$attempt"
}

role_2() { # rollout: 2 node(s) from node 0, 4 device(s) each
    export CUDA_DEVICE_MAX_CONNECTIONS=32
    export NCCL_MNNVL_ENABLE=1
    export NCCL_NET_GDR_C2C=1
    export NCCL_NET_GDR_LEVEL=PHB
    export NCCL_NVLS_ENABLE=0
    exec srun --overlap --het-group=1 --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 --unbuffered --input=none --cpu-bind=none --mem=0 --gpus-per-node=4 --mpi=none --output="$run/logs/attempt_$attempt/rollout/agent-%t.log" --open-mode=append \
        /opt/opd/bin/python -m opd_megatron.launch.slurm.agent --run-dir /lustre/runs/big --role rollout --attempt "$attempt"
}

role_3() { # teacher-main: 1 node(s) from node 0, 4 device(s) each
    export CUDA_DEVICE_MAX_CONNECTIONS=32
    export NCCL_MNNVL_ENABLE=1
    export NCCL_NET_GDR_C2C=1
    export NCCL_NET_GDR_LEVEL=PHB
    export NCCL_NVLS_ENABLE=0
    exec srun --overlap --het-group=2 --nodes=1 --ntasks=1 --ntasks-per-node=1 --kill-on-bad-exit=1 --unbuffered --input=none --cpu-bind=none --mem=0 --gpus-per-node=4 --mpi=none --output="$run/logs/attempt_$attempt/teacher-main/agent-%t.log" --open-mode=append \
        /opt/opd/bin/python -m opd_megatron.launch.slurm.agent --run-dir /lustre/runs/big --role teacher-main --attempt "$attempt"
}

begin_attempt() {
    export CUDA_DEVICE_MAX_CONNECTIONS=32
    export NCCL_MNNVL_ENABLE=1
    export NCCL_NET_GDR_C2C=1
    export NCCL_NET_GDR_LEVEL=PHB
    export NCCL_NVLS_ENABLE=0
    exec srun --overlap --het-group=0 --nodes=1 --ntasks=1 --ntasks-per-node=1 --kill-on-bad-exit=1 --unbuffered --input=none --cpu-bind=none --mem=0 --mpi=none \
        /opt/opd/bin/python -m opd_megatron.launch.slurm.begin --run-dir /lustre/runs/big --job "$SLURM_JOB_ID"
}

# Every node makes a file of its own name. One that can not does not end the others. Returns 124 when one took too long.
call_nodes() {
    local step steps=() code=0 worst=0
    export CUDA_DEVICE_MAX_CONNECTIONS=32
    export NCCL_MNNVL_ENABLE=1
    export NCCL_NET_GDR_C2C=1
    export NCCL_NET_GDR_LEVEL=PHB
    export NCCL_NVLS_ENABLE=0
    timeout -k 30 900 srun --overlap --het-group=0 --nodes=4 --ntasks=4 --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 --input=none --cpu-bind=none --mem=0 --mpi=none \
        sh -c ': >"$0/$SLURMD_NODENAME"' "$arrived" &
    steps+=($!)
    timeout -k 30 900 srun --overlap --het-group=1 --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 --input=none --cpu-bind=none --mem=0 --mpi=none \
        sh -c ': >"$0/$SLURMD_NODENAME"' "$arrived" &
    steps+=($!)
    timeout -k 30 900 srun --overlap --het-group=2 --nodes=1 --ntasks=1 --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 --input=none --cpu-bind=none --mem=0 --mpi=none \
        sh -c ': >"$0/$SLURMD_NODENAME"' "$arrived" &
    steps+=($!)
    for step in "${steps[@]}"; do
        wait "$step"
        code=$?
        ((code <= worst || worst == 124)) || worst=$code
        ((code != 124)) || worst=124
    done
    return "$worst"
}

names=(controller learner rollout teacher-main)

# ---------------------------------------------------------------- the life of one attempt

# Waits so many seconds, open to signals. Slurm may end this script in the moment in which a sleep begins, and miss the
# sleep: so it is never a long one.
pause() {
    local second
    for ((second = 0; second < $1; ++second)); do
        sleep 1 &
        wait $!
    done
}

# A command of Slurm, tried for two minutes: its controller may be busy or start again.
ask() {
    local try
    for try in {1..8}; do
        "$@" && return
        say "$1 failed, try $try of 8" >&2
        ((try < 8)) && pause 15
    done
    return 1
}

# Is another job of ours alive? 0 yes, 1 no, 2 nobody can tell. All states are asked for, since a Slurm refuses the name
# of one that it does not know.
is_alive() {
    local known
    known=$(ask squeue -h -u "$(id -u)" -t all -o '%A %T') || return 2
    grep -qE "^$1 (RUNNING|COMPLETING|CONFIGURING|SUSPENDED|STOPPED|SIGNALING|STAGE_OUT|RESIZING)$" <<<"$known"
}

# One job at a time has the run directory.
check_owner() {
    local owner
    owner=$(cat "$slurm_dir/owner" 2>/dev/null)
    [[ -n $owner && $owner != "$SLURM_JOB_ID" ]] || return 0
    is_alive "$owner"
    case $? in
        0) say "job $owner is alive in $run"; exit 78 ;;
        2) say "Slurm can not say whether job $owner is alive in $run"; again ;;
    esac
}

start() { "role_$1" & pid[$1]=$!; }

request_stop() {
    stopping=$1
    [[ -z $attempt_dir ]] || printf '%s\n' "$1" >"$attempt_dir/stop_requested"
    say "$1: asked the controller to commit and end"
}

# Ends every process of the attempt; the agents go by the file, whatever is left is killed.
end_attempt() {
    [[ -e $attempt_dir/ended ]] || printf '%s\n' "$1" >"$attempt_dir/ended"
    local waited=0
    while [[ -n $(jobs -pr) ]] && ((waited++ < 60)); do sleep 0.5; done
    local left
    left=$(jobs -pr)
    [[ -z $left ]] || { kill -TERM $left; sleep 5; kill -KILL $(jobs -pr); } 2>/dev/null
    wait
}

# Waits until the attempt ends; its exit code is left in $code.
watch() {
    local i
    while :; do
        for i in "${!pid[@]}"; do
            kill -0 "${pid[$i]}" 2>/dev/null && continue
            wait "${pid[$i]}"
            code=$?
            if [[ ${names[$i]} == controller ]]; then
                return
            elif [[ -e $attempt_dir/finishing || -e $attempt_dir/ended ]]; then
                unset "pid[$i]"
            elif [[ ${names[$i]} != learner ]] && ((code != 78 && ${restarts[$i]:-0} < 0)); then
                restarts[$i]=$((${restarts[$i]:-0} + 1))
                say "${names[$i]} ended with code $code; restart ${restarts[$i]} of 0 in its place"
                start "$i"
            else
                say "${names[$i]} ended with code $code before the run was done"
                ((code == 78)) || code=75
                return
            fi
        done
        pause 1
    done
}

# Has every node start a step (in its container, if any) that writes into the run directory, before a role needs it. Nodes
# that can not, unless they are more than half, are left out from now on. Returns 1 when an attempt can not begin.
nodes_arrive() {
    local code try node total silent missing
    rm -rf "$arrived"
    mkdir -p "$arrived" || return
    say "every node is to start a step, within 900 s"
    # Once more, since a step that could not be made, or a node that failed, may have ended it for all.
    (call_nodes) >/dev/null
    code=$?
    ((code == 0 || code == 124)) || { (call_nodes) >/dev/null; code=$?; }
    ((code == 0)) && return
    # A shared file system may show files late.
    for try in {1..4}; do
        total=0 missing=0 silent=
        while read -r node; do
            ((++total))
            [[ -e $arrived/$node ]] || { ((++missing)); silent+=" $node"; }
        done < <(for node in "$SLURM_JOB_NODELIST_HET_GROUP_0" "$SLURM_JOB_NODELIST_HET_GROUP_1" "$SLURM_JOB_NODELIST_HET_GROUP_2"; do scontrol show hostnames "$node"; done)
        ((total && !missing)) && return 0
        sleep 3
    done
    # Not a node's fault when Slurm ended the call. Before a pre-emption with a GraceTime only steps get its signal.
    [[ -z $stopping && $(ask scontrol -o show job "$SLURM_JOB_ID") != *PreemptTime=[0-9]* ]] || again
    say "nothing starts on${silent:- any node}, or what starts there can not write into $slurm_dir"
    if ((total && 2 * missing <= total)); then
        say "left out from now on:$silent"
        printf '%s\n' $silent >>"$slurm_dir/bad_nodes"
        again
    fi
    return 1
}

# The run could not begin an attempt: another try, but not for ever.
begin_again() {
    local failures
    failures=$(($(cat "$slurm_dir/begin_failures" 2>/dev/null || echo 0) + 1))
    printf '%s\n' "$failures" >"$slurm_dir/begin_failures"
    ((failures < 3)) && again
    say "$failures attempts in a row could not begin; mend the cause, then opd resume $run"
    exit 78
}

# Ends this job so that the run goes on: with other nodes in a job of its own when some are bad, else requeued.
again() {
    local state bad successor
    # Of a heterogeneous job every component has a line; the first is the one whose id this is.
    state=$(ask scontrol -o show job "$SLURM_JOB_ID" | sed -n '1s/.*\(JobState=[A-Z]*\).*/\1/p')
    if [[ yes == yes && $state == JobState=RUNNING && ! -e $slurm_dir/cancelled ]]; then
        bad=$(sort -u "$slurm_dir/bad_nodes" 2>/dev/null | paste -sd,)
        if [[ -n $bad && $bad != "${OPD_EXCLUDED:-}" ]]; then
            successor=$(OPD_EXCLUDED=$bad sbatch --parsable --dependency="afterany:$SLURM_JOB_ID" --exclude="$bad" "$slurm_dir/job.sh") &&
                printf '%s\n' "${successor%%;*}" >>"$slurm_dir/jobs" && say "job ${successor%%;*} goes on without $bad" && exit 75
        fi
        say "asking Slurm to requeue"
        # Slurm ends this script here.
        trap 'exit 75' TERM USR1
        ask scontrol requeue "$SLURM_JOB_ID" && pause 300
    fi
    say "go on with: opd resume $run"
    exit 75
}

# ---------------------------------------------------------------- the job

cd "$run" || exit 78
[[ -e $run/DONE ]] && { say "the run is done"; exit 0; }
[[ -e $slurm_dir/cancelled ]] && { say "the run was cancelled; opd resume goes on with it"; exit 0; }
arrived=$slurm_dir/arrived/$SLURM_JOB_ID
check_owner
say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, nodes ${SLURM_JOB_NODELIST:-?}"
trap 'request_stop USR1' USR1
trap 'request_stop TERM' TERM
nodes_arrive || begin_again
check_owner # that may have taken a while
said=$(begin_attempt)
code=$?
# A prolog or a container may print too; the number stands alone on its line.
attempt=$(grep -xE '[0-9]+' <<<"$said" | tail -n 1)
((code == 0)) && [[ -z $attempt ]] && { say "no number of an attempt in: $said"; code=75; }
((code == 78)) && exit 78
((code == 0)) || begin_again
rm -f "$slurm_dir/begin_failures"
attempt_dir=$run/attempts/$attempt
[[ -z $stopping ]] || printf '%s\n' "$stopping" >"$attempt_dir/stop_requested"
say "attempt $attempt"
for i in "${!names[@]}"; do start "$i"; done
watch
end_attempt "$code"
say "attempt $attempt ended with code $code"
[[ -e $run/DONE ]] && { say "the run is done"; exit 0; }
((code == 78)) && exit 78
again
