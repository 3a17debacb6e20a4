#!/usr/bin/env bash
# Builds the CPU image and checks it: size, user, completion, chat, health check, SIGTERM under load.
#
# Takes Docker if its daemon answers. Otherwise it needs root and Debian's packages buildah and
# debootstrap: the image is then built without a daemon, on a base that debootstrap makes.
# pip's own settings apply inside the build: indexes, folders of wheels and the certificate. Docker's
# daemon cannot read the files of this machine, so the script names those that it leaves out.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly IMAGE=memplus-verify MOST_MB=1400 START_S=300 PORT=${PORT:-8765}
readonly SERVE=(memplus serve --model smollm2 --host 0.0.0.0 --port "$PORT")
work=$(mktemp -d)
server=
container=

main() {
    if docker info >"$work/docker.log" 2>&1; then tool=docker; else tool=buildah; fi
    trap clean EXIT
    echo "builds with $tool"
    build_arguments=()
    for name in index-url extra-index-url find-links cert; do pass_pip_setting $name; done
    build_$tool
    local size
    size=$(size_$tool)
    check "size: $size MB" test "$size" -lt "$MOST_MB"
    start_$tool
    wait_until_ready
    check "user: $(user_$tool)" test "$(user_$tool)" != 0
    ask v1/completions '{"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}'
    ask v1/chat/completions '{"messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 8, "temperature": 0}'
    check_health
    terminate_under_load
    echo "the image works"
}

terminate_under_load() {
    python3 docker/verify_load.py "http://127.0.0.1:$PORT" >"$work/load" &
    local load=$! status=0
    until grep -q --no-messages started "$work/load"; do
        kill -0 "$load" || fail "the load does not start"
        sleep 0.1
    done
    stop_$tool
    wait "$load" || fail "streams were lost: $(tail -1 "$work/load")"
    echo "ok: every stream ends with a result or an error event: $(tail -1 "$work/load")"
    wait_$tool || status=$?
    check "exit status after SIGTERM: $status" test "$status" = 0
}

# prints a line, and ends the script if a command fails
check() {
    local line=$1
    shift
    "$@" || fail "$line"
    echo "ok: $line"
}

fail() {
    echo "FAILED: $1" >&2
    if [ -n "$server" ]; then
        echo "the server's log:" >&2
        log_$tool >&2
    fi
    exit 1
}

wait_until_ready() {
    local begin=$SECONDS
    until curl --silent --fail "http://127.0.0.1:$PORT/ready" >"$work/ready"; do
        is_running_$tool || fail "the server ended before it was ready"
        test $((SECONDS - begin)) -lt $START_S || fail "the server is not ready after $START_S s"
        sleep 1
    done
    echo "ok: ready after $((SECONDS - begin)) s"
}

ask() {
    check "POST /$1" curl --silent --show-error --fail "http://127.0.0.1:$PORT/$1" \
        --header "Content-Type: application/json" --data "$2" --output "$work/answer"
    cat "$work/answer"
    echo
}

# the health check of the image, on this server's port
check_health() {
    local command
    mapfile -t command < <(health_$tool '{{range .Test}}{{println .}}{{end}}' |
        sed -e 1d -e '/^$/d' -e "s/:8000/:$PORT/")
    check "health check: ${command[*]}" run_$tool "${command[@]}"
}

# adds a setting of pip to the arguments of the build, if it is set
pass_pip_setting() {
    local variable=PIP_${1^^} passed=() word
    variable=${variable//-/_}
    for word in ${!variable:-$(python3 -m pip config get "global.$1" 2>/dev/null || true)}; do
        case $word in
        file:/* | /*) share_$tool "$1" "$word" ;;
        *) passed+=("$word") ;;
        esac
    done
    if [ ${#passed[@]} != 0 ]; then build_arguments+=(--build-arg "$variable=${passed[*]}"); fi
}

share_docker() { echo "not passed to Docker's daemon: $1 $2"; }

build_docker() {
    docker build --file docker/Dockerfile --tag $IMAGE "${build_arguments[@]}" .
}

size_docker() { echo $(($(docker image inspect --format '{{.Size}}' $IMAGE) / 1000000)); }
start_docker() {
    server=$(docker run --detach --publish "127.0.0.1:$PORT:$PORT" $IMAGE "${SERVE[@]}")
}
is_running_docker() { [ "$(docker inspect --format '{{.State.Running}}' "$server")" = true ]; }
log_docker() { docker logs "$server"; }
user_docker() { docker exec "$server" id -u; }
health_docker() { docker image inspect --format "{{with .Config.Healthcheck}}$1{{end}}" $IMAGE; }
run_docker() { docker exec "$server" "$@"; }
stop_docker() { docker stop -t 10 "$server" >"$work/stop"; }
wait_docker() { return "$(docker wait "$server")"; }
clean_docker() { if [ -n "$server" ]; then docker rm --force "$server" >"$work/rm"; fi; }

# a bind mount; for an index its parent folder, because its pages link to files outside it
share_buildah() {
    local path=${2#file://} folder volume
    folder=$path
    case $1 in *index-url) folder=$(dirname "$path") ;; esac
    volume=$folder:/pip$folder:ro
    case " ${build_arguments[*]} " in
    *" $volume "*) ;;
    *) build_arguments+=(--volume "$volume") ;;
    esac
    passed+=("${2%"$path"}/pip$path")
}

build_buildah() {
    # Docker's format, because the OCI format has no health check
    export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot BUILDAH_FORMAT=docker
    local base=docker.io/library/debian:bookworm-slim
    if ! buildah inspect --type image $base >"$work/inspect" 2>&1; then make_base $base; fi
    repeat "$work/build.log" buildah build --pull-never --layers --file docker/Dockerfile \
        --tag $IMAGE "${build_arguments[@]}" .
    # this machine's limits of open files; buildah's own, 1024, is less than the server needs
    container=$(buildah from --pull-never --ulimit "nofile=$(ulimit -Sn):$(ulimit -Hn)" $IMAGE)
}

make_base() {
    # shellcheck disable=SC2016  # apt's format
    debootstrap --variant=minbase bookworm "$work/root" \
        "$(apt-get indextargets --format '$(SITE)' | head -1)" >"$work/debootstrap.log"
    # apt's sources and settings of this machine
    rm "$work/root/etc/apt/sources.list"
    cp -r /etc/apt/sources.list* /etc/apt/apt.conf.d "$work/root/etc/apt/"
    local from_scratch
    from_scratch=$(buildah from scratch)
    buildah copy --quiet "$from_scratch" "$work/root" / >"$work/copy"
    buildah commit --quiet "$from_scratch" "$1" >"$work/commit"
    buildah rm "$from_scratch" >"$work/rm"
    rm -r "$work/root"
}

# runs a command of buildah with its output in a log, again if it failed to seal the copy of itself
# that it runs: a transient EBUSY of some kernels
repeat() {
    local log=$1 status
    shift
    for _ in 1 2 3; do
        status=0
        "$@" 2>&1 | tee "$log" || status=$?
        if [ $status = 0 ] || ! grep -q "sealing memfd copy" "$log"; then break; fi
    done
    return $status
}

size_buildah() { du --summarize --block-size=1MB "$(buildah mount "$container")" | cut -f1; }

start_buildah() {
    repeat "$work/server.log" buildah run "$container" -- "${SERVE[@]}" >/dev/null &
    server=$!
}

is_running_buildah() { kill -0 "$server" 2>/dev/null; }
log_buildah() { cat "$work/server.log"; }
user_buildah() { stat --format %u "/proc/$(server_pid)"; }
health_buildah() {
    buildah inspect --type image --format "{{with .Docker.Config.Healthcheck}}$1{{end}}" $IMAGE
}
run_buildah() { repeat "$work/run.log" buildah run "$container" -- "$@"; }
stop_buildah() { kill -TERM "$(server_pid)"; }
wait_buildah() { wait "$server"; }
server_pid() { pgrep --full "^/opt/memplus/bin/python3? /opt/memplus/bin/memplus serve .* $PORT\$"; }

clean_buildah() {
    local pid
    if pid=$(server_pid); then kill -KILL "$pid"; fi
    if [ -n "$server" ]; then wait "$server" || true; fi
    if [ -n "$container" ]; then buildah rm "$container" >"$work/rm"; fi
}

clean() {
    clean_$tool
    rm -rf "$work"
}

main
