#!/usr/bin/env bash
# docker/verify.sh [cpu|cuda] builds an image and checks it: size, user, answers, health check, rows
# from disk, SIGTERM under load. The containers have no network, no capabilities, a read-only root file
# system, and the profile docker/seccomp.json.
#
# No container gets a GPU. The CUDA image answers on the CPU; the script also checks that it compiles
# kernels, and that it refuses --device cuda. Its build needs 25 GB of disk.
#
# Takes Docker if its daemon answers. Otherwise it needs root and Debian's packages podman, runc and
# debootstrap: it then builds the image without a daemon, on a base that debootstrap makes.
# pip's settings apply inside the build: indexes, folders of wheels and the certificate. The CUDA image
# gets no extra indexes and folders, because they may have the CPU build of torch. Docker's daemon
# cannot read the files of this machine, so the script names those that it leaves out.
#
# Without systemd, podman logs errors about timers of health checks; the script runs the check itself.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly START_S=300 PORT=8765
readonly HEALTH_S=60 # Docker checks every 30 s
server=

main() {
    case ${1:-cpu} in
    cpu) file=Dockerfile most_mb=1400 settings="index-url extra-index-url find-links cert" ;;
    cuda) file=Dockerfile.cuda most_mb=5600 settings="index-url cert" ;;
    *) echo "usage: docker/verify.sh [cpu|cuda]" >&2 && exit 2 ;;
    esac
    readonly IMAGE=memplus-verify-${1:-cpu} VOLUME=memplus-verify-cache
    work=$(mktemp -d)
    if docker info >"$work/info" 2>&1; then tool=docker; else tool=podman; fi
    trap clean EXIT
    echo "builds docker/$file with $tool"
    build_arguments=()
    for name in $settings; do pass_pip_setting $name; done
    build_$tool
    local size
    size=$(($(call image inspect --format '{{.Size}}' $IMAGE) / 1000000))
    check "size: $size MB" test "$size" -lt "$most_mb"
    if [ $file = Dockerfile.cuda ]; then check_cuda; fi
    read_rows docker/seccomp.json >"$work/ring"
    check "io_uring reads rows" lacks "no io_uring" "$work/log"
    python3 -c "$WITHOUT_IO_URING" <docker/seccomp.json >"$work/seccomp.json"
    read_rows "$work/seccomp.json" >"$work/threads"
    check "threads read rows without io_uring" grep --quiet "no io_uring" "$work/log"
    check "the answers are the same" cmp "$work/ring" "$work/threads"
    server=$(start docker/seccomp.json --detach --env MEMPLUS_MODEL=smollm2 \
        --env MEMPLUS_PORT=$PORT --env MEMPLUS_DEVICE=cpu $IMAGE)
    wait_until_ready
    local user
    user=$(call exec "$server" id -u)
    check "user: $user" test "$user" != 0
    ask v1/completions '{"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}'
    ask v1/chat/completions '{"messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 8, "temperature": 0}'
    check "health check" healthy_$tool
    terminate_under_load
    echo "the image works"
}

# podman's default runtime, crun, refuses machines with both versions of cgroups
call() { if [ $tool = docker ]; then docker "$@"; else podman --runtime runc "$@"; fi; }

# start PROFILE ARGUMENTS
start() {
    call run --read-only --tmpfs /tmp --network none --cap-drop ALL \
        --security-opt no-new-privileges --security-opt "seccomp=$1" \
        --ulimit nofile=8192:8192 --ulimit nproc=8192:8192 \
        --env NVIDIA_VISIBLE_DEVICES=void --volume $VOLUME:/home/memplus/.cache "${@:2}"
}

check_cuda() {
    start docker/seccomp.json --rm --entrypoint python3 $IMAGE -c '
import torch, triton
assert torch.version.cuda
print(f"torch {torch.__version__} for CUDA {torch.version.cuda}, Triton {triton.__version__}")
' >"$work/versions" || fail "import torch, triton"
    echo "ok: $(cat "$work/versions")"
    # Triton reads the source of kernels, so that it has to be a file
    start docker/seccomp.json --rm --interactive --entrypoint sh $IMAGE -c \
        'cat >/tmp/kernel.py && exec python3 /tmp/kernel.py' <docker/verify_kernel.py >"$work/kernel" ||
        fail "compile a kernel"
    echo "ok: compiles kernels: $(cat "$work/kernel")"
    local status=0
    start docker/seccomp.json --rm $IMAGE serve >"$work/serve" 2>&1 || status=$?
    check "exit status without a GPU: $status" test $status = 2
    check "$(tail -1 "$work/serve")" grep --quiet "torch finds no GPU; use --device cpu" "$work/serve"
}

readonly WITHOUT_IO_URING='
import json, sys
profile = json.load(sys.stdin)
for rule in profile["syscalls"]:
    rule["names"] = [name for name in rule["names"] if not name.startswith("io_uring")]
profile["syscalls"] = [rule for rule in profile["syscalls"] if rule["names"]]
json.dump(profile, sys.stdout)'

# prints an answer of the default model, whose rows stay on disk
read_rows() {
    start "$1" --rm $IMAGE generate "memory (noun):" --temperature 0 --device cpu \
        --table-tier disk --table-cache 1MiB 2>"$work/log" || fail "generate: $(cat "$work/log")"
}

# the load runs in a separate container, which outlives the server and shares its network
terminate_under_load() {
    call run --rm --interactive --no-healthcheck --ulimit nofile=8192:8192 --ulimit nproc=8192:8192 \
        --network "container:$server" --entrypoint python3 $IMAGE - "http://127.0.0.1:$PORT" \
        <docker/verify_load.py >"$work/load" &
    local load=$! status
    until grep -q --no-messages started "$work/load"; do
        kill -0 "$load" || fail "the load does not start"
        sleep 0.1
    done
    call stop -t 10 "$server" >"$work/stop"
    wait "$load" || fail "streams were lost: $(tail -1 "$work/load")"
    echo "ok: every stream ends with a result or an error event: $(tail -1 "$work/load")"
    status=$(call wait "$server")
    check "exit status after SIGTERM: $status" test "$status" = 0
}

lacks() { ! grep --quiet "$1" "$2"; }

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
        call logs "$server" >&2
    fi
    exit 1
}

wait_until_ready() {
    local begin=$SECONDS
    until request ready >"$work/ready" 2>&1; do
        test "$(call inspect --format '{{.State.Running}}' "$server")" = true ||
            fail "the server ended before it was ready"
        test $((SECONDS - begin)) -lt $START_S || fail "the server is not ready after $START_S s"
        sleep 1
    done
    echo "ok: ready after $((SECONDS - begin)) s"
}

ask() {
    request "$1" "$2" >"$work/answer" || fail "POST /$1"
    echo "ok: POST /$1: $(cat "$work/answer")"
}

# request PATH [BODY], from inside the container, because it has no network
request() {
    call exec "$server" python3 -c '
import sys, urllib.request as r
url, body = sys.argv[1], "".join(sys.argv[2:]).encode() or None
headers = {"Content-Type": "application/json"} if body else {}
print(r.urlopen(r.Request(url, body, headers)).read().decode())
' "http://127.0.0.1:$PORT/$1" "${@:2}"
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

# a bind mount; for an index its parent folder, because its pages link to files outside it
share_podman() {
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

build_docker() {
    docker build --file docker/$file --tag $IMAGE "${build_arguments[@]}" .
}

build_podman() {
    local base=localhost/memplus-verify-base
    podman image exists $base || make_base $base
    # Docker's format, because the OCI format has no health check; chroot needs no separate network
    export BUILDAH_FORMAT=docker BUILDAH_ISOLATION=chroot
    repeat "$work/build.log" podman build --pull-never --layers --file docker/$file \
        --tag $IMAGE --build-arg BASE=$base "${build_arguments[@]}" .
}

make_base() {
    # shellcheck disable=SC2016  # apt's format
    debootstrap --variant=minbase bookworm "$work/root" \
        "$(apt-get indextargets --format '$(SITE)' | head -1)" >"$work/debootstrap.log"
    # apt's sources and settings of this machine
    rm "$work/root/etc/apt/sources.list"
    cp -r /etc/apt/sources.list* /etc/apt/apt.conf.d "$work/root/etc/apt/"
    tar --create --directory "$work/root" --exclude './var/cache/apt/archives/*.deb' . |
        podman import --quiet - "$1" >"$work/import"
    rm -r "$work/root"
}

# runs a command with its output in a log, again if it failed to seal the copy of itself that it
# runs: a transient EBUSY of some kernels
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

healthy_docker() {
    local begin=$SECONDS
    until [ "$(docker inspect --format '{{.State.Health.Status}}' "$server")" = healthy ]; do
        test $((SECONDS - begin)) -lt $HEALTH_S || return 1
        sleep 1
    done
}
healthy_podman() { call healthcheck run "$server"; }

clean() {
    if [ -n "$server" ]; then call rm --force "$server" >"$work/rm"; fi
    call volume rm --force $VOLUME >"$work/rm" 2>&1 || true
    rm -rf "$work"
}

main "$@"
