#!/usr/bin/env bash
# Several Ray nodes on this machine, with declared GPUs and token authentication: to try on a laptop what a cluster will do.
#
#   cluster/local_nodes.sh start [NODES=2] [GPUS_PER_NODE=1]      then: rlhf-ray submit JOB.yaml --address http://127.0.0.1:8265
#   cluster/local_nodes.sh stop                                   ends what `start` started, and nothing else
#
# Tested: two-core CPU machine, Ray 2.60 (declared GPUs are numbers: nothing runs on them, but placement is real).
# The environment of this shell, with `ray` in PATH, is that of the nodes. Settings: RLHF_RAY_CLUSTER (folder, its path short: Ray
# puts sockets there), PORT (6379), DASHBOARD_PORT (8265), AGENT_PORT (52365 and the next ones, a node each: jobs are started through
# these), CPUS (per node; default 4: threads, not cores, are what is limited). No port may lie between 10002 and 19999.
set -euo pipefail

folder=${RLHF_RAY_CLUSTER:-/tmp/rlhf-ray-cluster-$(id -u)}
port=${PORT:-6379}
dashboard=${DASHBOARD_PORT:-8265}
agent=${AGENT_PORT:-52365}
cpus=${CPUS:-4}

stop() {
    [ -d "$folder/pids" ] || return 0
    for file in "$folder"/pids/*; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        # `ray start --block` is its own session: the group is the node. Is it still the process that was started?
        if [ "$(ps -o sid= -p "$pid" 2>/dev/null | tr -d ' ')" = "$pid" ]; then
            kill -TERM "$pid" 2>/dev/null || true
            for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
            kill -KILL -- "-$pid" 2>/dev/null || true
        fi
        rm -f "$file"
    done
    echo "stopped" >&2
}

start() {
    nodes=${1:-2} gpus=${2:-1}
    if ls "$folder"/pids/* >/dev/null 2>&1; then
        echo "error: $folder: a cluster runs already; fix: $0 stop" >&2
        exit 2
    fi
    umask 077
    mkdir -p "$folder/pids"
    if [ ! -s "$folder/token" ]; then
        od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$folder/token"
    fi
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token" RAY_worker_niceness=0
    export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=rlhf_ray.serve.admission.middlewares RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=1 RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS=1
    unset RAY_ADDRESS
    trap 'stop' ERR INT TERM
    launch head ray start --head --block --disable-usage-stats --temp-dir "$folder/ray" --port "$port" \
        --node-ip-address 127.0.0.1 --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" --num-cpus "$cpus" --num-gpus "$gpus" \
        --dashboard-agent-listen-port "$agent"
    for _ in $(seq 120); do
        answer=$(curl -s -o /dev/null -w '%{http_code}' "http://127.0.0.1:$dashboard/api/jobs/" || true)
        [ "$answer" = 401 ] && break
        sleep 0.5
    done
    [ "$answer" = 401 ] || { echo "error: the head did not come up: $(tail -n 1 "$folder/head.log"); see $folder/head.log" >&2; stop; exit 3; }
    for number in $(seq 2 "$nodes"); do
        # A folder of its own: in a shared one two nodes choose the same names for their sockets, and each of them unpacks a job anew,
        # which takes the working folder from under a driver that runs in it.
        launch "node$number" ray start --block --disable-usage-stats --address "127.0.0.1:$port" --temp-dir "$folder/ray$number" \
            --node-ip-address 127.0.0.1 --num-cpus "$cpus" --num-gpus "$gpus" --labels "rlhf-ray/node=$number" \
            --dashboard-agent-listen-port $((agent + number - 1))
    done
    for number in $(seq 2 "$nodes"); do
        log="$folder/node$number.log"
        for _ in $(seq 120); do grep -q "Ray runtime started" "$log" && break; sleep 0.5; done
        grep -q "Ray runtime started" "$log" || { echo "error: node $number did not come up: $(tail -n 1 "$log"); see $log" >&2; stop; exit 3; }
    done
    cat >&2 <<TOLD
$nodes nodes of $cpus CPUs and $gpus declared GPUs
  export RAY_AUTH_TOKEN_PATH=$folder/token
  rlhf-ray doctor --address http://127.0.0.1:$dashboard
  rlhf-ray submit JOB.yaml --address http://127.0.0.1:$dashboard
  $0 stop
TOLD
}

launch() {
    name=$1
    shift
    setsid "$@" >"$folder/$name.log" 2>&1 </dev/null &
    echo $! >"$folder/pids/$name"
}

case "${1:-}" in
    start) shift; start "$@" ;;
    stop) stop ;;
    *) sed -n '2,10p' "$0" >&2; exit 2 ;;
esac
