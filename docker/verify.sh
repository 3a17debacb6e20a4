#!/usr/bin/env bash
# Builds the CPU image and checks it: its size and user, a completion, a chat, SIGTERM under load.
#
# Takes Docker if its daemon answers. Otherwise it needs root and Debian's packages buildah and
# debootstrap: the image is then built without a daemon, on a base that debootstrap makes.
# pip's own settings are passed on to the build: the index and other addresses, and with buildah
# also a folder of wheels and a certificate.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly IMAGE=memplus-verify MOST_MB=1400 PORT=${PORT:-8765}
readonly SERVE="memplus serve --model smollm2 --host 0.0.0.0 --port $PORT"
work=$(mktemp -d)
server=

main() {
    if docker info >"$work/docker.log" 2>&1; then tool=docker; else tool=buildah; fi
    echo "builds with $tool"
    trap clean EXIT
    build_$tool
    check "size: $(size_$tool) MB" test "$(size_$tool)" -lt "$MOST_MB"
    start_$tool
    wait_until_ready
    check "user: $(user_$tool)" test "$(user_$tool)" != 0
    ask v1/completions '{"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}'
    ask v1/chat/completions '{"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}'
    terminate_under_load
    echo "the image works"
}

terminate_under_load() {
    python3 docker/verify_load.py "http://127.0.0.1:$PORT" >"$work/load" &
    local load=$!
    until grep -q started "$work/load"; do sleep 0.1; done
    stop_$tool
    check "every stream ended with a result or an error event" wait "$load"
    tail -1 "$work/load"
    local status=0
    wait_$tool || status=$?
    check "exit status after SIGTERM: $status" test "$status" = 0
}

# prints a line, and ends the script if a command fails
check() {
    local line=$1
    shift
    if ! "$@"; then
        echo "FAILED: $line" >&2
        cat "$work/server.log" >&2 2>/dev/null || true
        exit 1
    fi
    echo "ok: $line"
}

wait_until_ready() {
    local tries=0
    until curl --silent --fail "http://127.0.0.1:$PORT/ready" >"$work/ready"; do
        tries=$((tries + 1))
        check "starts within 5 minutes" test "$tries" -lt 300
        sleep 1
    done
}

ask() {
    check "POST /$1" curl --silent --show-error --fail "http://127.0.0.1:$PORT/$1" \
        --header "Content-Type: application/json" --data "$2" --output "$work/answer"
    cat "$work/answer"
    echo
}

pip_setting() {
    local name=$1 variable=PIP_${1^^}
    variable=${variable//-/_}
    echo "${!variable:-$(python3 -m pip config get "global.$name" 2>/dev/null || true)}"
}

build_docker() {
    local arguments=() name value
    for name in index-url extra-index-url find-links; do
        value=$(pip_setting $name)
        # a daemon cannot read this machine's folders, nor its certificates
        case $value in http*) arguments+=(--build-arg "PIP_$(tr a-z- A-Z_ <<<$name)=$value") ;; esac
    done
    docker build --file docker/Dockerfile --tag $IMAGE "${arguments[@]}" .
}

size_docker() { echo $(($(docker image inspect --format '{{.Size}}' $IMAGE) / 1000000)); }
start_docker() { server=$(docker run --detach --publish "127.0.0.1:$PORT:$PORT" $IMAGE $SERVE); }
user_docker() { docker exec "$server" id -u; }
stop_docker() { docker stop --time 10 "$server" >"$work/stop"; }
wait_docker() { return "$(docker wait "$server")"; }
clean_docker() { if [ -n "$server" ]; then docker rm --force "$server" >"$work/rm"; fi; }

build_buildah() {
    export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
    local base=docker.io/library/debian:bookworm-slim from_scratch
    if ! buildah inspect --type image $base >"$work/inspect" 2>&1; then
        debootstrap --variant=minbase bookworm "$work/root" \
            "$(apt-get indextargets --format '$(SITE)' | head -1)" >"$work/debootstrap.log"
        # apt's sources and settings of this machine
        rm "$work/root/etc/apt/sources.list"
        cp -r /etc/apt/sources.list* /etc/apt/apt.conf.d "$work/root/etc/apt/"
        from_scratch=$(buildah from scratch)
        buildah copy --quiet "$from_scratch" "$work/root" / >"$work/copy"
        buildah commit --quiet "$from_scratch" $base >"$work/commit"
        buildah rm "$from_scratch" >"$work/rm"
        rm -r "$work/root"
    fi
    local arguments=(--build-arg "PIP_INDEX_URL=$(pip_setting index-url)") value
    value=$(pip_setting find-links)
    case $value in
    /*) arguments+=(--volume "$value:/wheels:ro" --build-arg PIP_FIND_LINKS=/wheels) ;;
    ?*) arguments+=(--build-arg "PIP_FIND_LINKS=$value") ;;
    esac
    value=$(pip_setting cert)
    case $value in
    ?*) arguments+=(--volume "$value:/pip.pem:ro" --build-arg PIP_CERT=/pip.pem) ;;
    esac
    value=$(pip_setting extra-index-url)
    case $value in http*) arguments+=(--build-arg "PIP_EXTRA_INDEX_URL=$value") ;; esac
    buildah build --pull-never --layers --file docker/Dockerfile --tag $IMAGE "${arguments[@]}" .
    container=$(buildah from --pull-never $IMAGE)
}

size_buildah() { du --summarize --block-size=1MB "$(buildah mount "$container")" | cut -f1; }

start_buildah() {
    # shellcheck disable=SC2086  # the command's words
    buildah run "$container" -- $SERVE >"$work/server.log" 2>&1 &
    server=$!
}

user_buildah() { stat --format %u "/proc/$(server_pid)"; }
stop_buildah() { kill -TERM "$(server_pid)"; }
wait_buildah() { wait "$server"; }
server_pid() { pgrep --oldest --full "python3? .*memplus serve .*--port $PORT" || true; }

clean_buildah() {
    if [ -n "${container:-}" ]; then
        if [ -n "$(server_pid)" ]; then kill -KILL "$(server_pid)"; fi
        buildah rm "$container" >"$work/rm"
    fi
}

clean() {
    clean_$tool
    rm -rf "$work"
}

main
